"""Who works on an evaluation: a file beside its results, which outlives whoever wrote it.

`RESULTS.submitted` names a process or a job of Slurm's; `PREDICTIONS.submitted` one that makes a
single trial. Once that has ended it means nothing, so what was killed is free again without
anybody's help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX: two that find one dead marker in one moment are not told apart
    fcntl = None  # type: ignore[assignment]

from examples.few_shot.settings import PlannedEvaluation
from fairseq_lite.errors import DataError
from fairseq_lite_cli.alive import Process, slurm_jobs_alive

SUFFIX = ".submitted"
SLURM, HERE = "slurm", "process"


@dataclass(frozen=True)
class Submission:
    """Who works on an evaluation.

    Attributes:
        job: the job's name.
        kind: "slurm" or "process".
        job_id: Slurm's number of the job.
        process: the process that evaluates, or that submits.
        folder: where the job's logs are.
        submitted: when, in UTC.
    """

    job: str
    kind: str
    process: Process
    job_id: str | None = None
    folder: str = ""
    submitted: str = ""

    @classmethod
    def of_process(cls, job: str, pid: int | None = None) -> Submission:
        """By a process of this machine; this one by default."""
        return cls(job, HERE, Process.of(pid or os.getpid()), submitted=now())

    def __str__(self) -> str:
        if self.kind == SLURM:
            return f"Slurm's job {self.job_id}"
        return f"process {self.process.pid} on {self.process.host}"


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def marker(planned: PlannedEvaluation) -> Path:
    """The file that says who works on an evaluation, or on its only trial."""
    return planned.product.with_name(planned.product.name + SUFFIX)


def markers(planned: PlannedEvaluation) -> list[Path]:
    """All files that may name somebody who works on the same: on the whole, or on a part of it."""
    whole = dataclasses.replace(planned, trial=None)
    others = [whole] if planned.trial is not None else whole.by_trial()
    return list(dict.fromkeys(marker(each) for each in (planned, *others)))


def read(planned: PlannedEvaluation) -> Submission | None:
    """What the file says; None where there is none that says anything."""
    return read_marker(marker(planned))


def read_marker(path: Path) -> Submission | None:
    """What such a file says; None where there is none that says anything."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Submission(**{**found, "process": Process(**found["process"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def living(submissions: Iterable[Submission]) -> set[Submission]:
    """Those whose job or process waits or runs; where nobody can be asked, that is assumed."""
    every = set(submissions)
    jobs = slurm_jobs_alive(each.job_id or "" for each in every if each.kind == SLURM)
    return {
        each
        for each in every
        if (
            (jobs is None or each.job_id in jobs)
            if each.kind == SLURM
            else each.process.is_alive
        )
    }  # fmt: skip


def can_tell(submission: Submission) -> bool:
    """Whether `living` knows, rather than assumes."""
    if submission.kind == SLURM:
        return slurm_jobs_alive([submission.job_id or ""]) is not None
    return submission.process.is_here


def claim(planned: PlannedEvaluation, mine: Submission) -> bool:
    """Take an evaluation, unless somebody who lives has it.

    Raises:
        DataError: the folder cannot be written.
    """
    path = marker(planned)
    with _written(path, mine) as part, _alone_in(path.parent):
        try:
            os.link(part, path)  # fails where the file is there: of two at a time one wins
            return True
        except OSError:  # it is there; or the file system knows no links
            other = read(planned)
        if other is not None and not _is_mine(other, mine) and living([other]):
            return False
        os.replace(part, path)
    return True


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time find that a marker is nobody's and put its own there.

    Where a file system cannot lock a folder, only calls of one moment collide.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        # Closing alone would not do where another process has been forked meanwhile.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _is_mine(other: Submission, mine: Submission) -> bool:
    return other.kind == mine.kind == HERE and other.process == mine.process


def record(planned: PlannedEvaluation, mine: Submission) -> None:
    """Write who works on an evaluation that is claimed already."""
    path = marker(planned)
    with _written(path, mine) as part:
        os.replace(part, path)


def release(planned: Iterable[PlannedEvaluation]) -> None:
    """Nobody works on these any more."""
    for each in planned:
        with contextlib.suppress(OSError):
            marker(each).unlink(missing_ok=True)


@contextlib.contextmanager
def _written(path: Path, mine: Submission) -> Iterator[Path]:
    """The text of a marker in a file of its own, which is gone afterwards."""
    part = path.with_name(f".{SUFFIX[1:]}.{socket.gethostname()}.{os.getpid()}~")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(mine), indent=1)
        part.write_text(f"{text}\n", encoding="utf-8")
        yield part
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
