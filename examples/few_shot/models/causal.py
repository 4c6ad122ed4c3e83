"""Reading with a causal model of Hugging Face's, of any architecture.

What sequences begin with in common is read once, and its keys and values serve all of them; a
context is read once for all its continuations. Where a model goes by positions that it is told,
sequences of a batch may differ in length: what pads the shorter ones stands behind them and is
hidden from what is read later. Where it goes by distances or windows in what it remembers, they are
equally long. A model that remembers otherwise (a state space, a cache of its own) reads every
continuation behind its whole context. So no result depends on what else is in a batch.

Axes: n sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.few_shot.models.api import Ids
from examples.few_shot.models.stems import Stem, batches, grow

Floats = npt.NDArray[np.float32]

# Logits that exist at a time, in numbers.
_LOGITS = 1 << 27

# Tokens that can be read in the time that a pass takes however few it reads: it waits for the
# weights, and a GPU for orders.
_PASS_COSTS = {"cpu": 24, "cuda": 2000}

# Rotary embeddings that change with the longest text read so far.
_MOVING = ("dynamic", "longrope")


@dataclass(frozen=True)
class Limits:
    """How much is read at a time.

    Attributes:
        tokens: that a pass reads.
        rows: sequences of a pass; None: any number.
    """

    tokens: int = 4096
    rows: int | None = None

    @property
    def cells(self) -> int:
        """Tokens whose keys and values are held at a time; those of a stem count in every row."""
        return 4 * self.tokens


@dataclass(frozen=True)
class _Known:
    """Rows as far as they have been read; none at the root of all.

    Attributes:
        lengths: (n,) of each row.
        mask: (n, T) 1 where a remembered token stands, 0 where padding does.
        following: (n, V) log-probabilities of what could follow.
        cache: keys and values of all T; None where the model has no such thing.
        scores: of each row those of its tokens from the second on, where asked for.
    """

    lengths: Tensor
    mask: Tensor
    following: Tensor
    cache: Any
    scores: list[Floats] | None


@dataclass(frozen=True)
class Reading:
    """Sequences that were read together.

    Attributes:
        numbers: which.
        known: what is known of them, a row each.
    """

    numbers: list[int]
    known: _Known


class CausalReader:
    """Reads sequences with a model.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        limits: how much at a time.
    """

    def __init__(self, model: Any, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.device = model.device
        parameters = inspect.signature(model.forward).parameters
        # Most architectures can leave out the logits that nobody wants.
        self._chooses = "logits_to_keep" in parameters
        self.caches, plain = self._remembers()
        self.pads = plain and "position_ids" in parameters and not _goes_by_distance(model.config)

    @torch.inference_mode()
    def _remembers(self) -> tuple[bool, bool]:
        """Whether keys and values are remembered in rows, and whether in all layers all of them."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        ids = torch.ones(1, 2, dtype=torch.long, device=self.device)
        out = self.model(input_ids=ids, attention_mask=ids, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        if type(cache) is not DynamicCache:
            return False, False
        kinds = {type(layer) for layer in cache.layers}
        return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}, kinds == {DynamicLayer}

    # -- sequences --------------------------------------------------------------------------------

    def read(self, sequences: Sequence[Ids], *, scores: bool = False) -> Iterator[Reading]:
        """Read sequences, in an order of its own.

        Args:
            sequences: each of one token at least.
            scores: give the log-probabilities of their tokens as well.
        """
        everything = tuple(range(len(sequences)))
        tree = Stem(0, everything, (), 0)
        if self.caches:
            tree = grow(sequences, saves=self._pass_costs)
        yield from self._below(tree, sequences, None, scores)

    def _below(
        self, stem: Stem, sequences: Sequence[Ids], known: _Known | None, scores: bool
    ) -> Iterator[Reading]:
        """Read what goes on from a stem, of which one row is known."""
        for numbers in batches(
            stem.leaves,
            list(map(len, sequences)),
            stem.depth,
            max_tokens=self.limits.tokens,
            max_cells=self.limits.cells,
            max_rows=self.limits.rows,
            pass_costs=self._pass_costs if self.pads else None,
        ):
            rows = [sequences[i][stem.depth :] for i in numbers]
            yield Reading(numbers, self._go_on(rows, known, scores))
        for branch in stem.branches:
            row = sequences[branch.first][stem.depth : branch.depth]
            yield from self._below(branch, sequences, self._go_on([row], known, scores), scores)

    def _go_on(self, rows: Sequence[Ids], known: _Known | None, scores: bool) -> _Known:
        """Read rows behind one row, or behind nothing; in pieces, for their logits' sake."""
        ids, sizes = self._padded(rows)
        n, length = ids.shape
        first = ids.new_zeros(n)
        lengths = first if known is None else known.lengths[first]
        mask = ids.new_zeros(n, 0) if known is None else known.mask[first]
        cache = None if known is None else _selected(known.cache, first)
        # What predicts the first token of the next piece.
        last = None if known is None else known.following[first]
        own = (torch.arange(length, device=self.device) < sizes[:, None]).to(mask.dtype)
        following: Tensor | None = None
        found: list[Tensor] = []
        for start, stop in self._pieces(sizes, scores):
            piece = ids[:, start:stop]
            mask = torch.cat([mask, own[:, start:stop]], 1)
            ending = ((sizes > start) & (sizes <= stop)).nonzero()[:, 0]
            ends, which = torch.unique(sizes[ending] - 1 - start, return_inverse=True)
            places = lengths[:, None] + torch.arange(start, stop, device=self.device)
            logits, cache = self._forward(piece, mask, places, cache, None if scores else ends)
            if scores:
                if last is not None:
                    found.append(last.gather(1, piece[:, :1]))
                found.append(_picked(logits[:, :-1], piece[:, 1:])[0])
                last = logits[:, -1].log_softmax(-1)
                which = ends[which]
            if following is None:
                following = logits.new_zeros(n, logits.size(-1))
            following[ending] = logits[ending, which].log_softmax(-1)
        assert following is not None, "a row has a token at least"
        joined = None
        if scores:
            # Of the first token of all there is no score.
            counts = (sizes - (1 if known is None else 0)).tolist()
            before = [] if known is None or known.scores is None else known.scores[:1]
            every = torch.cat(found, 1).float().cpu().numpy()
            joined = [
                np.concatenate([*before, row[:count]])
                for row, count in zip(every, counts, strict=True)
            ]
        return _Known(lengths + sizes, mask, following, cache, joined)

    def _padded(self, rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Rows with padding behind them (n, T), and the length of each (n,)."""
        sizes = [len(row) for row in rows]
        found = np.zeros((len(rows), max(sizes)), dtype=np.int64)
        for row, ids in zip(found, rows, strict=True):
            row[: len(ids)] = ids
        return torch.from_numpy(found).to(self.device), torch.tensor(sizes, device=self.device)

    def _pieces(self, sizes: Tensor, scores: bool) -> list[tuple[int, int]]:
        """From where to where rows are read at a time; without a cache all at once."""
        length = int(sizes.max())
        size = length
        few = self._chooses and not scores and int(sizes.min()) == length
        if self.caches and not few:
            size = max(1, _LOGITS // (len(sizes) * self._vocabulary))
        return [(start, min(start + size, length)) for start in range(0, length, size)]

    # -- continuations ----------------------------------------------------------------------------

    def go_on(
        self, reading: Reading, sequences: Sequence[Ids], asked: Sequence[tuple[int, Ids]]
    ) -> list[tuple[Floats, bool]]:
        """Score continuations of sequences that have been read.

        Args:
            reading: some of them.
            sequences: as they were given to `read`.
            asked: row of the reading and continuation, of one token at least.

        Returns:
            Log-probabilities of each continuation's tokens, and whether none could be likelier.
        """
        following = reading.known.following
        rows = torch.tensor([row for row, _ in asked], dtype=torch.long, device=self.device)
        first = torch.tensor([int(ids[0]) for _, ids in asked], device=self.device).long()
        picked = following[rows, first]
        best = (picked >= following.amax(1)[rows]).tolist()
        found = [
            (np.array([x], dtype=np.float32), g) for x, g in zip(picked.tolist(), best, strict=True)
        ]
        for part in self._parts(reading, [len(ids) - 1 for _, ids in asked]):
            scores, greedy = self._rest(reading, sequences, [asked[i] for i in part])
            for k, i in enumerate(part):
                n = len(asked[i][1]) - 1
                known, likeliest = found[i]
                found[i] = (
                    np.concatenate([known, scores[k, :n]]),
                    likeliest and bool(greedy[k, :n].all()),
                )
        return found

    def _parts(self, reading: Reading, further: Sequence[int]) -> Iterator[list[int]]:
        """Continuations with so many further tokens each, as many as are read at a time."""
        length = reading.known.mask.size(1)
        most = _LOGITS // (self._vocabulary * max(1, *further))
        yield from batches(
            [i for i, count in enumerate(further) if count],
            [length + count for count in further],
            length if self.caches else 0,
            max_tokens=self.limits.tokens,
            max_cells=self.limits.cells,
            max_rows=max(1, most),
            pass_costs=self._pass_costs,
        )

    def _rest(
        self, reading: Reading, sequences: Sequence[Ids], asked: Sequence[tuple[int, Ids]]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Scores of the tokens behind the first ones (n, T)."""
        tails, _ = self._padded([ids for _, ids in asked])
        targets, known = tails[:, 1:], reading.known
        width = targets.size(1)
        rows = torch.tensor([row for row, _ in asked], device=self.device)
        offsets = torch.arange(width, device=self.device)
        if self.caches:
            mask = torch.cat([known.mask[rows], torch.ones_like(targets)], 1)
            places = known.lengths[rows, None] + offsets
            cache = _selected(known.cache, rows)
            logits, _ = self._forward(tails[:, :-1], mask, places, cache, offsets)
        else:
            heads, _ = self._padded([sequences[reading.numbers[row]] for row, _ in asked])
            whole = torch.cat([heads, tails[:, :-1]], 1)
            places = torch.arange(whole.size(1), device=self.device)
            ends = places[-width:]
            logits, _ = self._forward(whole, torch.ones_like(whole), places, None, ends)
        scores, greedy = _picked(logits, targets)
        return scores.float().cpu().numpy(), greedy.cpu().numpy()

    # -- the model --------------------------------------------------------------------------------

    def _forward(
        self, ids: Tensor, mask: Tensor, places: Tensor, cache: Any, keep: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Logits, and what is remembered then.

        Args:
            ids: (n, T).
            mask: 1 for what is remembered and for `ids`, 0 for padding in front of them.
            places: (n, T) positions of `ids`.
            cache: what is remembered.
            keep: the places in `ids` whose logits are wanted; None: all.
        """
        more: dict[str, Any] = {"use_cache": self.caches}
        if self.caches:
            more["past_key_values"] = cache
        if self.pads:
            more["position_ids"] = places
        if keep is not None and self._chooses:
            # One place at least: no model expects to be asked for nothing.
            more["logits_to_keep"] = keep if len(keep) else 1
        out = self.model(input_ids=ids, attention_mask=mask, **more)
        logits = out.logits if out.logits.dtype == torch.float64 else out.logits.float()
        if keep is not None and not self._chooses:
            logits = logits[:, keep]
        return logits, out.past_key_values if self.caches else None

    @property
    def _pass_costs(self) -> int:
        return _PASS_COSTS.get(self.device.type, _PASS_COSTS["cuda"])

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.size(0))


def _goes_by_distance(config: Any) -> bool:
    """Whether attention goes by distances in what is remembered, or changes with its length."""
    config = config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rotary, *(each for each in rotary.values() if isinstance(each, dict))]
    moving = any(each.get("rope_type", each.get("type")) in _MOVING for each in kinds)
    return moving or bool(getattr(config, "alibi", False))


def _picked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets (n, T), and whether none is likelier."""
    own = logits.gather(-1, targets[..., None])[..., 0]
    return own - logits.logsumexp(-1), own >= logits.amax(-1)


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of these rows of another one, which stays as it is."""
    if cache is None:
        return None
    # Layers hold tensors that are replaced, never written into.
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(rows)
    return found
