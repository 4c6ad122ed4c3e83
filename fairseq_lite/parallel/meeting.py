"""How the ranks of one attempt find each other in a store, and nobody else.

A store may outlive the processes that met in it. torchrun keeps one over restarts, and its restart
count cannot tell attempts apart: a machine whose own worker failed counts one, the others do not.
So rank 0 opens a meeting of a name that is new, living ranks come to it, and rank 0 confirms each
process it has seen. What an earlier attempt left behind lies under other names, unconfirmed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined, unused-ignore]

from fairseq_lite.errors import DistributedError
from fairseq_lite.parallel import watchdog

_NAME = "flite/meeting"
_CALLED_OFF = "flite/called off"
_LONGEST_PAUSE = 0.5


def meet(store: Store, rank: int, size: int, *, place: str, seconds: float) -> str:
    """Wait until every rank is here.

    Args:
        store: what all ranks reach.
        rank: this rank.
        size: all ranks, at least two.
        place: the store's address, for messages.
        seconds: how long to wait.

    Returns:
        The name of the meeting, the same on every rank; `room` is where its members write.

    Raises:
        DistributedError: ranks did not come, the meeting was called off, or the store has gone.
    """
    try:
        return (_lead if rank == 0 else _join)(store, rank, size, place, seconds)
    except RuntimeError as e:  # whatever the store answers with; torch's errors all derive from it
        line = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DistributedError(
            f"rank {rank} lost contact with {place}, where the ranks meet ({line})"
        ) from e


def room(store: Store, name: str) -> Store:
    """The part of `store` that belongs to the meeting `name`."""
    return PrefixStore(f"flite/{name}", store)


def current(store: Store) -> Store | None:
    """The room of the meeting that was opened last; None before there is one."""
    return room(store, store.get(_NAME).decode()) if store.check([_NAME]) else None


def call_off(store: Store, reason: str) -> None:
    """Make every rank stop, those that have met and those that still wait."""
    store.set(_CALLED_OFF, reason)
    met = current(store)
    if met is not None:
        watchdog.write_reason(met, reason)


def _lead(store: Store, rank: int, size: int, place: str, seconds: float) -> str:
    """Rank 0: open a meeting, wait for the others, confirm who came."""
    name = uuid.uuid4().hex
    here = room(store, name)
    watchdog.announce(here, rank)
    store.set(_NAME, name)
    for _ in _patiently(store, seconds):
        if not watchdog.missing(here, size):
            others = range(1, size)
            for other, came in zip(others, here.multi_get([_who(r) for r in others]), strict=True):
                here.set(_confirmed(other), came.decode())
            return name
    raise DistributedError(_too_late(here, size, place, seconds))


def _join(store: Store, rank: int, size: int, place: str, seconds: float) -> str:
    """The others: come to the latest meeting, until rank 0 confirms this very process."""
    me, name = uuid.uuid4().hex, ""
    for _ in _patiently(store, seconds):
        latest = store.get(_NAME).decode() if store.check([_NAME]) else ""
        if latest != name:
            name = latest
            room(store, name).set(_who(rank), me)
            watchdog.announce(room(store, name), rank)
        if name and _confirmed_as(room(store, name), rank) == me:
            return name
    raise DistributedError(_too_late(room(store, name) if name else None, size, place, seconds))


def _confirmed_as(here: Store, rank: int) -> str | None:
    # It may be an earlier process of this rank, confirmed by a rank 0 that has gone, too.
    key = _confirmed(rank)
    return here.get(key).decode() if here.check([key]) else None


def _patiently(store: Store, seconds: float) -> Iterator[None]:
    """Yield now and then for so long, unless the meeting is called off."""
    end, pause = time.monotonic() + seconds, 0.01
    while time.monotonic() < end:
        yield
        if store.check([_CALLED_OFF]):
            raise DistributedError(store.get(_CALLED_OFF).decode())
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, 1.5 * pause)


def _too_late(here: Store | None, size: int, place: str, seconds: float) -> str:
    absent = [0] if here is None else watchdog.missing(here, size)
    if here is None or not absent:
        return f"rank 0 did not come to {place} within {seconds:g} s"
    names = ", ".join(map(str, absent[:8]))
    return (
        f"{size - len(absent)} of {size} ranks met at {place} within {seconds:g} s; "
        f"rank(s) {names} did not come"
    )


def _who(rank: int) -> str:
    return f"who/{rank}"


def _confirmed(rank: int) -> str:
    return f"confirmed/{rank}"
