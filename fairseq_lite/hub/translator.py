"""A translation model without a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

from fairseq_lite.config.core import CommonConfig, GenerationConfig
from fairseq_lite.data.text.api import build_codecs
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.evaluate import Texts, Translated
from fairseq_lite.generation.lines import generate_for_lines
from fairseq_lite.generation.session import DEFAULT_MAX_TOKENS, Session, place, unchanging
from fairseq_lite.hub.options import generation_config
from fairseq_lite.tasks.api import resolve_max_positions
from fairseq_lite.training.checkpoint.inference import Ensemble


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
        cfg = generation_config(options, "translate")
        session = Session(
            self._ensemble.task.build_generator(self._ensemble.models, cfg),
            self._ensemble.models,
            self._texts,
            cfg,
            device=self.device,
        )
        with torch.inference_mode(), unchanging(self._ensemble.models):
            found = generate_for_lines(
                session,
                self._ensemble.task,
                [self._encode(line) for line in lines],
                max_tokens=DEFAULT_MAX_TOKENS,
                max_positions=self._limits,
            )
        return [record for record, _ in found]
