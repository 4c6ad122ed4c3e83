"""From the content of files to files: all ranks', under all names, now or in the background."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fairseq_lite.config.core import CheckpointConfig
from fairseq_lite.errors import FliteError
from fairseq_lite.parallel.agreement import together
from fairseq_lite.parallel.api import MAIN_PART
from fairseq_lite.parallel.world import World
from fairseq_lite.training.checkpoint import naming, parts, store

logger = logging.getLogger(__name__)

Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Job:
    """A save.

    Attributes:
        names: the checkpoint's names; each gets the same content.
        moment: where training is.
        states: the content of this rank's files, by part; none on most ranks, as a rule.
    """

    names: list[str]
    moment: naming.Moment
    states: Mapping[str, dict[str, Any]]


class CheckpointWriter:
    """Writes what all ranks hold, so that a checkpoint has its name only when it is complete.

    Args:
        cfg: the checkpoint flags.
        world: the processes.
    """

    def __init__(self, cfg: CheckpointConfig, world: World) -> None:
        self._cfg = cfg
        self._world = world
        self._folder = Path(cfg.save_dir)
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._gather_aside: Gather = world.gather_objects

    def submit(self, job: Job) -> None:
        """Write, on every rank; with --write-checkpoints-asynchronously, in a thread.

        What a thread writes must be copied beforehand: training changes tensors in place.

        Raises:
            CheckpointError: on every rank, when one could not write. What was there is intact.
        """
        if not self._cfg.write_checkpoints_asynchronously:
            self.write(job, self._world.gather_objects)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._gather_aside = self._world.gather_aside()
        self._pending = self._thread.submit(self.write, job, self._gather_aside)

    def finish(self) -> None:
        """Wait for the thread.

        Raises:
            CheckpointError: it could not write.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, which has finished."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def write(self, job: Job, gather: Gather) -> None:
        """Write now; `gather` is how ranks agree that all have written, before any renames."""
        start = time.perf_counter()
        # One name after the other: a disk that is nearly full need not hold all of them twice.
        for name in job.names:
            files = self._files(job, name)
            try:
                together(gather, partial(self._write_temporaries, job, files))
            except FliteError:
                for path in files.values():
                    store.discard(path)
                raise
            together(gather, partial(_rename, files))
        if self._world.is_main:
            logger.info(
                "Saved checkpoint %s (epoch %d @ %d updates, score %s) (writing took %s seconds)",
                self._folder / job.names[0],
                job.moment.epoch,
                job.moment.updates,
                job.moment.val_loss,
                time.perf_counter() - start,
            )
        self._remove_old(job)

    def _files(self, job: Job, name: str) -> dict[str, Path]:
        """This rank's files of a checkpoint, by part."""
        return {part: parts.part_path(self._folder / name, part) for part in job.states}

    def _write_temporaries(self, job: Job, files: Mapping[str, Path]) -> None:
        first = self._files(job, job.names[0])
        for part, path in files.items():
            if path == first[part]:
                store.save_temporary(path, ready(part, job.states[part], path))
            else:
                store.copy_temporary(first[part], path)

    def _remove_old(self, job: Job) -> None:
        """Apply retention, and remove what older saves left under the names just written.

        Rank 0 sees to all files, others to their own: a folder may be a machine's.
        """
        if self._world.is_main:
            kept = parts.all_parts(job.states)  # rank 0 always writes one of them
            for name in job.names:
                parts.remove_others(self._folder / name, kept)
        if not (self._world.is_main or job.states):
            return
        existing = parts.whole_names(os.listdir(self._folder))
        end = job.moment.end_of_epoch
        for name in naming.names_to_remove(self._cfg, existing, end_of_epoch=end):
            for part, path in parts.part_files(self._folder / name).items():
                if self._world.is_main or part in job.states:
                    path.unlink(missing_ok=True)


def _rename(files: Mapping[str, Path]) -> None:
    for path in files.values():
        store.commit(path)


def ready(part: str, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A file's content on the CPU; that of one of several with the hashes of its tensors."""
    state = store.to_cpu(state)
    return state if part == MAIN_PART else parts.sealed(state, path)
