"""Heartbeats: a rank that froze or lost its machine ends all ranks, with a line that names it.

Each rank counts up a key in the run's store every few seconds. Rank 0 watches all ranks, the others
watch rank 0, and whoever finds one silent writes the reason where all of them read it. A process
that waits inside a collective cannot be interrupted, so the watching thread ends it.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined, unused-ignore]

_REASON = "reason to stop"
_DONE = "done"


class Watchdog:
    """The heartbeat of one rank, and its eye on others.

    Silence is counted in own beats, not in time: after a suspended machine wakes up, or a stopped
    job goes on, nobody takes the pause for the death of another.

    Args:
        store: a connection of its own to the store that all ranks share.
        rank: this rank.
        size: all ranks.
        heartbeat: seconds of silence after which a rank counts as dead.
        holder: who keeps the store, for the message when it does not answer.
        on_death: called from a thread with the reason; it ends the process.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        heartbeat: float,
        holder: str,
        on_death: Callable[[str], None],
    ) -> None:
        self._store = store
        self._rank = rank
        self._watched = [r for r in range(size) if r != rank] if rank == 0 else [0]
        self._heartbeat = heartbeat
        self.interval = min(2.0, heartbeat / 5)
        self._patience = round(heartbeat / self.interval)
        self._holder = holder
        self._on_death = on_death
        self._stopped = threading.Event()
        self._beats = 0
        self._threads = [
            threading.Thread(target=self._beat_and_watch, name="heartbeat", daemon=True),
            threading.Thread(target=self._watch_the_store, name="heartbeat-store", daemon=True),
        ]

    def start(self) -> None:
        """Begin; all ranks must have called `announce` before any of them starts."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End without a word, as a rank does that is about to stop by itself."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=self.interval)

    def finish(self) -> None:
        """End well: the others no longer wait for this rank's heartbeat."""
        self.stop()
        self._store.set(_beat(self._rank), _DONE)

    def _beat_and_watch(self) -> None:
        last: list[bytes] = [b""] * len(self._watched)
        silent = [0] * len(self._watched)
        try:
            while not self._stopped.wait(self.interval):
                self._beats += 1
                self._store.set(_beat(self._rank), str(self._beats))
                reason = read_reason(self._store)
                if reason is not None:
                    self._die(reason)
                    return
                now = self._store.multi_get([_beat(r) for r in self._watched])
                for i, rank in enumerate(self._watched):
                    silent[i] = silent[i] + 1 if now[i] == last[i] != _DONE.encode() else 0
                    if silent[i] >= self._patience:
                        self._die(self._found_silent(rank))
                        return
                last = now
        except Exception:
            # Whatever the store answers with, the cause is the same: its process has gone.
            self._die(f"{self._holder} died or cannot be reached any more")

    def _watch_the_store(self) -> None:
        # A store whose process is frozen does not answer at all, not even with an error.
        seen, silent = -1, 0
        while silent <= self._patience:
            if self._stopped.wait(self.interval):
                return
            silent = silent + 1 if self._beats == seen else 0
            seen = self._beats
        self._die(f"{self._holder} has not answered for {self._heartbeat:g} s")

    def _found_silent(self, rank: int) -> str:
        where = self._store.get(_place(rank)).decode()
        reason = (
            f"rank {rank} has not answered for {self._heartbeat:g} s ({where}): "
            "it is frozen, or its machine is lost"
        )
        write_reason(self._store, reason)
        return reason

    def _die(self, reason: str) -> None:
        if not self._stopped.is_set():
            self._on_death(reason)


def announce(store: Store, rank: int) -> None:
    """Say that this rank exists, and where."""
    store.set(_beat(rank), "0")
    store.set(_place(rank), f"host {socket.gethostname()}, process {os.getpid()}")


def missing(store: Store, size: int) -> list[int]:
    """The ranks that have not announced themselves yet."""
    if store.check([_place(r) for r in range(size)]):
        return []
    return [r for r in range(size) if not store.check([_place(r)])]


def write_reason(store: Store, reason: str) -> None:
    """Make every rank stop; the first reason stands."""
    store.compare_set(_REASON, "", reason)


def read_reason(store: Store) -> str | None:
    """Why every rank has to stop, or None."""
    return store.get(_REASON).decode() if store.check([_REASON]) else None


def all_done(store: Store, size: int) -> bool:
    """Whether every rank has finished."""
    return all(beat == _DONE.encode() for beat in store.multi_get([_beat(r) for r in range(size)]))


_LOST = re.compile(r"gloo|NCCL|ProcessGroup|TCPStore|Connection (closed|reset|refused)|Broken pipe")


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone, which is then the one to name."""
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _place(rank: int) -> str:
    return f"place/{rank}"
