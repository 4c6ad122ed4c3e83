"""Reading with a causal model of Hugging Face's, of any architecture.

What sequences begin with in common is read once, and its keys and values serve all of them; a
context is read once for all its continuations. Sequences of a batch are equally long, and
continuations are padded behind their last token only. No token ever has padding in front of it, so
that positions, sliding windows and distances are right in every architecture, and no result depends
on what else is in a batch. A model that remembers otherwise (a state space, a cache of its own)
reads every continuation behind its whole context.

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
class Reading:
    """Sequences that were read together.

    Attributes:
        numbers: which.
        length: of each.
        following: (n, V) log-probabilities of what could follow.
        cache: keys and values of all their tokens; None where the model has no such thing.
        scores: (n, T - 1) log-probabilities of their tokens from the second on, where asked for.
    """

    numbers: list[int]
    length: int
    following: Tensor
    cache: Any
    scores: Floats | None


@dataclass(frozen=True)
class _Read:
    """Rows as far as they have been read; of none at the root of all."""

    following: Tensor | None = None
    cache: Any = None
    scores: Floats | None = None


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
        # Most architectures can leave out the logits that nobody wants.
        self._chooses = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.caches = self._remembers()

    @torch.inference_mode()
    def _remembers(self) -> bool:
        """Whether the model remembers keys and values, which can be copied from row to row."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        ids = torch.ones(1, 2, dtype=torch.long, device=self.device)
        out = self.model(input_ids=ids, attention_mask=ids, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        known = (DynamicLayer, DynamicSlidingWindowLayer)
        return type(cache) is DynamicCache and all(type(layer) in known for layer in cache.layers)

    # -- sequences --------------------------------------------------------------------------------

    def read(self, sequences: Sequence[Ids], *, scores: bool = False) -> Iterator[Reading]:
        """Read sequences, in an order of its own.

        Args:
            sequences: each of one token at least.
            scores: give the log-probabilities of their tokens as well.
        """
        everything = tuple(range(len(sequences)))
        tree = grow(sequences) if self.caches else Stem(0, everything, (), 0)
        yield from self._below(tree, sequences, _Read(), scores)

    def _below(
        self, stem: Stem, sequences: Sequence[Ids], read: _Read, scores: bool
    ) -> Iterator[Reading]:
        """Read what goes on from a stem, which was read as one row."""
        for numbers in batches(
            stem.leaves,
            sequences,
            stem.depth,
            max_tokens=self.limits.tokens,
            max_cells=self.limits.cells,
            max_rows=self.limits.rows,
        ):
            rows = np.stack([sequences[i] for i in numbers])
            found = self._go_on(rows[:, stem.depth :], read, scores)
            assert found.following is not None
            yield Reading(numbers, rows.shape[1], found.following, found.cache, found.scores)
        for branch in stem.branches:
            row = sequences[branch.first][None, stem.depth : branch.depth]
            yield from self._below(branch, sequences, self._go_on(row, read, scores), scores)

    def _go_on(self, rows: npt.NDArray[np.int64], read: _Read, scores: bool) -> _Read:
        """Read rows (n, T) behind one row, or behind nothing; in pieces, for their logits' sake."""
        ids = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)
        n, length = ids.shape
        cache = _selected(read.cache, ids.new_zeros(n))
        following = None if read.following is None else read.following.expand(n, -1)
        found: list[Tensor] = []
        size = length
        if self.caches and (scores or not self._chooses):
            size = max(1, _LOGITS // (n * self._vocabulary))
        for start in range(0, length, size):
            piece = ids[:, start : start + size]
            logits, cache = self._forward(piece, cache, keep=0 if scores else 1)
            if scores:
                if following is not None:
                    found.append(following.gather(1, piece[:, :1]))
                found.append(_picked(logits[:, :-1], piece[:, 1:])[0])
            following = logits[:, -1].log_softmax(-1)
        if not scores:
            return _Read(following, cache)
        own = torch.cat(found, 1).float().cpu().numpy()
        before = (
            []
            if read.scores is None
            else [np.broadcast_to(read.scores, (n, *read.scores.shape[1:]))]
        )
        return _Read(following, cache, np.concatenate([*before, own], axis=1))

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
        rows = torch.tensor([row for row, _ in asked], device=self.device)
        first = torch.tensor([[int(ids[0])] for _, ids in asked], device=self.device)
        following = reading.following
        picked = following[rows].gather(1, first)[:, 0]
        best = (picked >= following.amax(1)[rows]).tolist()
        found = [
            (np.array([x], dtype=np.float32), g) for x, g in zip(picked.tolist(), best, strict=True)
        ]
        longer = [i for i, (_, ids) in enumerate(asked) if len(ids) > 1]
        longer.sort(key=lambda i: len(asked[i][1]), reverse=True)
        while longer:
            width = len(asked[longer[0]][1]) - 1
            count = self._rows_of(width, reading.length)
            part, longer = longer[:count], longer[count:]
            scores, greedy = self._rest(reading, sequences, [asked[i] for i in part])
            for k, i in enumerate(part):
                n = len(asked[i][1]) - 1
                known, likeliest = found[i]
                found[i] = (
                    np.concatenate([known, scores[k, :n]]),
                    likeliest and bool(greedy[k, :n].all()),
                )
        return found

    def _rows_of(self, width: int, length: int) -> int:
        """How many continuations of `width` further tokens are read at a time."""
        read = width if self.caches else length + width
        return max(
            1,
            min(
                self.limits.tokens // read,
                self.limits.cells // (length + width),
                _LOGITS // (width * self._vocabulary),
            ),
        )

    def _rest(
        self, reading: Reading, sequences: Sequence[Ids], asked: Sequence[tuple[int, Ids]]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Scores of the tokens behind the first ones, the longest continuation first (n, T)."""
        width = len(asked[0][1])
        padded = np.zeros((len(asked), width), dtype=np.int64)
        for k, (_, ids) in enumerate(asked):
            padded[k, : len(ids)] = ids
        tails = torch.from_numpy(padded).to(self.device)
        if self.caches:
            rows = torch.tensor([row for row, _ in asked], device=self.device)
            logits, _ = self._forward(tails[:, :-1], _selected(reading.cache, rows))
        else:
            heads = np.stack([sequences[reading.numbers[row]] for row, _ in asked])
            whole = torch.cat([torch.from_numpy(heads).to(self.device), tails[:, :-1]], 1)
            logits, _ = self._forward(whole, None, keep=width - 1)
        scores, greedy = _picked(logits[:, -(width - 1) :], tails[:, 1:])
        return scores.float().cpu().numpy(), greedy.cpu().numpy()

    # -- the model --------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, cache: Any, *, keep: int = 0) -> tuple[Tensor, Any]:
        """Logits of the last `keep` places at least (0: of all), and what is remembered."""
        known = 0 if cache is None else cache.get_seq_length()
        # Nothing is padding, not even a start symbol that the tokenizer pads with, too.
        mask = ids.new_ones(ids.size(0), known + ids.size(1))
        more: dict[str, Any] = {"use_cache": self.caches}
        if self.caches:
            more["past_key_values"] = cache
        if self._chooses:
            more["logits_to_keep"] = keep
        out = self.model(input_ids=ids, attention_mask=mask, **more)
        logits = out.logits if out.logits.dtype == torch.float64 else out.logits.float()
        return logits, out.past_key_values if self.caches else None

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.size(0))


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
