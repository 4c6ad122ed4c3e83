"""BLEU over the tokens as they are (Papineni et al. 2002): `--scoring bleu`, fairseq's default.

Nothing is retokenised, so the number depends on the tokenisation of the data and is comparable only
within one data set. For numbers to publish there is `--scoring sacrebleu`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fairseq_lite.errors import ConfigError
from fairseq_lite.scoring.api import SCORERS, Scorer


def ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram of exactly `order` tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(order)), strict=False))


@SCORERS.register("bleu")
class BleuScorer(Scorer):
    """Corpus BLEU of whitespace-separated tokens, without smoothing.

    Args:
        cfg: has no fields.
        order: the longest n-gram counted.
        ignore_case: compare in lower case.
        unk: a reference token equal to this matches nothing.
    """

    detokenised = False

    def __init__(
        self, cfg: object = None, *, order: int = 4, ignore_case: bool = False, unk: str = "<unk>"
    ) -> None:
        super().__init__(cfg)
        if order < 1:
            raise ConfigError(f"--order {order}: expected 1 or more")
        self.order = order
        self.ignore_case = ignore_case
        self.unk = unk
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        self.pairs = 0
        self.system_length = 0
        self.reference_length = 0
        self.matches = [0] * self.order
        self.totals = [0] * self.order

    def __len__(self) -> int:
        return self.pairs

    def add(self, reference: str, hypothesis: str) -> None:
        """Take one more pair."""
        if self.ignore_case:
            reference, hypothesis = reference.lower(), hypothesis.lower()
        # A token with a space in it can never come from a hypothesis.
        wanted = [" " if t == self.unk else t for t in reference.split()]
        given = hypothesis.split()
        self.pairs += 1
        self.reference_length += len(wanted)
        self.system_length += len(given)
        for n in range(1, self.order + 1):
            overlap = ngrams(wanted, n) & ngrams(given, n)
            self.matches[n - 1] += overlap.total()
            self.totals[n - 1] += max(len(given) - n + 1, 0)

    def precisions(self) -> list[float]:
        """The share of the hypotheses' n-grams found in the references, in percent, by order."""
        return [100.0 * m / t if t else 0.0 for m, t in zip(self.matches, self.totals, strict=True)]

    def brevity(self) -> float:
        """The penalty for hypotheses shorter than their references."""
        if self.system_length == 0:
            return 0.0
        return min(1.0, math.exp(1.0 - self.reference_length / self.system_length))

    def score(self) -> float:
        """The score of all pairs so far."""
        precisions = self.precisions()
        if min(precisions) <= 0.0:
            return 0.0
        return self.brevity() * math.exp(sum(map(math.log, precisions)) / self.order)

    def result_string(self) -> str:
        """The score as the final line prints it."""
        precisions = "/".join(f"{p:2.1f}" for p in self.precisions())
        length = self.system_length / self.reference_length if self.reference_length else 0.0
        return (
            f"BLEU{self.order} = {self.score():2.2f}, {precisions} (BP={self.brevity():.3f}, "
            f"ratio={length:.3f}, syslen={self.system_length}, reflen={self.reference_length})"
        )
