"""Processes of this machine that live and die together.

The parent waits for all of them. When one fails, it finds the cause among what the others report in
consequence, ends the rest and raises the cause. When the parent itself dies, the system ends them.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import util as mp_util
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, cast

from fairseq_lite import errors
from fairseq_lite.errors import DistributedError, FliteError
from fairseq_lite.parallel.watchdog import is_lost_contact

# How long to wait for the cause when only consequences are known; how long a process may take to
# end on request.
_SETTLE_SECONDS = 3.0
_GRACE_SECONDS = 3.0
_TRACE_LIMIT = 20000


@dataclass(frozen=True)
class Failure:
    """Why a rank failed, as it travels to the parent.

    Attributes:
        rank: which.
        kind: the name of the error's class in `fairseq_lite.errors`; empty for any other error.
        line: the message.
        trace: the traceback of an error that is not the user's.
        weight: 0 for a cause, more for what may be a consequence of another rank's failure.
        when: on the system's monotonic clock.
    """

    rank: int
    kind: str
    line: str
    trace: str = ""
    weight: int = 0
    when: float = field(default_factory=time.monotonic)

    @staticmethod
    def of(rank: int, error: BaseException) -> Failure:
        """Describe an exception."""
        root = error.__cause__ if isinstance(error, DistributedError) else error
        weight = 3 if root is not None and is_lost_contact(root) else 0
        if isinstance(error, FliteError):
            return Failure(rank, type(error).__name__, str(error), weight=weight)
        line = "".join(traceback.format_exception_only(type(error), error)).strip().split("\n")[0]
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return Failure(rank, "", f"rank {rank} failed: {line}", trace[-_TRACE_LIMIT:], weight)

    @staticmethod
    def of_exit(rank: int, code: int) -> Failure:
        """Describe the end of a process that could not say why."""
        if code >= 0:
            return Failure(rank, "", f"rank {rank} died (exit code {code})", weight=2)
        name = (signal.strsignal(-code) or "unknown").lower()
        line = f"rank {rank} died (signal {-code}: {name})"
        if -code == signal.SIGKILL:
            line += "; if nobody killed it, the machine ran out of memory"
        # Libraries abort when their peers have gone.
        return Failure(rank, "", line, weight=1 if -code == signal.SIGABRT else 0)

    def error(self) -> FliteError:
        """The exception for the user: of the rank's own class where it was a `FliteError`."""
        cls = getattr(errors, self.kind, None) if self.kind else None
        known = isinstance(cls, type) and issubclass(cls, FliteError)
        return cls(self.line) if known else DistributedError(self.line)  # type: ignore[misc]


@dataclass
class Rank:
    """A started process, seen from inside."""

    rank: int
    index: int
    pipe: Connection

    def fail(self, failure: Failure) -> None:
        """Tell the parent and end this process at once."""
        with suppress(OSError):  # no parent, nobody to tell
            self.pipe.send(failure)
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # No clean exit: it would wait for threads that wait for ranks that have gone.
        os._exit(1)


@dataclass
class _Child:
    rank: int
    process: SpawnProcess
    pipe: Connection

    def failure(self) -> Failure | None:
        """Why it ended, or None if it ended well."""
        self.process.join()
        code = self.process.exitcode or 0
        with suppress(EOFError, OSError):
            if self.pipe.poll():
                sent = self.pipe.recv()
                if isinstance(sent, Failure):
                    return sent
        return None if code == 0 else Failure.of_exit(self.rank, code)


def run_ranks(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    first_rank: int,
    count: int,
    on_failure: Callable[[str], None] | None = None,
    deadline: float | None = None,
) -> None:
    """Start `count` processes that call `target(Rank, *arguments)`, and wait for all of them.

    Args:
        target: a function at the top level of a module.
        arguments: picklable.
        first_rank: the rank of the first; the others follow.
        count: how many.
        on_failure: told the cause before the other processes are ended.
        deadline: seconds after which all are ended; None for never.

    Raises:
        FliteError: the cause, when one fails.
        KeyboardInterrupt: on Ctrl-C, after all have ended.
    """
    context = mp.get_context("spawn")
    children: list[_Child] = []
    end = None if deadline is None else time.monotonic() + deadline
    try:
        with _children_ignore_interrupts():
            for index in range(count):
                ours, theirs = context.Pipe(duplex=False)
                rank = first_rank + index
                process = context.Process(
                    target=_main,
                    args=(target, rank, index, theirs, os.getpid(), arguments),
                    name=f"rank-{rank}",
                )
                process.start()
                theirs.close()
                children.append(_Child(rank, process, ours))
        with _signals_passed_on(children):
            cause = _first_failure(children, end)
        if cause is not None:
            if cause.trace:
                print(cause.trace, file=sys.stderr, flush=True)
            if on_failure is not None:
                with suppress(Exception):  # it may be the other machine that has gone
                    on_failure(cause.line)
            raise cause.error()
    finally:
        _end([child.process for child in children])
        for child in children:
            child.pipe.close()


def _first_failure(children: Sequence[_Child], end: float | None) -> Failure | None:
    """Wait until all have ended well (None), or one has failed and the cause is known."""
    running = {child.process.sentinel: child for child in children}
    failures: list[Failure] = []
    while running:
        timeout = None if end is None else max(0.0, end - time.monotonic())
        if failures:
            if min(f.weight for f in failures) == 0:
                break
            timeout = max(0.0, failures[0].when + _SETTLE_SECONDS - time.monotonic())
        ready = cast("list[int]", wait(list(running), timeout))
        if not ready and not failures:
            ranks = ", ".join(str(child.rank) for child in running.values())
            return Failure(-1, "DistributedError", f"rank(s) {ranks} did not end in time")
        if not ready:
            break
        for sentinel in ready:
            failure = running.pop(sentinel).failure()
            if failure is not None:
                failures.append(failure)
    return min(failures, key=lambda f: (f.weight, f.when), default=None)


def _end(processes: Sequence[SpawnProcess]) -> None:
    """Leave no process: ask, then kill. A frozen one does not hear the question."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    limit = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


@contextmanager
def _signals_passed_on(children: Sequence[_Child]) -> Iterator[None]:
    """Hand SIGTERM and SIGUSR1 to the ranks, which save before they end; wait as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: object) -> None:
        for child in children:
            if child.process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.process.pid, number)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Let the parent alone answer Ctrl-C, which reaches every process of a terminal.

    A signal that is ignored stays so in processes started meanwhile, from their first instruction.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _main(
    target: Callable[..., None],
    rank: int,
    index: int,
    pipe: Connection,
    parent: int,
    arguments: tuple[Any, ...],
) -> None:
    _die_with(parent)
    me = Rank(rank, index, pipe)
    try:
        target(me, *arguments)
    except SystemExit as e:
        if e.code not in (None, 0):
            me.fail(Failure(rank, "", f"rank {rank} stopped (exit code {e.code})"))
    except BaseException as e:
        me.fail(Failure.of(rank, e))
    else:
        _leave()


def _leave() -> None:
    """End this process without taking it apart: its work is done, its files are closed.

    Threads inside torch that still wait when the interpreter is torn down abort the process now and
    then, and a rank that had finished would count as dead.
    """
    finalize = getattr(mp_util, "_exit_function", None)
    if finalize is not None:
        finalize()  # queues and temporary folders of multiprocessing
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(0)


def _die_with(parent: int) -> None:
    """Make the system end this process when its parent dies, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
