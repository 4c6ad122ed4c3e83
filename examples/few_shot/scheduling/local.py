"""Jobs in processes of this machine, one after another or side by side."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from examples.few_shot.scheduling.machine import Share
from examples.few_shot.scheduling.process import GRACE_SECONDS
from examples.few_shot.scheduling.worker import Order
from examples.few_shot.settings import safe

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Ended:
    """A job that has ended.

    Attributes:
        order: what it was told.
        errors: mistakes, one line each; none where all went well.
        seconds: how long it took.
        log: where its output is; None where it went to this process's.
    """

    order: Order
    errors: tuple[str, ...]
    seconds: float
    log: Path | None


class _Worker:
    """A process that carries out orders, in a session of its own.

    Args:
        environ: its environment.
    """

    def __init__(self, environ: dict[str, str]) -> None:
        self.connection: Connection
        self.connection, theirs = Pipe()
        # Ctrl-C at a terminal goes to a whole group of processes: this one is told by its parent.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "examples.few_shot.scheduling.process", str(theirs.fileno())],
            env=environ,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def receive(self) -> tuple[list[str], bool]:
        """The mistakes of the order, and whether the process is fit for another one."""
        try:
            errors, fit = self.connection.recv()
            return errors, fit
        except (EOFError, OSError):
            status = self._process.wait()
            return [_how(status)], False

    def tell_to_end(self) -> None:
        """It ends when it hears of it, with the processes it started."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def finish(self, seconds: float = GRACE_SECONDS) -> None:
        """End it, and what it may have left behind."""
        self.connection.close()
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._signal_group(signal.SIGKILL)
            self._process.wait()
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _how(status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed (signal 9); if nobody killed it, the machine ran out of memory"
    if status < 0:
        return f"ended by signal {-status} ({signal.Signals(-status).name})"
    return f"ended with status {status} in the middle of the job"


@dataclass
class _Place:
    """Where one job at a time runs."""

    number: int
    worker: _Worker | None = None
    order: Order | None = None
    began: float = 0.0
    log: Path | None = None


class Pool:
    """Processes that carry out jobs; each takes the next when it is done with one.

    Args:
        share: how many, and what each may use.
        logs: the folder for their output, a file a job; None: it goes where ours does.
    """

    def __init__(self, share: Share, logs: Path | None) -> None:
        self._share = share
        self._logs = logs
        self._places = [_Place(number) for number in range(share.jobs)]

    def run(self, orders: Iterator[Order]) -> Generator[Ended, None, None]:
        """Carry out orders; an order is taken from `orders` when a process is free for it.

        When the caller stops, or something ends this process, the processes are ended first.
        """
        try:
            more = True
            while True:
                for place in self._places:
                    if more and place.order is None:
                        order = next(orders, None)
                        more = order is not None
                        if order is not None:
                            self._begin(place, order)
                busy = {p.worker.connection: p for p in self._places if p.order and p.worker}
                if not busy:
                    return
                for connection in wait(list(busy)):
                    yield self._ended(busy[connection])  # type: ignore[index]
        finally:
            self.end()

    def _begin(self, place: _Place, order: Order) -> None:
        place.order, place.began = order, time.monotonic()
        place.log = None if self._logs is None else self._logs / f"{safe(order.name)}.log"
        if place.worker is None:
            place.worker = _Worker(self._environ(place))
        place.worker.connection.send((order, place.log))

    def _environ(self, place: _Place) -> dict[str, str]:
        found = self._share.environ(place.number, os.environ)
        paths = [str(ROOT), found.get("PYTHONPATH", "")]
        return {**found, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}

    def _ended(self, place: _Place) -> Ended:
        assert place.worker is not None and place.order is not None
        errors, fit = place.worker.receive()
        found = Ended(place.order, tuple(errors), time.monotonic() - place.began, place.log)
        place.order = None
        if not fit:
            self._stop(place)
        return found

    @staticmethod
    def _stop(place: _Place) -> None:
        if place.worker is not None:
            place.worker.tell_to_end()
            place.worker.finish()
            place.worker = None

    def end(self) -> None:
        """End all processes: told at once, waited for together, then killed."""
        workers = [place.worker for place in self._places if place.worker is not None]
        for worker in workers:
            worker.tell_to_end()
        until = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.finish(until - time.monotonic())
        for place in self._places:
            place.worker = place.order = None
