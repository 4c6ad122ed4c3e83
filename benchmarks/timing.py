"""What every comparison shares: contestants take turns, medians of ratios within a round, records.

Machines are noisy, and shared ones drift. So contestants run in turn, round after round, and what
is quoted is the median over rounds of the ratio within a round; single times are only context.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round."""
    if warm_up:
        for work in contestants.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
        latest = ", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items())
        print(f"round {number + 1}: {latest}", flush=True)
    return seconds


class Apart:
    """A contestant in a process of its own, so that libraries cannot slow each other down.

    Two OpenMP runtimes in one process, for example, make whichever comes second crawl.

    Args:
        build: a function at the top level of a module; returns the work, a function.
        arguments: picklable, for `build`.

    Calling it does the work once, there, and returns what the work returned.
    """

    def __init__(self, build: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()

    def __call__(self) -> Any:
        self._pipe.send(True)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join(10)


def _serve(pipe: Connection, build: Callable[..., Callable[[], Any]], arguments: Any) -> None:
    work = build(*arguments)
    while pipe.recv():
        pipe.send(work())


def answers(
    contestants: Mapping[str, Apart], rounds: int, show: Callable[[Any], str] | None = None
) -> dict[str, list[Any]]:
    """What every contestant returned in every round, after one that warms up; then they end.

    Args:
        contestants: those that take turns.
        rounds: that count.
        show: what to print of an answer; None: nothing.
    """
    found: dict[str, list[Any]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            answer = work()
            if number:
                found[name].append(answer)
        if show is not None:
            latest = ", ".join(f"{name} {show(v[-1])}" for name, v in found.items() if v)
            print(f"round {number}: {latest or 'warm-up'}", flush=True)
    for work in contestants.values():
        work.close()
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of two contestants' figures in the same round: the median, least and greatest ratio."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "median": round(statistics.median(found), 3),
        "min": round(min(found), 3),
        "max": round(max(found), 3),
    }


def wait(device: str) -> None:
    """Let a device end what it was given: a clock is read afterwards."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine(threads: int | None = None) -> dict[str, Any]:
    """The machine's name and what else decides speed."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
        flags = next((x for x in lines if x.startswith("flags")), "")
        units = [u for u in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {u}" in flags]
        name += f" ({', '.join(units)})"
    return {
        "cpu": name,
        "processors": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record(result: Mapping[str, Any], out: Path | None) -> None:
    """Print a result as JSON, and write it where --out says."""
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
