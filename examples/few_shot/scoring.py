"""From log-probabilities of tokens to the score of a candidate. Pure functions.

A candidate is a whole text: prompt, answer, and what stands behind the mask. The candidates of one
sample begin with the same tokens (their *common prefix*) and may end with the same (their *common
suffix*, where the mask is in mid-sentence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fairseq_lite.errors import ConfigError

Ids = npt.NDArray[np.int64]

SCORINGS = ("mean", "sum", "suffix", "unconditional-norm")


def common_prefix(sequences: Sequence[Ids]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(len(s) for s in sequences)
    first = sequences[0][:shortest]
    differing = [np.flatnonzero(s[:shortest] != first) for s in sequences[1:]]
    return min((int(d[0]) for d in differing if len(d)), default=shortest)


def common_suffix(sequences: Sequence[Ids]) -> int:
    """How many tokens all sequences end with."""
    return common_prefix([s[::-1] for s in sequences])


def branching(sequences: Sequence[Ids]) -> int:
    """Where candidates part: behind their common prefix, with a token left for each."""
    return min(common_prefix(sequences), min(len(s) for s in sequences) - 1)


@dataclass(frozen=True)
class TokenScores:
    """What is known of a candidate.

    Attributes:
        context: the sum over its tokens in front of `tail`.
        context_tokens: how many these are.
        tail: the log-probability of each token from where the candidates part, natural.
        start: where the candidate's own words begin, counted from the end of the context; negative
            where candidates begin with the same tokens.
        suffix: tokens of the common suffix.
        characters: of the candidate's words.
        unconditional: log-probabilities of the words behind "Answer:" alone, where asked for.
        skipped: tokens of the context were not scored: `context` is 0.
    """

    context: float
    context_tokens: int
    tail: tuple[float, ...]
    start: int
    suffix: int
    characters: int
    unconditional: tuple[float, ...] | None = None
    skipped: bool = False

    @property
    def total(self) -> float:
        """Of the whole text."""
        return self.context + math.fsum(self.tail)

    @property
    def tokens(self) -> int:
        """Of the whole text, as far as scored."""
        return len(self.tail) + (0 if self.skipped else self.context_tokens)


def score(scores: TokenScores, scoring: str) -> float:
    """The score of a candidate; the best candidate has the highest.

    `sum`: over the whole text. `mean`: a token's, from the first token in which the candidates
    differ to the end. `suffix`: the sum over the common suffix alone, Winograd's "partial" scoring
    (Trinh and Le 2018, section 3). `unconditional-norm`: the sum from where the candidates differ
    less that of the same words behind "Answer:" (Brown et al. 2020, section 2.4).

    Raises:
        ConfigError: `suffix` where candidates have no common suffix.
    """
    if scoring == "sum":
        return scores.total
    if scoring == "mean":
        return math.fsum(scores.tail) / len(scores.tail)
    if scoring == "suffix":
        if not scores.suffix:
            raise ConfigError(
                "--scoring suffix: candidates end differently, there is no common suffix; it is for"
                " masks in mid-sentence: use --scoring sum or mean"
            )
        return math.fsum(scores.tail[-scores.suffix :])
    if scoring == "unconditional-norm":
        assert scores.unconditional is not None
        return math.fsum(scores.tail) - math.fsum(scores.unconditional)
    raise ConfigError(f"--scoring {scoring}: expected one of {', '.join(SCORINGS)}")


def perplexity(log_probability: float, tokens: int) -> float:
    """Of a token; NaN where there is none, infinite where it is beyond numbers."""
    if not tokens:
        return math.nan
    try:
        return math.exp(-log_probability / tokens)
    except OverflowError:
        return math.inf
