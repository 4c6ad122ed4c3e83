"""A process of the local pool: `python -m examples.few_shot.scheduling.process FILE_DESCRIPTOR`.

It carries out the orders that its parent sends, one after another, and ends with its parent.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from examples.few_shot.gpt3_eval import set_up_logging
from examples.few_shot.scheduling.worker import Order, execute

# What is told to end has this long; then it is killed.
GRACE_SECONDS = 10.0

Orders = queue.Queue[tuple[Order, Path | None]]


def serve(connection: Connection) -> None:
    """Carry out orders until somebody ends this process.

    Each is answered with its mistakes, and whether this process is fit for another one.
    """
    orders: Orders = queue.Queue()
    threading.Thread(target=_receive, args=(connection, orders), daemon=True).start()
    while True:
        order, log = orders.get()
        fit = True
        with _output_to(log):
            try:
                errors = execute(order)
            except Exception as e:
                traceback.print_exc()
                said = traceback.format_exception_only(type(e), e)
                errors, fit = ["".join(said).strip().splitlines()[0]], False
        connection.send((errors, fit))


@contextlib.contextmanager
def _output_to(log: Path | None) -> Iterator[None]:
    """Let a file have what this process says, and those that it starts."""
    if log is None:
        yield
        return
    before = [os.dup(1), os.dup(2)]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        for stream, number, old in zip((sys.stdout, sys.stderr), (1, 2), before, strict=True):
            stream.flush()
            os.dup2(old, number)
            os.close(old)


def _receive(connection: Connection, orders: Orders) -> None:
    """Hand orders on; when nobody can send any more, end this process and what it started."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            orders.put(connection.recv())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _end(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # one is enough
    raise SystemExit(128 + number)


def main(argv: Sequence[str]) -> None:
    """Serve the parent, at the other end of a file descriptor."""
    descriptor = int(argv[0])
    os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGTERM, _end)
    set_up_logging()
    serve(Connection(descriptor))


if __name__ == "__main__":
    main(sys.argv[1:])
