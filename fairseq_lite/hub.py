"""Trained models from Python: no command line, no data folder.

    from fairseq_lite import hub

    translator = hub.load("checkpoints/checkpoint_best.pt")
    translator.translate("A man rides a horse.")
    translator.translate(["One.", "Two."], beam=4, lenpen=0.6)

A checkpoint carries its dictionaries and its segmentation model, so one file is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import CommonConfig, GenerationConfig
from fairseq_lite.data.text.api import build_codecs
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.generation.evaluate import Texts, Translated
from fairseq_lite.generation.lines import generate_for_lines
from fairseq_lite.generation.session import DEFAULT_MAX_TOKENS, Session, place
from fairseq_lite.plugins import import_user_dir
from fairseq_lite.tasks.api import resolve_max_positions
from fairseq_lite.training.checkpoint.inference import Ensemble, load_models


class Translator:
    """A trained translation model, or an ensemble of several.

    Args:
        ensemble: what `load_models` returned.
        common: device and precision: `cpu`, `bf16`, `fp16`, `seed`.
    """

    def __init__(self, ensemble: Ensemble, common: CommonConfig) -> None:
        self._ensemble = ensemble
        task, saved = ensemble.task, ensemble.configs[0]
        if task.source_dictionary is None or task.target_dictionary is None:
            raise ConfigError(f"{saved.path}: this model does not translate")
        self.source_dictionary = task.source_dictionary
        self.target_dictionary = task.target_dictionary
        self.device = place(ensemble.models, common, GenerationConfig())
        config = saved.task.config
        self._encode, decode = build_codecs(
            saved.tokenizer, saved.bpe, config.source_lang, config.target_lang
        )
        self._texts = Texts(self.target_dictionary, self.source_dictionary, decode=decode)
        self._limits = resolve_max_positions(
            task.max_positions(), *(model.max_positions() for model in ensemble.models)
        )

    @property
    def models(self) -> list[Any]:
        """The PyTorch modules, in evaluation mode."""
        return list(self._ensemble.models)

    @overload
    def translate(self, text: str, **options: Any) -> str: ...

    @overload
    def translate(self, text: Sequence[str], **options: Any) -> list[str]: ...

    def translate(self, text: str | Sequence[str], **options: Any) -> str | list[str]:
        """Translate raw text: one sentence, or several at once.

        Args:
            text: a sentence or a list of them, not segmented.
            options: fields of `GenerationConfig`: beam, lenpen, max_len_a, sampling, …

        Returns:
            The best translation of each sentence, detokenised; one string for one string.

        Raises:
            ConfigError: an option that does not exist, or that contradicts another.
        """
        lines = [text] if isinstance(text, str) else list(text)
        found = [one.outputs[0].detokenised for one in self.records(lines, **options)]
        return found[0] if isinstance(text, str) else found

    def records(self, lines: Sequence[str], **options: Any) -> list[Translated]:
        """As `translate`, with scores and every hypothesis (`nbest`)."""
        known = {field.name for field in dataclasses.fields(GenerationConfig)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"translate(): unknown option {unknown[0]!r}")
        cfg = GenerationConfig(**options)
        session = Session(
            self._ensemble.task.build_generator(self._ensemble.models, cfg),
            self._ensemble.models,
            self._texts,
            cfg,
            device=self.device,
        )
        with torch.inference_mode():
            found = generate_for_lines(
                session,
                self._ensemble.task,
                [self._encode(line) for line in lines],
                max_tokens=DEFAULT_MAX_TOKENS,
                max_positions=self._limits,
            )
        return [record for record, _ in found]


def load(
    path: str | Path | Sequence[str | Path],
    *,
    device: str | None = None,
    bf16: bool = False,
    fp16: bool = False,
    user_dir: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
) -> Translator:
    """Load a trained model.

    Args:
        path: a checkpoint, several separated by colons or in a list (an ensemble), or a folder that
            holds checkpoint_best.pt or checkpoint_last.pt.
        device: "cpu" or "cuda"; by default CUDA where there is one.
        bf16: compute in bfloat16.
        fp16: compute in float16 (CUDA).
        user_dir: the plugin the model needs, as `--user-dir`.
        overrides: model fields to replace, as `--model-overrides`.

    Raises:
        CheckpointError: no such file, damaged, or without its dictionaries.
    """
    if user_dir is not None:
        import_user_dir(user_dir)
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device {device!r}: expected 'cpu' or 'cuda'")
    names = path.split(":") if isinstance(path, str) else path
    files = [names] if isinstance(names, Path) else [Path(name) for name in names]
    ensemble = load_models(
        [str(_file(each)) for each in files], load_builtins(), overrides=overrides
    )
    return Translator(ensemble, CommonConfig(cpu=device == "cpu", bf16=bf16, fp16=fp16))


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: holds neither checkpoint_best.pt nor checkpoint_last.pt")
