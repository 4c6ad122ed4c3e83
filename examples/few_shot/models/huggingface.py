"""Causal language models of Hugging Face's: a folder, a `.gguf` file, or one in its cache.

Needs `pip install 'fairseq-lite[huggingface]'`. A text has a start symbol where the tokenizer puts
one in front of texts, and otherwise none; what stands at the very beginning is scored behind the
begin (or end) of a text. lm-evaluation-harness does the same, so that scores agree.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.few_shot.model_configs import CACHED
from examples.few_shot.models.api import (
    GenerateRequest,
    Ids,
    Model,
    Progress,
    Ranked,
    ScoreRequest,
    Scores,
)
from examples.few_shot.models.causal import CausalReader, Limits
from examples.few_shot.models.fingerprint import identity_of
from fairseq_lite.errors import CheckpointError, ConfigError, MissingDependency
from fairseq_lite.generation.branch_plan import sort_key
from fairseq_lite.parallel.world import SingleWorld, World

logger = logging.getLogger(__name__)

INSTALL = "pip install 'fairseq-lite[huggingface]'"
# Where architectures say how long a text may be.
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "seq_length")
_UNKNOWN_LENGTH = 2048

# What decides scores, of a model's folder.
_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "spiece.model",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        folder: of its files.
        gguf: its file in there, if it is one file.
    """

    folder: Path
    gguf: str | None = None

    @property
    def files(self) -> list[Path]:
        """Those that decide what it scores."""
        if self.gguf is not None:
            return [self.folder / self.gguf]
        weights = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("*.bin"))
        return [*filter(Path.is_file, (self.folder / name for name in _FILES)), *weights]


def find(name: str) -> Source:
    """The files of a model.

    Args:
        name: a folder, a `.gguf` file, `huggingface_<org>=<name>` or `<org>/<name>`.

    Raises:
        CheckpointError: it is nowhere.
        MissingDependency: transformers, or what it needs for this kind of file.
    """
    _need("transformers", name)
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise CheckpointError(f"--model-name {name}: no such file")
        _need("gguf", name)
        return Source(path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"--model-name {name}: has no config.json, as Hugging Face has")
        return Source(path)
    return Source(_cached(name))


def _cached(name: str) -> Path:
    """The folder of a model in the cache."""
    from huggingface_hub import snapshot_download

    known = name.removeprefix(CACHED).replace("=", "/", 1)
    try:
        return Path(snapshot_download(known, local_files_only=True))
    except (OSError, ValueError):
        raise CheckpointError(
            f"--model-name {name}: no folder, and {known} is not in Hugging Face's cache, where"
            f" `hf download {known}` puts it"
        ) from None


