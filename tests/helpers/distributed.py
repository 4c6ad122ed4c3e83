"""Run a function on several ranks and get what each of them returned."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fairseq_lite.parallel.launch import spawn
from fairseq_lite.parallel.plan import Plan
from fairseq_lite.parallel.world import SingleWorld, World


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout: float = 100.0,
    heartbeat: int = 100,
    user_dir: str | None = None,
) -> list[Any]:
    """Call `fn(world, *args)` on every rank; leaves no process behind, whatever happens.

    Args:
        fn: a function at the top level of a test module.
        world_size: 1 runs it here, in a `SingleWorld`.
        args: picklable.
        backend: "gloo" on the CPU, "nccl" on CUDA.
        timeout: seconds after which all ranks are ended and the call fails.
        heartbeat: seconds of silence after which a rank counts as dead.
        user_dir: a plugin folder to import in every rank.

    Returns:
        What each rank returned (picklable), in rank order.

    Raises:
        FliteError: what a rank raised, or DistributedError naming the rank that died.
    """
    cuda = backend == "nccl"
    if world_size == 1:
        world = SingleWorld("cuda:0" if cuda else "cpu")
        try:
            return [fn(world, *args)]
        finally:
            world.close()
    found = Plan(
        size=world_size,
        processes=world_size,
        local_size=world_size,
        spawn=True,
        cuda=cuda,
        backend=backend,
        heartbeat=heartbeat,
    )
    with tempfile.TemporaryDirectory() as folder:
        spawn(found, partial(_call, fn, args), folder, user_dir=user_dir, deadline=timeout)
        return [pickle.loads((Path(folder) / str(r)).read_bytes()) for r in range(world_size)]


def _call(fn: Callable[..., Any], args: tuple[Any, ...], folder: str, world: World) -> None:
    (Path(folder) / str(world.rank)).write_bytes(pickle.dumps(fn(world, *args)))
