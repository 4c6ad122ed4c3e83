"""How far a run is, as its folder says: a record that is written when something happens to it.

Not its output: a warning on standard error is no failure, and a run that was killed says nothing. A
folder without a record, of fairseq's sweeps for example, is judged by the end of its train.log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_lite_cli.alive import Process, slurm_jobs_alive
from fairseq_lite_cli.writing import write_atomically

try:
    import fcntl
except ImportError:  # not POSIX: two sweeps that start in one moment are not told apart
    fcntl = None  # type: ignore[assignment]

RECORD = "sweep.json"
LOG = "train.log"
# What begins an attempt in a log; what stands before it is of an earlier one.
ATTEMPT = "sweep: attempt "

_LOCK = ".sweep.lock"
_LOG_TAIL = 1 << 18
_DONE = "done training"
# flite-train says so where it was told to end before its time, and then also that it is done.
_ASKED = "the process was asked to end"
_LONGEST_LINE = 240


class State(str, enum.Enum):
    """How far a run is."""

    NEW = "new"
    SUBMITTED = "submitted"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Record:
    """What is known of a run's last attempt.

    Attributes:
        state: how it stands; `submitted` and `running` hold as long as the process or job lives.
        attempt: its number, from 1.
        host, pid, began: the process that trains (or submits), and what tells it from a later one
            with its number.
        keeper, keeper_began: the process of the sweep on that host, which writes how it ended.
        job: Slurm's job.
        started, ended: in words.
        seconds: of all attempts together.
        exit_code: of the command; negative: the signal that ended it.
        error: why it failed.
        steps: of --post-steps, which follow the training.
        command: what was executed.
        version: of the code.
    """

    state: State
    attempt: int = 1
    host: str = ""
    pid: int = 0
    began: str = ""
    keeper: int = 0
    keeper_began: str = ""
    job: str | None = None
    started: str = ""
    ended: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    error: str = ""
    steps: int = 0
    command: tuple[str, ...] = ()
    version: str = ""

    def at(self, state: State, **changes: Any) -> Record:
        """The same in another state."""
        return dataclasses.replace(self, state=state, **changes)


def load(save_dir: Path) -> Record | None:
    """The record of a run; None where there is none that can be read."""
    try:
        found = json.loads((save_dir / RECORD).read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Record)}
        values = {key: value for key, value in found.items() if key in known}
        return Record(
            **{**values, "state": State(values["state"]), "command": tuple(values["command"])}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store(save_dir: Path, record: Record) -> None:
    """Write a run's record: whole, or not at all."""
    text = json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False)
    write_atomically(save_dir / RECORD, [text, "\n"])


def take_back(save_dir: Path, claim: Record, before: Record | None) -> None:
    """Undo a claim of which nothing came, unless somebody else has gone on from it."""
    if load(save_dir) != claim:
        return
    if before is not None:
        store(save_dir, before)
    else:
        (save_dir / RECORD).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(save_dir: Path) -> Iterator[None]:
    """Alone with a run's record, for the moment between reading and writing it."""
    with open(save_dir / _LOCK, "a") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as e:
                # Some file systems of clusters know no locks; only sweeps of one moment collide.
                if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
        yield


def state_of(
    save_dir: Path, alive: Callable[[Record], bool] | None = None
) -> tuple[State, Record | None]:
    """How far a run is.

    Args:
        save_dir: its folder, which need not exist.
        alive: whether the process or job of a record lives; this module's own by default.
    """
    record = load(save_dir)
    log = last_attempt(save_dir / LOG)
    if record is None:
        if log is None:
            return State.NEW, None
        if _ended_well(log):
            return State.FINISHED, None
        error = f"{LOG} does not say {_DONE!r}, and nothing says who works on it"
        return State.FAILED, Record(State.FAILED, error=error)
    if record.state not in (State.SUBMITTED, State.RUNNING):
        return record.state, record
    if (alive or is_alive)(record):
        return record.state, record
    # Nobody was there to write how it ended: the sweep was killed, and the run perhaps was not. Its
    # further steps did not follow then, or nobody heard how they ended.
    alone = record.state is State.RUNNING and not record.steps
    if alone and log is not None and _ended_well(log):
        return State.FINISHED, record
    return State.INTERRUPTED, record


def last_attempt(log: Path) -> list[str] | None:
    """The last lines of a log, of the last attempt only; None where there is no log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    starts = [i for i, line in enumerate(lines) if line.startswith(ATTEMPT)]
    return lines[starts[-1] + 1 :] if starts else lines


def _ended_well(lines: Sequence[str]) -> bool:
    return any(_DONE in line for line in lines) and not was_asked_to_end(lines)


def was_asked_to_end(lines: Sequence[str]) -> bool:
    """Whether training ended because of a signal, though with status 0."""
    return any(_ASKED in line for line in lines)


def error_of(lines: Sequence[str], exit_code: int) -> str:
    """Why an attempt failed, in one line: what it said last, or how it ended.

    Args:
        lines: its last lines.
        exit_code: negative: the signal that ended it.
    """
    if exit_code == -9:
        return "killed (signal 9); if nobody killed it, the machine ran out of memory"
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if "error" in line.lower()]
    line = (errors or said or [f"ended with status {exit_code}, and said nothing"])[-1]
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "…"


# -- who is alive -------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """The fields of a record that say who works on a run."""
    return dataclasses.asdict(Process.of(os.getpid()))


def child(pid: int) -> dict[str, Any]:
    """The same of a process that works for this one."""
    keeper = Process.of(os.getpid())
    return dataclasses.asdict(Process.of(pid)) | {
        "keeper": keeper.pid,
        "keeper_began": keeper.began,
    }


def is_alive(record: Record) -> bool:
    """Whether the process or the job of a record lives; where nobody can be asked, assumed."""
    if record.job is None:
        # A process that has ended is still somebody's whose keeper has not yet written how.
        workers = [(record.pid, record.began)]
        if record.keeper:
            workers.append((record.keeper, record.keeper_began))
        return any(Process(record.host, pid, began).is_alive for pid, began in workers)
    jobs = slurm_jobs_alive([record.job])
    return jobs is None or record.job in jobs


def place(record: Record) -> str:
    """Where a run is, in words."""
    if record.job is not None:
        return f"as job {record.job}"
    return f"on {record.host} (process {record.pid})"
