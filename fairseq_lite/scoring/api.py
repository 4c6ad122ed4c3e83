"""What a scorer is: pairs of texts go in, one number and the line that reports it come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from fairseq_lite.registry import Registry

SCORERS = Registry("scorer", "--scoring")


class Scorer(ABC):
    """Scores hypotheses against one reference each.

    Attributes:
        detokenised: whether it wants text as people write it (after the subword and tokenizer
            decoders) or the tokens of the target dictionary, separated by spaces.
    """

    detokenised: ClassVar[bool] = True

    def __init__(self, cfg: Any = None) -> None:
        self.cfg = cfg
        self.references: list[str] = []
        self.hypotheses: list[str] = []

    def add(self, reference: str, hypothesis: str) -> None:
        """Take one more pair."""
        self.references.append(reference)
        self.hypotheses.append(hypothesis)

    def __len__(self) -> int:
        return len(self.references)

    @abstractmethod
    def score(self) -> float:
        """The score of all pairs so far."""

    @abstractmethod
    def result_string(self) -> str:
        """The score as fairseq's final line of generation prints it."""

    @property
    def signature(self) -> str | None:
        """What must be equal for two scores to be comparable; None where no standard exists."""
        return None
