"""Ranks that start at once: forked from a process that has imported what every rank imports.

A rank that is started as users' are spends seconds importing torch, and the tests start hundreds.
`warm_ranks` has them forked from servers that did nothing but import. All else is as it is for
users: what a rank is told is pickled, it writes where its parent writes, has its parent's
environment and ends with its parent. Ranks are dealt to several servers, as neighbours must not
hash strings alike: what depends on the order of a set differs among ranks here, too.

What the servers do not show is a process that starts from nothing. Tests of starting and ending
processes, and those that ask for the fixture `cold_ranks`, have the real thing;
`FLITE_COLD_RANKS=1 pytest ...` has it everywhere.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, popen_forkserver, reduction
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from fairseq_lite.parallel import spawn
from tests.helpers.commands import REPOSITORY

SERVERS = 2
COLD = "FLITE_COLD_RANKS"


@contextmanager
def warm_ranks() -> Iterator[None]:
    """Inside, ranks that this process starts are forked from servers."""
    if os.environ.get(COLD) or sys.platform != "linux":
        yield
        return
    with patch.object(spawn, "mp", SimpleNamespace(get_context=lambda _: _Context())):
        yield


@contextmanager
def cold_ranks() -> Iterator[None]:
    """Inside, they are started as a user's are."""
    with patch.object(spawn, "mp", mp):
        yield


def _started_server() -> Any:
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["tests.helpers.imported"])
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with patch.dict(os.environ, PYTHONPATH=path.strip(os.pathsep)):
        server.ensure_running()
    return server


_servers: list[Any] = []


def _server_of(turn: int) -> Any:
    while len(_servers) < SERVERS:
        _servers.append(_started_server())
    return _servers[turn % SERVERS]


class _Surroundings:
    """What a spawned process has of its parent by itself; taken over where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        streams = [reduction.DupFd(fd) for fd in (1, 2)]
        return _take_over, (dict(os.environ), *streams)


def _take_over(environment: Mapping[str, str], out: Any, err: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, fd in ((out, 1), (err, 2)):
        inherited = stream.detach()
        os.dup2(inherited, fd)
        os.close(inherited)
    spawn._die_with = _end_with  # the parent that the system knows is the server


def _end_with(parent: int) -> None:
    def watch() -> None:
        mp.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Popen(popen_forkserver.Popen):
    def _launch(self, process: Any) -> None:
        own = SimpleNamespace(
            connect_to_new_process=_server_of(process.turn).connect_to_new_process,
            read_signed=forkserver.read_signed,
        )
        with patch.object(popen_forkserver, "forkserver", own):
            super()._launch(process)


class _Process(ForkServerProcess):
    def __init__(self, turn: int, **more: Any) -> None:
        super().__init__(**more)
        self.turn = turn
        self.surroundings = _Surroundings()

    @staticmethod
    def _Popen(process: Any) -> Any:
        return _Popen(process)


class _Context(ForkServerContext):
    """Of one set of ranks, which take turns at the servers."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = itertools.count()

    def Process(self, **more: Any) -> _Process:
        return _Process(next(self.turns), **more)
