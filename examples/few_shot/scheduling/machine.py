"""What this machine has for jobs that run side by side, and the share of each."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fairseq_lite.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")
_SECONDS = 30
GB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        cores: processor cores that this process may use.
        memory: bytes that it may use; None: not known.
        gpus: their names, as in CUDA_VISIBLE_DEVICES.
    """

    cores: int
    memory: int | None = None
    gpus: tuple[str, ...] = ()

    @classmethod
    def here(cls, *, cpu: bool = False) -> Machine:
        """This machine.

        Args:
            cpu: without its GPUs.
        """
        return cls(_cores(), _memory(), () if cpu else _gpus(os.environ))


@dataclass(frozen=True)
class Share:
    """What each of several jobs at a time has.

    Attributes:
        jobs: how many run at a time.
        threads: for each.
        gpus: of each job its own; empty where there are none, or where one job has them all.
        memory: bytes for each, which nobody enforces; None: not known.
    """

    jobs: int
    threads: int
    gpus: tuple[tuple[str, ...], ...] = ()
    memory: int | None = None

    def environ(self, number: int, before: Mapping[str, str]) -> dict[str, str]:
        """The environment of the processes for one of the places, from 0 to `jobs` - 1."""
        asked = before.get("OMP_NUM_THREADS", "")
        threads = min(self.threads, int(asked)) if asked.isdigit() and int(asked) else self.threads
        found = {**before, "OMP_NUM_THREADS": str(threads)}
        if self.gpus:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[number])
        return found

    def __str__(self) -> str:
        each = [f"{self.threads} core(s)"]
        if self.gpus:
            each.append(f"{len(self.gpus[0])} GPU(s)")
        if self.memory is not None:
            each.append(f"{self.memory / GB:.1f} GB of memory if shared evenly")
        return f"{self.jobs} job(s) at a time, each with {', '.join(each)}"


def share(machine: Machine, asked: int, jobs: int, gpus_per_job: int = 1) -> tuple[Share, str]:
    """Share a machine out among jobs.

    Args:
        machine: what there is.
        asked: `-j`.
        jobs: how many there are altogether.
        gpus_per_job: the most that one of them wants.

    Returns:
        The shares, and why there are fewer than asked for; empty where there are as many.

    Raises:
        ConfigError: fewer than one was asked for.
    """
    if asked < 1:
        raise ConfigError(f"-j {asked}: expected 1 or more jobs at a time")
    places = asked
    reason = ""
    if places > machine.cores:
        places = machine.cores
        reason = f"-j {asked}: {machine.cores} core(s) here, so {places} job(s) at a time"
    if machine.gpus and places > 1:
        each = max(1, gpus_per_job)
        room = max(1, len(machine.gpus) // each)
        if places > room:
            places = room
            reason = (
                f"-j {asked}: {len(machine.gpus)} GPU(s) here and {each} for a job, so {places}"
                " job(s) at a time; --cpu does without"
            )
    places = max(1, min(places, jobs))
    gpus: tuple[tuple[str, ...], ...] = ()
    if machine.gpus and places > 1:
        each = len(machine.gpus) // places
        gpus = tuple(machine.gpus[i * each : (i + 1) * each] for i in range(places))
    memory = None if machine.memory is None else machine.memory // places
    return Share(places, max(1, machine.cores // places), gpus, memory), reason


def _cores() -> int:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = here or 1
    try:  # a container's share: "MICROSECONDS PERIOD" or "max PERIOD"
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return max(1, min(found, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return found


def _memory() -> int | None:
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        (kilobytes,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        found.append(int(kilobytes) * 1024)
    with contextlib.suppress(OSError, ValueError):
        found.append(int((_CGROUP / "memory.max").read_text()))
    return min(found, default=None)


def _gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """GPUs that processes started here would see; torch, which knows better, takes seconds."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        names = environ["CUDA_VISIBLE_DEVICES"].split(",")
        return tuple(name.strip() for name in names if name.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.split()) if done.returncode == 0 else ()
