"""Whether somebody still works on something: a process of this machine, or a job of Slurm's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SQUEUE_SECONDS = 60
# Slurm's command line is not endless.
_JOBS_AT_A_TIME = 500


@dataclass(frozen=True)
class Process:
    """A process, told from a later one that is given its number.

    Attributes:
        host: its machine.
        pid: its number.
        began: when it began, as the system counts; empty where the system does not say.
    """

    host: str
    pid: int
    began: str = ""

    @classmethod
    def of(cls, pid: int) -> Process:
        """A process of this machine."""
        return cls(socket.gethostname(), pid, _began(pid) or "")

    @property
    def is_here(self) -> bool:
        """Whether it is of this machine, so that `is_alive` knows."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; of another machine's it is assumed."""
        return not self.is_here or _began(self.pid) == self.began


def _began(pid: int) -> str | None:
    """When a process of this machine began; None when it has ended."""
    if os.path.isdir("/proc/self"):
        try:
            # Behind the name, which stands in parentheses and may hold anything: the state, …
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{_boot()}:{fields[19]}"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _boot() -> str:
    """Tells this start of the machine from others; empty where it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def slurm_jobs_alive(jobs: Iterable[str]) -> set[str] | None:
    """Those of Slurm's jobs, or of their array's elements, that wait or run.

    Args:
        jobs: their numbers, as in "4711" and "4711_3".

    Returns:
        A part of `jobs`; None where Slurm cannot be asked.
    """
    wanted = sorted(set(jobs))
    if not wanted:
        return set()
    if shutil.which("squeue") is None:
        return None
    found: set[str] = set()
    for start in range(0, len(wanted), _JOBS_AT_A_TIME):
        part = ",".join(wanted[start : start + _JOBS_AT_A_TIME])
        # Elements that wait stand in one line, [0-9], unless they are asked for one by one.
        asked = ["squeue", "--noheader", "--array", "--format=%i", "--jobs", part]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=_SQUEUE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            # Slurm forgets a job minutes after its end. Other trouble says nothing about jobs.
            if "invalid job id" in done.stderr.lower():
                continue
            return None
        found.update(done.stdout.split())
    # An array is alive while one of its elements is.
    arrays = {each.partition("_")[0] for each in found}
    return {each for each in wanted if each in found or each in arrays}
