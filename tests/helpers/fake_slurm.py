"""What the job templates need of Slurm, on one machine: sbatch, srun and scontrol.

    python fake_slurm.py sbatch [--option=value ...] SCRIPT ARGUMENTS...

sbatch runs the script as Slurm does, from a copy elsewhere, in an environment that describes the
job, again after `scontrol requeue`; unlike Slurm's it waits, and ends with the script's status. The
folder `FAKE_SLURM` holds the state: `batch.pid`, to which `--signal=B:` would go, and `calls`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB = "4711"


def install(folder: Path) -> Path:
    """Write the three commands into a folder for PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        command.chmod(0o755)
    return folder


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """`--name=value` in front, and the rest."""
    options = {}
    while words and words[0].startswith("--"):
        name, _, value = words[0][2:].partition("=")
        options[name], words = value, words[1:]
    return options, words


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines, which end at the first command."""
    found: list[str] = []
    for line in script.read_text(encoding="utf-8").splitlines():
        if line.startswith("#SBATCH "):
            found.append(line.split()[1])
        elif line and not line.startswith("#"):
            break
    return _options(found)[0]


def _state() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def sbatch(words: list[str]) -> int:
    typed, (script, *arguments) = _options(words)
    wanted = {**directives(Path(script)), **typed}
    nodes, each = int(wanted["nodes"]), int(wanted["ntasks-per-node"])
    job = {
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * each),
        "SLURM_NTASKS_PER_NODE": str(each),
        "SLURM_CPUS_PER_TASK": wanted["cpus-per-task"],
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes),
        "SLURM_PROCID": "0",  # in the batch script too
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    copy = _state() / "slurm_script"
    shutil.copy(script, copy)
    copy.chmod(0o700)
    restarts = 0
    while True:
        if restarts:
            job["SLURM_RESTART_COUNT"] = str(restarts)
        batch = subprocess.Popen([copy, *arguments], env={**os.environ, **job})
        (_state() / "batch.pid").write_text(str(batch.pid))
        status = batch.wait()
        if not (_state() / "requeued").exists():
            return status if status >= 0 else 128 - status
        (_state() / "requeued").unlink()
        restarts += 1


def scontrol(words: list[str]) -> int:
    with (_state() / "calls").open("a") as calls:
        print("scontrol", *words, file=calls)
    if words[:2] == ["show", "hostnames"]:
        print(words[2].replace(",", "\n"))
    elif words == ["requeue", JOB] and "FAKE_SLURM_REFUSES" not in os.environ:
        (_state() / "requeued").touch()
    else:
        return 1
    return 0


def srun(words: list[str]) -> int:
    options, command = _options(words)
    size = int(options.get("ntasks", os.environ["SLURM_NTASKS"]))
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    each = size // nodes
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEPID": "0",
        "SLURM_NTASKS": str(size),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})",
    }
    outside = {k: v for k, v in os.environ.items() if k != "SLURM_CPUS_PER_TASK"}
    if "SRUN_CPUS_PER_TASK" in outside:
        step["SLURM_CPUS_PER_TASK"] = outside["SRUN_CPUS_PER_TASK"]
    tasks = []
    for rank in range(size):
        own = {"PROCID": rank, "LOCALID": rank % each, "NODEID": rank // each}
        variables = {f"SLURM_{name}": str(value) for name, value in own.items()}
        tasks.append(
            subprocess.Popen(command, env={**outside, **step, **variables}, start_new_session=True)
        )

    def hand_on(number: int, frame: object) -> None:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, hand_on)
    (_state() / "started").touch()
    while (running := [t for t in tasks if t.poll() is None]) and not any(
        t.returncode for t in tasks
    ):
        time.sleep(0.05)
    if options.get("kill-on-bad-exit") == "1":
        for task in running:
            os.killpg(task.pid, signal.SIGKILL)
    codes = [task.wait() for task in tasks]
    return max((code if code >= 0 else 128 - code for code in codes), default=0)


if __name__ == "__main__":
    if re.fullmatch("sbatch|srun|scontrol", sys.argv[1]):
        sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
