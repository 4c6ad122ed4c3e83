"""Free running: ranks call layers of experts at their own pace, and compute for each other.

In training all ranks of an exchange group run the same layers at the same time. In generation they
do not: ranks decode different sentences, take different numbers of steps, and one may have no batch
at all. Inside `free_running` every exchange is a *round* of the group. In a round each rank says
which layer it asks for, with how many rows for which expert, or that it is done; then rows travel
to the owners of their experts, and results travel back. Ranks may ask for different layers of
different models in one round. A rank that is done keeps taking part until all are, so every rank
takes part in as many rounds, however many layers each has called. Nobody waits for another's step
of decoding, and no dummy batch is computed.

An owner computes the rows of each rank apart: products of the same shapes as in one process. So no
result depends on what other ranks ask for at the same time; for widths that keep rows aligned in
memory (multiples of 32) all are those of one process to the last bit.

Axes: N rows, D width, E experts, Q ranks that take part in a round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fairseq_lite.parallel.experts import ExpertLayout
from fairseq_lite.parallel.groups import Group
from fairseq_lite.parallel.world import World

# What a rank tells each other one in a round: these, then the rows for each of its experts.
_FIELDS = 4  # layer, type of the numbers, width of a row, type that autocast computes in
_DONE = -1  # in place of the layer
_NO_CAST = -1
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Exchanging(Protocol):
    """An exchange of rows, `moe.exchange.Exchange`: it asks `rounds` wherever there are some."""

    layout: ExpertLayout
    group: Group
    rounds: Rounds | None


class ExpertHost(nn.Module):
    """A module whose call computes rows of this rank's own experts; other ranks send it theirs.

    Attributes:
        exchange: the way there.
    """

    exchange: Exchanging

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Compute rows (N, D), sorted by expert, `counts` of each; there may be none."""
        raise NotImplementedError


@contextmanager
def free_running(models: Sequence[nn.Module], world: World) -> Iterator[None]:
    """Inside, every rank may call any part of `models`, any number of times, without the others.

    Entered and left by every rank; leaving waits until all ranks leave. Inside, nothing else may be
    exchanged between ranks by this thread. For evaluation only: gradients do not travel. Models
    without experts, or with all of them on every rank, are as outside.

    A rank that leaves with an error serves nobody any more; the watchdog then ends the others.

    Args:
        models: those that are called inside, the same on every rank.
        world: the ranks.
    """
    found = {id(m): m for model in models for m in model.modules() if isinstance(m, ExpertHost)}
    # Those of a group of one need nobody; those that run freely already are served there.
    hosts = [
        host
        for host in found.values()
        if host.exchange.group.size > 1 and host.exchange.rounds is None
    ]
    if not hosts:
        yield
        return
    rounds = Rounds(hosts, _meeting(hosts, world), world.device)
    for host in hosts:
        host.exchange.rounds = rounds
    try:
        yield
        rounds.serve()
    finally:
        for host in hosts:
            host.exchange.rounds = None


def _meeting(hosts: Sequence[ExpertHost], world: World) -> Group:
    """The ranks that must take part in every round: whole exchange groups of every layer.

    Models of an ensemble may have exchange groups of different sizes. A rank that waited in one of
    them for a rank that waits in another would wait for ever.
    """
    size = math.lcm(*(host.exchange.layout.group_size for host in hosts))
    return world.split(tuple(tuple(range(i, i + size)) for i in range(0, world.size, size)))


@dataclass(frozen=True)
class _Wish:
    """What a rank asks for in a round.

    Attributes:
        layer: its number.
        dtype: of the rows.
        width: D.
        cast: what autocast computes in at that rank; None where it is off.
    """

    layer: int
    dtype: torch.dtype
    width: int
    cast: torch.dtype | None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def fields(self) -> list[int]:
        """As numbers."""
        cast = _NO_CAST if self.cast is None else _TYPES.index(self.cast)
        return [self.layer, _TYPES.index(self.dtype), self.width, cast]

    @staticmethod
    def of(fields: Sequence[int]) -> _Wish | None:
        """From numbers; None for a rank that is done."""
        layer, dtype, width, cast = fields
        if layer == _DONE:
            return None
        return _Wish(layer, _TYPES[dtype], width, None if cast == _NO_CAST else _TYPES[cast])


