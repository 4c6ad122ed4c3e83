"""`--profile`: where the time of a few updates goes, as a trace for chrome://tracing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# The first updates of a run allocate and choose kernels: they would show what training is not.
SKIPPED, RECORDED = 3, 3


class UpdateProfiler:
    """Told of every update; does nothing unless it was given a profiler."""

    def __init__(self, profiler: Any = None) -> None:
        self._profiler = profiler

    def updated(self) -> None:
        """Another update was made."""
        if self._profiler is not None:
            self._profiler.step()


@contextmanager
def profiled(wanted: bool, path: Path) -> Iterator[UpdateProfiler]:
    """Profile updates 4 to 6 made inside the block.

    Args:
        wanted: whether to profile at all.
        path: where the trace goes.
    """
    if not wanted:
        yield UpdateProfiler()
        return
    # Optional and slow to import: only a run that profiles pays for it.
    from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

    def write(profiler: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info("wrote the profile of updates 4 to 6 of this run to %s", path)

    activities = [a for a in ProfilerActivity.__members__.values() if a in supported_activities()]
    with profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED - 1, warmup=1, active=RECORDED, repeat=1),
        on_trace_ready=write,
    ) as profiler:
        yield UpdateProfiler(profiler)
