"""Start the processes of a run, join them into a `World`, and see that all of them end together."""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined, unused-ignore]

from fairseq_lite.config.core import DistributedTrainingConfig, RunConfig
from fairseq_lite.errors import DistributedError
from fairseq_lite.parallel import meeting, network, watchdog
from fairseq_lite.parallel.api import Machine
from fairseq_lite.parallel.plan import Plan, plan, threads_per_rank
from fairseq_lite.parallel.spawn import Failure, Rank, run_ranks
from fairseq_lite.parallel.watchdog import Watchdog
from fairseq_lite.parallel.world import ProcessWorld, SingleWorld, World
from fairseq_lite.plugins import import_user_dir

R = TypeVar("R")

# How long ranks may wait for the last machine of a cluster to start, and a collective for a rank
# that lives but is busy (writing a checkpoint, scoring).
START_SECONDS = 600
COLLECTIVE_SECONDS = 3600
# How long rank 0 keeps the store open for ranks that still have to read it.
_LINGER_SECONDS = 10


def launch(
    fn: Callable[[RunConfig, World], None],
    run: RunConfig,
    *,
    setup: Callable[[], object] | None = None,
    if_asked: bool = False,
) -> None:
    """Run `fn(run, world)` in every process of the run.

    One process is this one. Several are started here (`--distributed-world-size N`, or one a GPU),
    unless torchrun or Slurm has started them: then this process is one of them.

    Args:
        fn: a function at the top level of a module, so that other processes can find it.
        run: the configuration; it travels to every process.
        setup: called first in every process started here, before the plugin of --user-dir is
            imported: `load_builtins`.
        if_asked: see `plan`.

    Raises:
        ConfigError: the flags, the environment and the machine do not fit together.
        DistributedError: a rank died or froze; the message names it. All others have ended.
        FliteError: what a rank raised.
    """
    launch_for(
        run.distributed_training,
        fn,
        run,
        command=run.command,
        cpu=run.common.cpu,
        setup=setup,
        user_dir=run.common.user_dir,
        if_asked=if_asked,
    )


def launch_for(
    cfg: DistributedTrainingConfig,
    fn: Callable[[R, World], None],
    run: R,
    *,
    command: str,
    cpu: bool = False,
    setup: Callable[[], object] | None = None,
    user_dir: str | None = None,
    if_asked: bool = False,
) -> None:
    """As `launch`, for a program whose configuration is not a `RunConfig`.

    Args:
        cfg: the distributed flags.
        fn: as for `launch`.
        run: the first argument of `fn`; it can be pickled.
        command: what the program is called, in messages.
        cpu: no GPU is to be used.
        setup: as for `launch`.
        user_dir: the plugin that `run` needs.
        if_asked: see `plan`.

    Raises:
        FliteError: as for `launch`.
    """
    found = plan(cfg, cpu=cpu, machine=Machine.here(), if_asked=if_asked)
    if found.size == 1:
        world = SingleWorld(_device(found, 0))
        try:
            fn(run, world)
        finally:
            world.close()
    elif found.spawn:
        spawn(found, fn, run, setup=setup, user_dir=user_dir)
    else:
        _be_the_rank(found, fn, run, command)


def spawn(
    found: Plan,
    fn: Callable[[R, World], None],
    run: R,
    *,
    setup: Callable[[], object] | None = None,
    user_dir: str | None = None,
    deadline: float | None = None,
) -> None:
    """Start `found.processes` ranks on this machine and wait for them.

    Args:
        found: the plan.
        fn: as for `launch`.
        run: the first argument of `fn`.
        setup: as for `launch`.
        user_dir: the plugin to import before `run` is unpickled, as it holds the plugin's classes.
        deadline: seconds after which they are ended with an error; None for never.
    """
    store = None
    if found.serve:
        # The store is kept here and not by rank 0, so that it survives the death of any rank.
        store = _serve(found)
        found = replace(found, port=store.port)
    payload = pickle.dumps((fn, run))
    arguments = (found, pickle.dumps(setup), user_dir, payload)

    def tell_other_machines(reason: str) -> None:
        if not found.one_machine:
            meeting.call_off(_connect(found, timeout=5), reason)

    run_ranks(
        _child_rank,
        arguments,
        first_rank=found.first_rank,
        count=found.processes,
        on_failure=tell_other_machines,
        deadline=deadline,
    )
    if store is not None and not found.one_machine:
        _linger(meeting.current(store), found.size)


def _child_rank(me: Rank, found: Plan, setup: bytes, user_dir: str | None, payload: bytes) -> None:
    """What a started process does. Nothing of the run is unpickled before its classes exist."""
    prepare = pickle.loads(setup)
    if prepare is not None:
        prepare()
    if user_dir is not None:
        import_user_dir(user_dir)
    fn, run = pickle.loads(payload)

    def on_death(reason: str) -> None:
        me.fail(Failure(me.rank, "DistributedError", reason))

    with _Membership(found, me.index, on_death) as world:
        fn(run, world)


