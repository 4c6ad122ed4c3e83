"""Scores given outputs instead of searching: `--score-reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fairseq_lite.errors import DataError
from fairseq_lite.generation.generator import Hypothesis, TargetVocabulary
from fairseq_lite.generation.likelihood import TargetScorer
from fairseq_lite.models.api import Model


class ReferenceScorer:
    """Takes the place of a generator: its only hypothesis is the reference.

    Args:
        models: scored together, their probabilities averaged.
        tgt_dict: the target dictionary.
    """

    def __init__(self, models: Sequence[Model], tgt_dict: TargetVocabulary) -> None:
        self.pad, self.eos = tgt_dict.pad(), tgt_dict.eos()
        self.scorer = TargetScorer(models, self.pad)

    @property
    def ignored_symbols(self) -> set[int]:
        """What is left out when an output is printed, besides what always is."""
        return {self.eos}

    def generate(
        self, sample: dict[str, Any], prefix_tokens: Tensor | None = None
    ) -> list[list[Hypothesis]]:
        """The references with their scores: means over tokens, whatever --lenpen says.

        Raises:
            DataError: the split has no references.
        """
        target = sample.get("target")
        if target is None:
            raise DataError("--score-reference: this split has no target side to score")
        scores = self.scorer.score(sample["net_input"], target).cpu()
        results = []
        for tokens, row in zip(target.cpu(), scores, strict=True):
            real = tokens.ne(self.pad)
            own = row[real]
            results.append([Hypothesis(tokens[real], float(own.sum() / max(len(own), 1)), own)])
        return results
