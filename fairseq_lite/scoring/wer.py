"""Word (or character) error rate: `--scoring wer`."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sacrebleu.metrics.bleu import BLEU

from fairseq_lite.config.flags import flag
from fairseq_lite.scoring.api import SCORERS, Scorer


@dataclass(frozen=True)
class WerConfig:
    """How text is cut into the units that are compared."""

    wer_tokenizer: Literal["none", "13a", "intl", "zh", "char"] = flag(
        "none", "sacrebleu's tokenizer to use first"
    )
    wer_remove_punct: bool = flag(False, "leave out punctuation")
    wer_char_level: bool = flag(False, "compare characters instead of words")
    wer_lowercase: bool = flag(False, "compare in lower case")


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Insertions, deletions and substitutions that turn `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right)),
            )
    return row[-1]


@SCORERS.register("wer", config=WerConfig)
class WerScorer(Scorer):
    """Edits needed, in percent of the references' words; lower is better."""

    cfg: WerConfig

    def __init__(self, cfg: WerConfig | None = None) -> None:
        super().__init__(cfg or WerConfig())
        self._tokenizer = BLEU(tokenize=self.cfg.wer_tokenizer).tokenizer
        self.edits = 0
        self.reference_length = 0
        self.pairs = 0

    def __len__(self) -> int:
        return self.pairs

    def units(self, text: str) -> list[str]:
        """The words or characters of a text, as configured."""
        words = self._tokenizer(text).split()
        if self.cfg.wer_remove_punct:
            words = [w for w in words if not all(unicodedata.category(c)[0] == "P" for c in w)]
        line = " ".join(words)
        if self.cfg.wer_lowercase:
            line = line.lower()
        return list(line.replace(" ", "▁")) if self.cfg.wer_char_level else line.split()

    def add(self, reference: str, hypothesis: str) -> None:
        """Take one more pair."""
        wanted, given = self.units(reference), self.units(hypothesis)
        self.pairs += 1
        self.edits += edit_distance(given, wanted)
        self.reference_length += len(wanted)

    def score(self) -> float:
        """The score of all pairs so far."""
        return 100.0 * self.edits / self.reference_length if self.reference_length else 0.0

    def result_string(self) -> str:
        """The score as the final line prints it."""
        return f"WER: {self.score():.2f}"