def _be_the_rank(found: Plan, fn: Callable[[R, World], None], run: R, command: str) -> None:
    """Be one rank of a world that a launcher made."""

    def on_death(reason: str) -> None:
        print(f"{command}: error: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    with _Membership(found, 0, on_death) as world:
        fn(run, world)


class _Membership:
    """This process's place in a world of several: joins on entry, leaves on exit.

    When the body fails, the others are told why; when it fails only because another rank has gone,
    it waits for the watchdog to find out which.
    """

    def __init__(self, found: Plan, index: int, on_death: Callable[[str], None]) -> None:
        self._plan = found
        self._index = index
        self._rank = found.first_rank + index
        self._on_death = on_death

    def __enter__(self) -> World:
        found = self._plan
        device = _device(found, self._index)
        _share_cores(found)
        _choose_network(found)
        self._server = _serve(found) if found.serve and not found.spawn else None
        store = _connect(found, START_SECONDS)
        name = meeting.meet(
            store, self._rank, found.size, place=_place(found), seconds=START_SECONDS
        )
        # A connection of its own: the main thread may wait in the other one for minutes.
        self._store = meeting.room(_connect(found, timeout=found.heartbeat), name)
        self._watchdog = Watchdog(
            self._store, self._rank, found.size, found.heartbeat, _holder(found), self._die
        )
        self._watchdog.start()
        try:
            dist.init_process_group(
                found.backend,
                store=PrefixStore("group", meeting.room(store, name)),
                rank=self._rank,
                world_size=found.size,
                timeout=timedelta(seconds=COLLECTIVE_SECONDS),
                device_id=device if found.backend == "nccl" else None,
            )
        except Exception as e:
            self.__exit__(type(e), e, e.__traceback__)
            raise
        self._world = ProcessWorld(found.local_rank + self._index, device)
        return self._world

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._watchdog.finish()
            if self._server is not None:
                _linger(self._store, self._plan.size)
            self._world.close()
            return
        if watchdog.is_lost_contact(error):
            if not self._plan.one_machine:  # there, the parent sees who died
                time.sleep(self._plan.heartbeat + 3 * self._watchdog.interval)
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DistributedError(
                f"rank {self._rank} lost contact with another rank: {line}"
            ) from error
        if isinstance(error, Exception):
            self._watchdog.stop()
            watchdog.write_reason(self._store, f"rank {self._rank} stopped: {one_line(error)}")
            self._let_others_read()

    def _die(self, reason: str) -> None:
        self._let_others_read()
        self._on_death(reason)

    def _let_others_read(self) -> None:
        """Keep the store open, if it is here, until every rank has seen why it must stop."""
        if self._server is not None:
            time.sleep(2 * self._watchdog.interval)


def one_line(error: BaseException) -> str:
    """An error as one line: its own for a `FliteError`, otherwise with its type."""
    return "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[0]


def _device(found: Plan, index: int) -> torch.device:
    if not found.cuda:
        return torch.device("cpu")
    # More ranks than GPUs happen with gloo only: then they share.
    number = (found.local_rank + index) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _share_cores(found: Plan) -> None:
    # Each rank would start as many threads as there are cores, and all would wait for each other.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = threads_per_rank(found, os.environ, cores or 1)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of processes that this one starts
        torch.set_num_threads(threads)


def _choose_network(found: Plan) -> None:
    if found.size == found.local_size:
        network.use_loopback()
    elif found.backend == "gloo":
        network.choose_interface(found.host, found.port)


def _serve(found: Plan) -> TCPStore:
    try:
        return TCPStore(
            found.host,
            found.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=START_SECONDS),
        )
    except (RuntimeError, ValueError) as e:
        raise DistributedError(
            f"cannot listen on {found.host}:{found.port}, where the ranks meet ({one_line(e)}): "
            "choose another port with --distributed-port or --distributed-init-method"
        ) from e


def _connect(found: Plan, timeout: float) -> Store:
    try:
        store = TCPStore(
            found.host,
            found.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as e:
        raise DistributedError(
            f"rank {found.first_rank} cannot reach rank 0's machine at {found.host}:{found.port} "
            f"({one_line(e)})"
        ) from e
    return store


def _linger(store: Store | None, size: int) -> None:
    end = time.monotonic() + _LINGER_SECONDS
    while store is not None and not watchdog.all_done(store, size) and time.monotonic() < end:
        time.sleep(0.05)


def _place(found: Plan) -> str:
    return f"{found.host}:{found.port}"


def _holder(found: Plan) -> str:
    if found.one_machine:
        return "the process that started the ranks"
    return f"rank 0's machine ({_place(found)})"
