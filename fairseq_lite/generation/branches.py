"""How likely continuations of shared contexts are, and which tokens are likeliest behind contexts.

A context is computed once for all its continuations, and what many contexts begin with once for
all of them (`branch_plan`, `packed`). A model that cannot be taken apart like this, because its
forward pass is its own, reads every continuation behind its whole context.

    units, places = collect(requests, start)
    reader = BranchReader(models, pad)
    log_probs, greedy = reader.read(units, pick_scores(len(dictionary), unk), max_tokens=4000)
    scores_of(places[0], log_probs, greedy)

Axes: W tokens after which something is asked, M that are asked for there, n of W at a time,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairseq_lite.generation.branch_passes import Asked, packed_passes, whole_passes
from fairseq_lite.generation.branch_plan import Branches, Places, Unit, collect
from fairseq_lite.generation.incremental import can_cache
from fairseq_lite.generation.likelihood import average
from fairseq_lite.models.api import Model
from fairseq_lite.models.transformer_lm import TransformerLanguageModel

__all__ = [
    "BranchReader",
    "BranchScores",
    "Branches",
    "Ranked",
    "collect",
    "pick_ranks",
    "pick_scores",
    "scores_of",
]

Numbers = tuple[npt.NDArray[Any], ...]

# Log-probabilities that exist at a time (and as many logits): 128 MiB in fp32. On a CPU a product
# with the vocabulary's matrix is slower by a sixth where it has a quarter of these rows: the matrix
# is laid out anew for every product (V=50,000, D=384: 486 ms of 709 rows, against 405 ms).
_SLICE_NUMBERS = 1 << 25


@dataclass(frozen=True)
class BranchScores:
    """What was asked of a context.

    Attributes:
        context: log-probabilities of its tokens, natural; None unless asked for.
        continuations: those of each continuation's.
        greedy: of each continuation whether every token of it is the likeliest one there.
    """

    context: npt.NDArray[np.float32] | None
    continuations: tuple[npt.NDArray[np.float32], ...]
    greedy: tuple[bool, ...]


@dataclass(frozen=True)
class Ranked:
    """Where a token stands among those that could follow a context.

    Attributes:
        rank: one more than there are likelier ones.
        log_prob: of the token among all, natural.
        top: the likeliest tokens, best first.
    """

    rank: int
    log_prob: float
    top: tuple[int, ...]


class Pick(NamedTuple):
    """What is taken from log-probabilities.

    Attributes:
        take: from log-probabilities (n, V), the row of each target (m,) and the targets (m,) to
            results (m, …).
        nothing: results of no target.
    """

    take: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    nothing: Numbers


def pick_scores(known: int, unk: int) -> Pick:
    """Log-probabilities, and whether no token is likelier.

    Args:
        known: tokens from this number on cannot be predicted.
        unk: what they are scored as.
    """

    def take(log_probs: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        possible = targets < known
        found = log_probs[rows, targets.masked_fill(~possible, unk)]
        return found, possible & (found >= log_probs.amax(dim=1)[rows])

    return Pick(take, (np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.bool_)))


def pick_ranks(known: int, unk: int, *, top: int, among: Tensor | None = None) -> Pick:
    """Log-probabilities, ranks, and the likeliest tokens.

    Args:
        known: see `pick_scores`.
        unk: see `pick_scores`.
        top: how many tokens.
        among: distinct ones that alone count, on the device of the models; None: all.
    """

    def take(log_probs: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        found = log_probs[rows, targets.masked_fill(targets >= known, unk)]
        counted = log_probs if among is None else log_probs[:, among]
        likelier = (counted[rows] > found[:, None]).sum(dim=1)
        best = counted.topk(min(top, counted.size(1)), dim=1).indices
        return found, likelier + 1, (best if among is None else among[best])[rows]

    ranks = np.zeros(0, dtype=np.int64)
    return Pick(take, (np.zeros(0, dtype=np.float32), ranks, ranks[:, None]))


def scores_of(
    places: Places, log_probs: npt.NDArray[np.float32], greedy: npt.NDArray[np.bool_]
) -> BranchScores:
    """The results of a request."""
    return BranchScores(
        None if places.context is None else log_probs[places.context],
        tuple(log_probs[own] for own in places.continuations),
        tuple(bool(greedy[own].all()) for own in places.continuations),
    )


class BranchReader:
    """Answers units with one model, or with several whose probabilities are averaged.

    Args:
        models: language models over the same dictionaries, in evaluation mode.
        pad: the padding symbol.
    """

    def __init__(self, models: Sequence[Model], pad: int) -> None:
        self.models = list(models)
        self.pad = pad
        self.packs = all(isinstance(m, TransformerLanguageModel) and can_cache(m) for m in models)

    @torch.inference_mode()
    def read(
        self,
        units: Sequence[Unit],
        pick: Pick,
        *,
        max_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> Numbers:
        """Answer consecutive units.

        Args:
            units: in order.
            pick: what is wanted to know.
            max_tokens: read at a time, besides a stem; where sequences are padded, padding counts.
            progress: called with the number of requests that are answered so far.

        Returns:
            Results of the tokens that they ask for, from the first unit's on.
        """
        if not units:
            return pick.nothing
        first, last = units[0].first, units[-1].first + units[-1].results
        # Behind the results there is room for those of a stem's tokens.
        places = last - first + max(len(unit.prefix) for unit in units)
        found: list[npt.NDArray[Any]] = []
        done, total = 0, sum(unit.requests for unit in units)
        for asked in self._passes(units, max_tokens, spare=last):
            if len(asked.rows):
                values = _taken(asked, pick)
                found = found or [np.zeros((places, *v.shape[1:]), v.dtype) for v in values]
                for array, value in zip(found, values, strict=True):
                    array[asked.into - first] = value
            known, belong = asked.copies - first
            for array in found:
                array[belong] = array[known]
            done += asked.requests
            if progress is not None and asked.requests and done < total:
                progress(done)
        if progress is not None:
            progress(total)
        return tuple(array[: last - first] for array in found) or pick.nothing

    def _passes(self, units: Sequence[Unit], max_tokens: int, spare: int) -> Iterator[Asked]:
        if self.packs:
            return packed_passes(self.models, units, max_tokens, spare)  # type: ignore[arg-type]
        return whole_passes(self.models, units, max_tokens, self.pad)


def _taken(asked: Asked, pick: Pick) -> list[npt.NDArray[Any]]:
    """Results of a pass's targets (M, …); never all of the vocabulary's at once."""
    states = asked.states
    device = states[0].values.device
    rows, targets = (torch.from_numpy(ids).to(device) for ids in (asked.rows, asked.targets))
    count = len(states[0].values)
    most = max(1, _SLICE_NUMBERS // max(each.vocabulary for each in states))
    # Equally many at a time: a few that are left over would cost as much as many.
    step = math.ceil(count / math.ceil(count / most))
    parts = []
    for start in range(0, count, step):
        log_probs = average([each.log_probs(start, start + step) for each in states])
        own = slice(*np.searchsorted(asked.rows, [start, start + step]).tolist())
        parts.append(pick.take(log_probs, rows[own] - start, targets[own]))
    return [torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True)]
