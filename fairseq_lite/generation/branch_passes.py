"""Units through models, pass by pass: what a plan says, or every continuation behind its context.

Axes: W tokens after which something is asked, M targets that are asked for there, V vocabulary,
D width, C results that are known already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq_lite.data.batching import batch_by_size
from fairseq_lite.data.collate import pad_sequences
from fairseq_lite.data.indexed import Ids
from fairseq_lite.generation.branch_plan import Row, Unit, plan
from fairseq_lite.generation.packed import Packed, PackedReader, pack, pack_stem
from fairseq_lite.models.api import Model
from fairseq_lite.models.transformer_lm import TransformerLanguageModel

# A stem is read by itself where that saves so many tokens: about what its own pass, and that of
# what is then read behind it, cost besides their tokens. On a CPU a pass costs as much as 20
# tokens, whatever the size of the model (12 layers of 768, V=50,000: 33 ms, and 2.2 ms a token);
# elsewhere hundreds of tokens are computed in the time that it takes to start a pass's kernels.
_WORTH_ON_CPU = 64
_WORTH_ELSEWHERE = 1024

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class States:
    """What one model says of tokens, before it is compared with its vocabulary.

    Attributes:
        model: the model.
        values: (W, D).
        final: whether they are log-probabilities (W, V) already.
    """

    model: Model
    values: Tensor
    final: bool = False

    @property
    def vocabulary(self) -> int:
        """V."""
        weight = self.model.output_weight
        return self.values.size(1) if weight is None else weight.size(0)

    def log_probs(self, first: int, last: int) -> Tensor:
        """(last - first, V), in fp32."""
        values = self.values[first:last]
        if self.final:
            return values
        logits = self.model.output_layer(values[None])
        return self.model.get_normalized_probs((logits, {}), log_probs=True)[0]


class Asked(NamedTuple):
    """What a pass has found out.

    Attributes:
        states: of each model, of W tokens.
        rows: (M,) which of them predicts a target; in order.
        targets: (M,).
        into: (M,) the places of their results.
        copies: (2, C) where results are by then, and where they belong, too.
        requests: how many are answered with this.
    """

    states: list[States]
    rows: Ids
    targets: Ids
    into: Ids
    copies: Ids
    requests: int


class _Waiting:
    """Which units are not answered yet."""

    def __init__(self, units: Sequence[Unit], numbers: Sequence[int]) -> None:
        self._units = units
        self._missing = Counter(numbers)

    def answered(self, numbers: Sequence[int]) -> int:
        """How many requests are, now that these passed by."""
        self._missing.subtract(numbers)
        return sum(self._units[n].requests for n in set(numbers) if not self._missing[n])


# -- packed ---------------------------------------------------------------------------------------


def packed_passes(
    models: Sequence[TransformerLanguageModel], units: Sequence[Unit], max_tokens: int, spare: int
) -> Iterator[Asked]:
    """Every stem and every context once.

    Args:
        models: each `can_cache`.
        units: in order.
        max_tokens: of a pass, besides a stem.
        spare: the place of results from which on there is room for those of a stem's tokens.
    """
    reading = _Reading(models)
    worth = _WORTH_ON_CPU if reading.device.type == "cpu" else _WORTH_ELSEWHERE
    steps = plan(units, max_tokens=max_tokens, worth=worth)
    reading.make_room(max((step.room for step in steps), default=0))
    waiting = _Waiting(units, [row.unit for step in steps for row in step.rows])
    context_scores = any(unit.context_scores for unit in units)
    for step in steps:
        reading.forget(step.keep)
        if len(step.stem):
            scored = reading.stem(step.stem, spare if context_scores else None)
            if scored is not None:
                yield scored
        for batch in step.batches:
            asked = reading.rows(batch, spare)
            yield asked._replace(requests=waiting.answered([row.unit for row in batch]))


class _Reading:
    """Models that read the steps of a plan, in its order.

    Args:
        models: each gets a reader.
    """

    def __init__(self, models: Sequence[TransformerLanguageModel]) -> None:
        self.models = models
        self.readers = [PackedReader(model.decoder) for model in models]
        weight = next(models[0].parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.width = max(model.decoder.cfg.embed_dim for model in models)
        # By the number of tokens remembered, each model's state (1, D) of the last of them: it
        # predicts the first token behind them.
        self.ends: dict[int, list[Tensor]] = {}

    @property
    def length(self) -> int:
        """How many tokens are remembered."""
        return self.readers[0].length

    def make_room(self, room: int) -> None:
        """Expect at most so many tokens, those of a row included."""
        for reader in self.readers:
            reader.room = room

    def forget(self, length: int) -> None:
        """Remember the first `length` tokens only."""
        for reader in self.readers:
            reader.length = length

    def stem(self, stem: Ids, spare: int | None) -> Asked | None:
        """Read on to the end of a stem.

        Args:
            stem: all of it.
            spare: the place of the result of the first token behind the start symbol, which those
                of others follow; None: they are not asked for.
        """
        read, last = self.length, len(stem) - 1
        at = np.arange(max(read - 1, 0), last) if spare is not None else _NONE
        packed = pack_stem(stem, read, device=self.device, dtype=self.dtype)
        found = self._states(np.append(at, last) - read, packed, keep=True)
        self.ends[len(stem)] = [states[-1:] for states in found]
        if spare is None or not len(at):
            return None
        return self._asked([states[:-1] for states in found], at, stem[at + 1], spare + at)

    def rows(self, rows: Sequence[Row], spare: int) -> Asked:
        """Read rows that begin with what is remembered.

        Args:
            rows: as they fit in a pass.
            spare: where results of what is remembered begin, if they are asked for.
        """
        read, first = self.length, 0
        at, targets, into, known = [_NONE], [_NONE], [_NONE], [np.empty((2, 0), dtype=np.int64)]
        for row in rows:
            own = row.at - read
            new = own >= -1
            at.append(np.where(own < 0, -1, own + first)[new])
            targets.append(row.targets[new])
            into.append(row.into[new])
            known.append(np.stack([spare + row.at, row.into])[:, ~new])
            first += row.size - read
        places = np.concatenate(at)
        wanted = np.unique(places)
        packed = None
        if len(wanted) and wanted[-1] >= 0:
            packed = pack(rows, read, width=self.width, device=self.device, dtype=self.dtype)
        found = self._states(wanted, packed)
        asked = self._asked(found, places, np.concatenate(targets), np.concatenate(into))
        return asked._replace(copies=np.concatenate(known, axis=1))

    def _states(self, wanted: Ids, packed: Packed | None, *, keep: bool = False) -> list[Tensor]:
        """Each model's states of tokens.

        Args:
            wanted: their numbers, which rise; -1 is the last that is remembered.
            packed: what the others are of; None where there are none.
            keep: see `PackedReader.read`.
        """
        behind = wanted[:1] == -1
        own = torch.from_numpy(wanted[wanted >= 0]).to(self.device)
        ends = self.ends[self.length] if behind.any() else [None] * len(self.readers)
        found = []
        for reader, end in zip(self.readers, ends, strict=True):
            parts = [] if end is None else [end]
            if packed is not None:
                parts.append(reader.read(packed, own, keep=keep))
            found.append(torch.cat(parts) if parts else torch.empty(0))
        return found

    def _asked(self, states: list[Tensor], places: Ids, targets: Ids, into: Ids) -> Asked:
        """Targets in the order of the states that predict them."""
        _, rows = np.unique(places, return_inverse=True)
        order = np.argsort(rows, kind="stable")
        values = [States(m, s) for m, s in zip(self.models, states, strict=True)]
        return Asked(
            values, rows[order], targets[order], into[order], np.empty((2, 0), np.int64), 0
        )


# -- whole ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequence:
    """A continuation behind its context, as a model reads it.

    Attributes:
        unit: whose it is: a number in the list of units.
        tokens: (T,).
        at: (M,) after which token something is asked.
        targets: (M,).
        into: (M,).
    """

    unit: int
    tokens: Ids
    at: Ids
    targets: Ids
    into: Ids


def _sequences(number: int, unit: Unit) -> Iterator[_Sequence]:
    """One for each continuation; the first that is needed has what is asked of the context, too."""
    last, into = len(unit.prefix) - 1, unit.first + unit.in_context
    context = np.arange(unit.in_context)
    for continuation in unit.continuations or (_NONE,):
        count = len(continuation)
        if count or len(context):
            yield _Sequence(
                number,
                np.concatenate([unit.prefix, continuation])[:-1],
                np.concatenate([context, last + np.arange(count)]),
                np.concatenate([unit.prefix[1 + context], continuation]),
                np.concatenate([unit.first + context, into + np.arange(count)]),
            )
            context = context[:0]
        into += count


def whole_passes(
    models: Sequence[Model], units: Sequence[Unit], max_tokens: int, pad: int
) -> Iterator[Asked]:
    """Every continuation behind its whole context, by the models' own forward passes.

    Args:
        models: language models.
        units: in order.
        max_tokens: of a pass, padding included.
        pad: the padding symbol.
    """
    sequences = [each for n, unit in enumerate(units) for each in _sequences(n, unit)]
    waiting = _Waiting(units, [each.unit for each in sequences])
    sizes = np.array([len(each.tokens) for each in sequences], dtype=np.int64)
    order = np.argsort(sizes, kind="stable")
    for numbers in batch_by_size(order, sizes[order], max_tokens=max_tokens):
        batch = [sequences[n] for n in numbers.tolist()]
        asked = _read_whole(models, batch, pad)
        yield asked._replace(requests=waiting.answered([each.unit for each in batch]))


def _read_whole(models: Sequence[Model], batch: Sequence[_Sequence], pad: int) -> Asked:
    device = next(models[0].parameters()).device
    sizes = np.array([len(each.tokens) for each in batch], dtype=np.int64)
    tokens = pad_sequences(np.concatenate([each.tokens for each in batch]), sizes, pad)
    width = tokens.shape[1]
    places = np.concatenate([row * width + each.at for row, each in enumerate(batch)])
    wanted = torch.from_numpy(places).to(device)
    inputs = {
        "src_tokens": torch.from_numpy(tokens).to(device),
        "src_lengths": torch.from_numpy(sizes).to(device),
    }
    states = []
    for model in models:
        final = model.output_weight is None
        out = model(**inputs) if final else model(**inputs, features_only=True)
        values = model.get_normalized_probs(out, log_probs=True) if final else out[0]
        states.append(States(model, values.flatten(0, 1)[wanted], final))
    return Asked(
        states,
        np.arange(len(places)),
        np.concatenate([each.targets for each in batch]),
        np.concatenate([each.into for each in batch]),
        np.empty((2, 0), dtype=np.int64),
        0,
    )
