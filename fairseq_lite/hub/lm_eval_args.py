"""What lm-evaluation-harness may say to a model of ours; everything else is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.session import DEFAULT_MAX_TOKENS


@dataclass(frozen=True)
class ModelArgs:
    """What `--model_args` takes, and what the harness adds from `--batch_size` and `--device`.

    Attributes:
        path: a checkpoint, several separated by colons, or a folder, as `hub.load` takes it.
        device: "cpu", or "cuda" or "cuda:0" for CUDA where there is one, as by default.
        bf16: compute in bfloat16.
        fp16: compute in float16.
        user_dir: the plugin the model needs.
        overrides: model fields to replace; from a command line a JSON object.
        start: the symbol texts begin with, where the model knows several, as "<de>".
        max_length: the longest input, start symbol included; by default the model's.
        max_gen_toks: the longest output, where a task does not say.
        max_tokens: tokens in a batch.
        batch_size: instead of `max_tokens`: as many tokens as so many inputs of `max_length`.
            "auto" is `max_tokens` of flite-generate, or `max_batch_size` inputs.
        max_batch_size: of "auto".
    """

    path: str
    device: str | None = None
    bf16: bool = False
    fp16: bool = False
    user_dir: str | None = None
    overrides: Mapping[str, Any] | str | None = None
    start: str | None = None
    max_length: int | None = None
    max_gen_toks: int = 256
    max_tokens: int | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ModelArgs:
        """Read arguments.

        Raises:
            ConfigError: one is unknown or of another kind, or the path is missing.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"model_args: {unknown[0]}: not known; expected {', '.join(known)}")
        if not given.get("path"):
            raise ConfigError("model_args: path=CHECKPOINT is missing")
        kinds = {"bool": bool, "int": int, "int | None": int, "str": str, "str | None": str}
        for field in fields(cls):
            value, kind = given.get(field.name), kinds.get(str(field.type))
            if value is not None and kind is not None and type(value) is not kind:
                raise ConfigError(f"model_args: {field.name}={value!r}: expected {field.type}")
        return cls(**given)

    def model_device(self) -> str | None:
        """The device as `hub.load` takes it.

        Raises:
            ConfigError: another GPU than the first.
        """
        if self.device is not None and self.device.startswith("cuda:") and self.device != "cuda:0":
            raise ConfigError(
                f"device {self.device!r}: expected 'cpu' or 'cuda'; CUDA_VISIBLE_DEVICES=N in the"
                " environment chooses among several GPUs"
            )
        # What the harness's command line says when nothing is typed, with or without a GPU.
        return "cuda" if self.device == "cuda:0" else self.device

    def model_overrides(self) -> dict[str, Any] | None:
        """`overrides` as a dictionary.

        Raises:
            ConfigError: not a JSON object.
        """
        found: Any = self.overrides
        try:
            found = json.loads(found) if isinstance(found, str) else found
        except ValueError:
            found = False  # refused below
        if found is None:
            return None
        if isinstance(found, Mapping):
            return dict(found)
        raise ConfigError(
            f"model_args: overrides={self.overrides!r}: expected a JSON object; from a command line"
            """ `--model_args path=... 'overrides={"dropout": 0}'`"""
        )

    def tokens_in_batch(self, longest: int) -> int:
        """Tokens in a batch, where an input has at most `longest`.

        Raises:
            ConfigError: arguments that contradict each other, or numbers below 1.
        """
        size = self.batch_size
        auto = isinstance(size, str) and size.partition(":")[0] == "auto"
        if not auto and not str(size).isdecimal():
            raise ConfigError(f"batch_size={size!r}: expected a number, or auto")
        if self.max_batch_size is not None and not auto:
            raise ConfigError("max_batch_size is of use with batch_size=auto only")
        # The harness says 1 when nothing is typed.
        if self.max_tokens is not None and str(size) != "1":
            raise ConfigError(f"max_tokens={self.max_tokens} and batch_size={size}: give one")
        if self.max_tokens is not None:
            tokens = self.max_tokens
        elif not auto:
            tokens = int(size) * longest
        elif self.max_batch_size is not None:
            tokens = self.max_batch_size * longest
        else:
            tokens = DEFAULT_MAX_TOKENS
        if tokens < 1:
            raise ConfigError(f"{tokens} tokens in a batch: expected 1 or more")
        return tokens


@dataclass(frozen=True)
class GenerationArgs:
    """How one output is generated.

    Attributes:
        until: strings that end it.
        max_new_tokens: of it.
        options: of generation.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, given: Mapping[str, Any], longest: int) -> GenerationArgs:
        """Read a task's `generation_kwargs`, or `--gen_kwargs`.

        As in the harness, sampling is on when do_sample says so or a temperature is given without
        it; temperature, top_k and top_p then count, and otherwise have nothing to act on.

        Args:
            given: their names and values.
            longest: `max_gen_toks` where there is none.

        Raises:
            ConfigError: one is unknown or out of range.
        """
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        known = ("until", *names, "do_sample", "temperature", "top_k", "top_p", "num_beams")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"gen_kwargs: {unknown[0]}: not known; expected {', '.join(known)}")
        lengths = {name: given[name] for name in names if given.get(name) is not None}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"gen_kwargs: {lengths}: give one of them")
        until = given.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(str(each) for each in until if each)
        longest = int(next(iter(lengths.values()), longest))
        if longest < 1:
            raise ConfigError(f"max_gen_toks={longest}: expected 1 or more")
        return cls(until, longest, tuple(_search(given).items()))


def _search(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of generation."""
    temperature = float(given.get("temperature") or 0.0)
    beam = int(given.get("num_beams") or 1)
    sampling = given.get("do_sample")
    if not (temperature > 0 if sampling is None else sampling):
        return {"beam": beam}
    if given.get("temperature") is not None and temperature <= 0:
        raise ConfigError(f"gen_kwargs: temperature={temperature} with do_sample: expected above 0")
    if beam > 1:
        raise ConfigError(f"gen_kwargs: num_beams={beam} with do_sample: expected 1")
    found = {"beam": 1, "sampling": True, "temperature": temperature or 1.0}
    top_k, top_p = int(given.get("top_k") or 0), float(given.get("top_p") or 1.0)
    if top_k > 0 and top_p < 1:
        raise ConfigError(f"gen_kwargs: top_k={top_k} and top_p={top_p}: give one of them")
    if top_k > 0:
        found["sampling_topk"] = top_k
    elif top_p < 1:
        found["sampling_topp"] = top_p
    return found