class Rounds:
    """The rounds of the ranks of one group.

    Args:
        hosts: the layers that can be asked for, in the same order on every rank.
        group: who takes part.
        device: where this rank computes.
    """

    def __init__(self, hosts: Sequence[ExpertHost], group: Group, device: torch.device) -> None:
        self._hosts = list(hosts)
        self._numbers = {id(host.exchange): n for n, host in enumerate(hosts)}
        self._group = group
        self._device = device
        # Of every layer, where the ranks that exchange with this one are among those of the round.
        self._places = [
            [group.ranks.index(rank) for rank in host.exchange.group.ranks] for host in hosts
        ]
        self._room = max(max(host.exchange.layout.counts()) for host in hosts)
        self._results: dict[_Wish, tuple[torch.dtype, int]] = {}

    def ask(self, exchange: Exchanging, rows: Tensor, counts: Tensor) -> Tensor:
        """Have rows computed; one round.

        Args:
            exchange: the layer's.
            rows: (N, D), sorted by expert.
            counts: (E,) int64 on the CPU.

        Returns:
            (N, D) in the order of `rows`.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients do not travel between ranks that run freely: call the model under "
                "torch.no_grad() or torch.inference_mode()"
            )
        wish = _Wish(self._numbers[id(exchange)], rows.dtype, rows.size(-1), _cast(self._device))
        dtype, width = self._result(wish, rows)
        back = self._round(wish, rows, counts, width * dtype.itemsize)
        assert back is not None
        return back.view(dtype).view(len(rows), width)

    def serve(self) -> None:
        """Take part in rounds without asking, until nobody asks any more."""
        with torch.no_grad():
            while self._round(None) is not None:
                pass

    def _result(self, wish: _Wish, rows: Tensor) -> tuple[torch.dtype, int]:
        """Type and width of what a layer makes of such rows: it is asked here, without any."""
        if wish not in self._results:
            host = self._hosts[wish.layer]
            out = host(rows[:0], [0] * len(_owned(host)))
            self._results[wish] = out.dtype, out.size(-1)
        return self._results[wish]

    def _round(
        self,
        wish: _Wish | None,
        rows: Tensor | None = None,
        counts: Tensor | None = None,
        result_bytes: int = 0,
    ) -> Tensor | None:
        """One round.

        Args:
            wish: None: this rank is done.
            rows: (N, D).
            counts: (E,).
            result_bytes: of a row of the result.

        Returns:
            The bytes of the results; None when all ranks are done.
        """
        table = torch.full((self._group.size, _FIELDS + self._room), _DONE, dtype=torch.int64)
        table[:, _FIELDS:] = 0
        send = [0] * self._group.size  # rows for each rank
        sent = torch.empty(0, dtype=torch.uint8, device=self._device)
        if wish is not None:
            assert rows is not None and counts is not None
            table[:, :_FIELDS] = torch.tensor(wish.fields())
            sizes = self._hosts[wish.layer].exchange.layout.counts()
            parts = torch.split(counts, sizes)
            for place, part in zip(self._places[wish.layer], parts, strict=True):
                table[place, _FIELDS : _FIELDS + len(part)] = part
                send[place] = int(part.sum())
            sent = _bytes(rows)
        told: list[list[int]] = self._group.all_to_all_equal(table.to(self._device)).tolist()
        wishes = [_Wish.of(line[:_FIELDS]) for line in told]
        if all(each is None for each in wishes):
            return None
        row_bytes = 0 if wish is None else wish.row_bytes
        receive = [
            0 if each is None else sum(line[_FIELDS:]) * each.row_bytes
            for each, line in zip(wishes, told, strict=True)
        ]
        here = self._group.all_to_all(sent, [n * row_bytes for n in send], receive)
        made = [
            self._compute(each, line[_FIELDS:], part)
            for each, line, part in zip(wishes, told, torch.split(here, receive), strict=True)
        ]
        return self._group.all_to_all(
            torch.cat(made), [part.numel() for part in made], [n * result_bytes for n in send]
        )

    def _compute(self, wish: _Wish | None, counts: list[int], received: Tensor) -> Tensor:
        """What one rank asks for: bytes to bytes."""
        if wish is None or not received.numel():
            return received
        host = self._hosts[wish.layer]
        # A copy: numbers of other types may lie before these, and not end where these may begin.
        rows = received.clone().view(wish.dtype).view(-1, wish.width)
        # As at the rank that asks: this one may be done, and out of the context of its own calls.
        with torch.autocast(self._device.type, dtype=wish.cast, enabled=wish.cast is not None):
            return _bytes(host(rows, counts[: len(_owned(host))]))


def _owned(host: ExpertHost) -> range:
    return host.exchange.layout.owned(host.exchange.group.place)


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8).flatten()


def _cast(device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