def _need(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(f"--model-name {name} needs {package}: {INSTALL}")


class HuggingFaceModel(Model):
    """A causal language model of transformers.

    Args:
        model: in evaluation mode, where it computes.
        tokenizer: its tokenizer.
        world: the processes that share the work; each has the whole model.
        limits: how much is read at a time.
        identity: what tells it from others.
        packages: those that made it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        world: World | None = None,
        limits: Limits | None = None,
        identity: dict[str, Any] | None = None,
        packages: tuple[str, ...] = ("tokenizers", "transformers"),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.world = SingleWorld(model.device) if world is None else world
        self.limits = limits or Limits()
        self.reader = CausalReader(model, self.limits)
        # What is read is a start symbol and all tokens but the last.
        self.max_tokens = _longest(model, tokenizer)
        self._start = _start_ids(tokenizer)
        self._identity = {"kind": "huggingface", **(identity or {})}
        self._packages = packages

    @classmethod
    def load(
        cls,
        name: str,
        *,
        world: World | None = None,
        dtype: torch.dtype = torch.float32,
        limits: Limits | None = None,
    ) -> HuggingFaceModel:
        """Read a model and its tokenizer.

        Args:
            name: see `find`.
            world: the processes that share the work; it says where to compute.
            dtype: of the weights and of what is computed.
            limits: how much is read at a time.

        Raises:
            CheckpointError: it is nowhere, damaged, or no causal language model.
            MissingDependency: transformers, or what it needs for this kind of file.
        """
        source = find(name)
        world = SingleWorld(_device()) if world is None else world
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        given = {"local_files_only": True} | ({"gguf_file": source.gguf} if source.gguf else {})
        folder = str(source.folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **given)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
        except ImportError as e:
            raise MissingDependency(f"--model-name {name}: {_first_line(e)}") from None
        except Exception as e:
            # Whatever is wrong with the files; each of its readers has errors of its own.
            reason = f"{type(e).__name__}: {_first_line(e)}"
            raise CheckpointError(
                f"--model-name {name}: transformers cannot read it as a causal language model:"
                f" {reason}"
            ) from e
        # Models carry habits of writing (sampling, penalties); what ends a text is all that counts.
        model.generation_config = GenerationConfig(
            eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
            bos_token_id=model.generation_config.bos_token_id,
        )
        identity = world.broadcast_object(identity_of(source.files) if world.is_main else None)
        model = torch.nn.Module.to(model, world.device).eval()
        packages = ("tokenizers", "transformers", *(["gguf"] if source.gguf else []))
        return cls(
            model, tokenizer, world=world, limits=limits, identity=identity, packages=packages
        )

    # -- tokens -----------------------------------------------------------------------------------

    def encode(self, text: str) -> Ids:
        found = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return np.array(found, dtype=np.int64)

    def symbols(self, ids: Ids) -> list[str]:
        return list(map(str, self.tokenizer.convert_ids_to_tokens(ids.tolist())))

    @property
    def end(self) -> int:
        found = self.tokenizer.eos_token_id
        if found is None:
            raise ConfigError(
                "--replace-newline-with-eos: this model's tokenizer has no end symbol; leave it out"
            )
        return int(found)

    @functools.cached_property
    def prefix(self) -> int:
        """What stands in front of a text without context.

        Raises:
            ConfigError: the tokenizer has no such symbol.
        """
        for found in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if found is not None:
                return int(found)
        raise ConfigError("this model's tokenizer has neither a begin nor an end symbol")

    def _whole(self, context: Ids, unprompted: bool = False) -> tuple[Ids, int]:
        """A context with what stands in front of it, and how many tokens that is."""
        start = self._start
        if not len(start) and (unprompted or not len(context)):
            start = np.array([self.prefix], dtype=np.int64)
        return np.concatenate([start, context]), len(start)

    # -- scores -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        context_scores: bool = False,
        progress: Progress | None = None,
    ) -> list[Scores]:
        texts = [self._whole(each.context, each.unprompted) for each in requests]
        mine = self._share([ids for ids, _ in texts])
        sequences = [texts[i][0] for i in mine]
        found: dict[int, Scores] = {}
        for reading in self.reader.read(sequences, scores=context_scores):
            asked = [
                (row, np.asarray(continuation, dtype=np.int64))
                for row, number in enumerate(reading.numbers)
                for continuation in requests[mine[number]].continuations
            ]
            tails, known = iter(self.reader.go_on(reading, sequences, asked)), reading.known
            for row, number in enumerate(reading.numbers):
                i = mine[number]
                own = [next(tails) for _ in requests[i].continuations]
                context = None
                if known.scores is not None:
                    context = self._of_context(sequences[number], texts[i][1], known.scores[row])
                found[i] = Scores(
                    context, tuple(scores for scores, _ in own), tuple(greedy for _, greedy in own)
                )
            if progress is not None:
                progress(min(len(found) * self.world.size, len(requests)))
        return self._gathered(found, len(requests))

    def _of_context(self, whole: Ids, start: int, scores: Any) -> Any:
        """Scores of a context's tokens, from those of all tokens but the first.

        Where nothing stands in front of a text, its first token is scored as if its begin did.
        """
        if start:
            return scores[start - 1 :]
        return np.concatenate([[self._first[whole[0]]], scores]).astype(np.float32)

    @functools.cached_property
    def _first(self) -> Any:
        """Log-probabilities (V,) of what texts may begin with."""
        (reading,) = self.reader.read([np.array([self.prefix], dtype=np.int64)])
        return reading.known.following[0].float().cpu().numpy()

    @torch.inference_mode()
    def rank(
        self,
        contexts: Sequence[Ids],
        wanted: Sequence[int],
        *,
        top: int = 10,
        among: Sequence[int] | None = None,
    ) -> list[Ranked]:
        texts = [self._whole(context)[0] for context in contexts]
        mine = self._share(texts)
        known = None
        if among is not None:
            known = torch.tensor(sorted(set(among)), device=self.reader.device)
        found: dict[int, Ranked] = {}
        for reading in self.reader.read([texts[i] for i in mine]):
            tokens = torch.tensor([wanted[mine[n]] for n in reading.numbers])
            tokens = tokens.to(self.reader.device)
            following = reading.known.following
            own = following.gather(1, tokens[:, None])
            counted = following if known is None else following[:, known]
            ranks = ((counted > own).sum(1) + 1).tolist()
            best = counted.topk(min(top, counted.size(1)), dim=1).indices
            best = best if known is None else known[best]
            for row, number in enumerate(reading.numbers):
                found[mine[number]] = Ranked(ranks[row], float(own[row]), tuple(best[row].tolist()))
        return self._gathered(found, len(contexts))

    # -- written answers --------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        beam: int = 1,
        progress: Progress | None = None,
    ) -> list[str]:
        prompts = [self._whole(each.prompt)[0] for each in requests]
        mine = self._share(prompts)
        found: dict[int, str] = {}
        for numbers in self._alike(mine, requests, prompts, beam):
            texts = self._written(
                np.stack([prompts[i] for i in numbers]), requests[numbers[0]], beam
            )
            found.update(zip(numbers, texts, strict=True))
            if progress is not None:
                progress(min(len(found) * self.world.size, len(requests)))
        return self._gathered(found, len(requests))

    def _alike(
        self,
        mine: Sequence[int],
        requests: Sequence[GenerateRequest],
        prompts: Sequence[Ids],
        beam: int,
    ) -> Iterator[list[int]]:
        """Requests that are as long and end alike, as many as are answered at a time."""
        groups: dict[Any, list[int]] = {}
        for i in mine:
            key = (len(prompts[i]), requests[i].max_new_tokens, requests[i].stop)
            groups.setdefault(key, []).append(i)
        for (length, new, _), numbers in groups.items():
            rows = max(1, self.limits.cells // ((length + new) * beam))
            rows = min(rows, self.limits.rows or rows)
            for start in range(0, len(numbers), rows):
                yield numbers[start : start + rows]

    def _written(self, prompts: Any, request: GenerateRequest, beam: int) -> list[str]:
        """What the model writes behind prompts of one length (n, T)."""
        from transformers import StoppingCriteriaList

        ids = torch.from_numpy(prompts).to(self.reader.device)
        length = ids.size(1)
        new = min(request.max_new_tokens, self.max_tokens + 1 - length)
        if new < 1:
            return [""] * len(prompts)
        ends = self.model.generation_config.eos_token_id
        stops = [stop for stop in request.stop if stop]
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            num_beams=beam,
            do_sample=False,
            pad_token_id=self.prefix,
            stopping_criteria=StoppingCriteriaList([_stopping(self.tokenizer, stops, length)]),
        )
        ends = set(ends if isinstance(ends, list) else [ends])
        return [self._text(row.tolist(), length, ends, stops) for row in out]

    def _text(self, ids: list[int], length: int, ends: set[Any], stops: Sequence[str]) -> str:
        """The text behind a prompt, up to the end of a text or to a string that stops it."""
        new = ids[length:]
        new = new[: next((k for k, token in enumerate(new) if token in ends), None)]
        head, whole = (_decoded(self.tokenizer, x) for x in (ids[:length], ids[:length] + new))
        text = whole[len(head) :] if whole.startswith(head) else _decoded(self.tokenizer, new)
        return text[: min((text.index(stop) for stop in stops if stop in text), default=None)]

    # -- processes --------------------------------------------------------------------------------

    def _share(self, sequences: Sequence[Ids]) -> list[int]:
        """The numbers of the sequences that are this process's: neighbours in their order."""
        order = sorted(range(len(sequences)), key=lambda i: sort_key(sequences[i]))
        ends = np.cumsum([len(sequences[i]) for i in order])
        # The process in whose part of all tokens a sequence begins.
        total = max(int(ends[-1]) if len(ends) else 0, 1)
        return [
            i
            for i, end in zip(order, ends.tolist(), strict=True)
            if (end - len(sequences[i])) * self.world.size // total == self.world.rank
        ]

    def _gathered(self, found: dict[int, Any], count: int) -> list[Any]:
        """The results of all processes in order."""
        everything: dict[int, Any] = {}
        for each in self.world.gather_objects(found):
            everything.update(each)
        return [everything[i] for i in range(count)]

    def identity(self) -> dict[str, Any]:
        return self._identity

    def packages(self) -> tuple[str, ...]:
        return self._packages

    def agree(self, value: Any) -> Any:
        return self.world.broadcast_object(value)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _longest(model: Any, tokenizer: Any) -> int:
    """The most tokens that a model reads."""
    config = model.config.get_text_config()
    for name in _LENGTHS:
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    found = tokenizer.model_max_length
    return int(found) if found < 1 << 30 else _UNKNOWN_LENGTH


def _start_ids(tokenizer: Any) -> Ids:
    """What the tokenizer puts in front of every text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for n in range(len(whole) - len(plain) + 1):
        if whole[n : n + len(plain)] == plain:
            return np.array(whole[:n], dtype=np.int64)
    return np.zeros(0, dtype=np.int64)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _stopping(tokenizer: Any, stops: Sequence[str], length: int) -> Any:
    """What ends outputs that hold one of some strings behind their first `length` tokens."""
    from transformers import StoppingCriteria

    class Stopping(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            texts = [_decoded(tokenizer, row) for row in input_ids[:, length:].tolist()]
            done = [any(stop in text for stop in stops) for text in texts]
            return torch.tensor(done, device=input_ids.device)

    return Stopping()
