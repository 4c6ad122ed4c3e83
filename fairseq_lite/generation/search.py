"""How a step of generation chooses: beam search, its diverse variants, sampling.

A strategy is a function of tensors. It sees the log-probabilities of every next token of every
beam, and returns candidates in order of preference; what becomes of them is the generator's affair.

Axes: B sentences, K beams, V vocabulary, C candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """Continuations in order of preference, (B, C) each.

    Attributes:
        scores: cumulative log-probability, the candidate's token included.
        tokens: the token.
        beams: the beam it continues.
    """

    scores: Tensor
    tokens: Tensor
    beams: Tensor


class Strategy(ABC):
    """A way to choose candidates."""

    def begin(self, ids: Sequence[int]) -> None:  # noqa: B027
        """Called before a batch, with the numbers of its sentences."""

    def keep(self, sentences: Tensor) -> None:  # noqa: B027
        """Go on with these sentences of the batch only."""

    @abstractmethod
    def step(self, first: bool, logp: Tensor, scores: Tensor) -> Candidates:
        """Choose.

        Args:
            first: whether this is the first step, where all beams of a sentence are the same.
            logp: (B, K, V), log-probabilities of the next token.
            scores: (B, K), cumulative log-probabilities so far; zero at the first step.
        """


class BeamSearch(Strategy):
    """The 2K best of all continuations, so that K remain when every beam ends."""

    def step(self, first: bool, logp: Tensor, scores: Tensor) -> Candidates:
        """See `Strategy.step`."""
        b, k, v = logp.shape
        if first:
            logp, scores = logp[:, :1], scores[:, :1]
        beams = logp.size(1)
        # One fewer than there are: padding, which nothing may choose, is never among them.
        wanted = min(2 * k, beams * v - 1)
        # The best of all are among the best of each beam; this never writes a (B, K, V) sum.
        each = min(wanted, v)
        found, tokens = logp.topk(each, dim=2)
        best, where = (found + scores[..., None]).flatten(1).topk(wanted, dim=1)
        return Candidates(best, tokens.view(b, -1).gather(1, where), where // each)


class DiverseBeamSearch(Strategy):
    """Beam search in groups that avoid each other's tokens (Vijayakumar et al. 2016).

    Args:
        groups: divides the beam.
        strength: taken from a token's log-probability for each earlier candidate with that token.
    """

    def __init__(self, groups: int, strength: float) -> None:
        self.groups = groups
        self.strength = strength
        self.beam = BeamSearch()

    def step(self, first: bool, logp: Tensor, scores: Tensor) -> Candidates:
        """See `Strategy.step`."""
        counts = logp.new_zeros(logp.size(0), logp.size(2))
        parts: list[Candidates] = []
        for g in range(self.groups):
            own = logp[:, g :: self.groups]
            if g > 0:
                own = own - self.strength * counts[:, None]
            part = self.beam.step(first, own, scores[:, g :: self.groups])
            parts.append(part._replace(beams=part.beams * self.groups + g))
            counts.scatter_add_(1, part.tokens, torch.ones_like(part.scores))
        # Interleaved, so the first K candidates hold the best of every group.
        joined = (torch.stack(each, dim=2).flatten(1) for each in zip(*parts, strict=True))
        return Candidates(*joined)


class DiverseSiblingsSearch(Strategy):
    """Beam search where a beam's n-th best child pays n times a rate (Li et al. 2016).

    Args:
        rate: the price of each rank.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def step(self, first: bool, logp: Tensor, scores: Tensor) -> Candidates:
        """See `Strategy.step`."""
        if first:
            return BeamSearch().step(first, logp, scores)
        b, k, v = logp.shape
        each = min(2 * k, v)
        found, tokens = logp.topk(each, dim=2)
        prices = self.rate * torch.arange(1, each + 1, device=logp.device)
        total = found + scores[..., None] - prices
        best, where = total.flatten(1).topk(min(2 * k, k * v - 1), dim=1)
        return Candidates(best, tokens.view(b, -1).gather(1, where), where // each)


class Sampling(Strategy):
    """Draw each beam's next token from its distribution, or from its likeliest part.

    A sentence draws from its own stream of random numbers, which depends on the seed and its number
    only: neither the size of a batch nor its other sentences change what is drawn.

    Args:
        topk: draw among this many; all when below 1.
        topp: draw among the fewest whose probabilities exceed this; all when not positive.
        seed: of the streams.
    """

    def __init__(self, topk: int = -1, topp: float = -1.0, seed: int = 1) -> None:
        self.topk = topk
        self.topp = topp
        self.seed = seed
        self._streams: list[torch.Generator] = []

    def begin(self, ids: Sequence[int]) -> None:
        """Start a stream for each sentence."""
        self._streams = [
            torch.Generator().manual_seed((self.seed * 1_000_003 + i) % 2**63) for i in ids
        ]

    def keep(self, sentences: Tensor) -> None:
        """Drop the streams of the others."""
        self._streams = [self._streams[i] for i in sentences.tolist()]

    def step(self, first: bool, logp: Tensor, scores: Tensor) -> Candidates:
        """See `Strategy.step`; one candidate a beam."""
        b, k, v = logp.shape
        tokens: Tensor | None = None
        if self.topp > 0:
            logp, tokens = logp.sort(dim=-1, descending=True)
            weights = _probabilities(logp)
            # The first word that takes the sum to p or beyond still belongs.
            weights = weights.masked_fill(weights.cumsum(-1) - weights >= self.topp, 0.0)
        elif self.topk > 0:
            logp, tokens = logp.topk(min(self.topk, v), dim=-1)
            weights = _probabilities(logp)
        else:
            weights = _probabilities(logp)
        drawn = self._draw(weights)[..., None]
        chosen = drawn if tokens is None else tokens.gather(-1, drawn)
        beams = torch.arange(k, device=logp.device).expand(b, k)
        if first:
            beams = torch.zeros_like(beams)
        return Candidates(scores + logp.gather(-1, drawn).squeeze(-1), chosen.squeeze(-1), beams)

    def _draw(self, weights: Tensor) -> Tensor:
        """Indices (B, K) drawn in proportion to weights (B, K, N)."""
        k = weights.size(1)
        numbers = torch.stack(
            [torch.rand(k, generator=g, dtype=torch.float64) for g in self._streams]
        )
        sums = weights.double().cumsum(-1)
        # In (0, total]: a draw of zero would land on an entry without weight.
        points = (1.0 - numbers.to(weights.device)) * sums[..., -1]
        found = torch.searchsorted(sums, points[..., None]).squeeze(-1)
        return found.clamp_(max=weights.size(-1) - 1)


def _probabilities(logp: Tensor) -> Tensor:
    """Probabilities that sum to one, whatever forbidden tokens had; zeros where none is left."""
    return logp.softmax(dim=-1).nan_to_num_(nan=0.0)


def repeated(prefixes: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Next tokens that would complete an n-gram the prefix already has.

    Args:
        prefixes: (B, K, T), without the start symbol.
        n: length of the n-grams.

    Returns:
        (B, K, W) tokens, and a (B, K, W) mask of those that are banned.
    """
    t = prefixes.size(2)
    if t < n:
        empty = prefixes.new_zeros(*prefixes.shape[:2], 0)
        return empty, empty.bool()
    windows = prefixes.unfold(2, n, 1)
    tail = prefixes[:, :, t - n + 1 :]
    same = windows[..., :-1].eq(tail[:, :, None]).all(dim=-1)
    return windows[..., -1], same
