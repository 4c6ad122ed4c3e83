"""A rank that is killed, fails or freezes ends all ranks, is named, and leaves no process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_lite.errors import DataError, DistributedError
from fairseq_lite.parallel.world import World
from fairseq_lite.plugins import import_user_dir
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.timeout(120)

REPOSITORY = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def ranks_in(folder: Path) -> list[int]:
    """The process ids the ranks wrote."""
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()]


# -- ranks of this machine ---------------------------------------------------------------------


def end_badly(world: World, folder: str, how: str) -> None:
    """The last rank ends in one way or another; the others wait for it in a collective."""
    (Path(folder) / str(os.getpid())).touch()
    world.barrier()
    if world.rank == world.size - 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "user error":
            raise DataError("train.src: line 7 is not UTF-8")
        if how == "bug":
            torch.ones(2, 3) @ torch.ones(2, 3)
    world.barrier()


@LINUX
@pytest.mark.parametrize(
    ("size", "how", "error", "said"),
    [
        (3, "killed", DistributedError, r"rank 2 died \(signal 9: killed\)"),
        (
            3,
            "frozen",
            DistributedError,
            r"rank 2 has not answered for 3 s \(host .*, process \d+\)",
        ),
        (2, "user error", DataError, r"^train.src: line 7 is not UTF-8$"),
        (2, "bug", DistributedError, r"rank 1 failed: RuntimeError: mat1 and mat2"),
    ],
)
def test_one_rank_ends_all_and_is_named(
    tmp_path: Path,
    size: int,
    how: str,
    error: type[Exception],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(error, match=said) as e:
        run_distributed(end_badly, size, str(tmp_path), how, heartbeat=3)
    ended = time.time()
    assert "\n" not in str(e.value)
    ranks = ranks_in(tmp_path)
    assert len(ranks) == size
    assert not any(map(alive, ranks))
    # From the moment the last one went in, not from the start: that is the import of torch.
    assert ended - max((tmp_path / str(pid)).stat().st_mtime for pid in ranks) < 15
    # A bug keeps its traceback, once; a user's error has none.
    assert capfd.readouterr().err.count("Traceback") == (1 if how == "bug" else 0)


def sleep(world: World) -> None:
    time.sleep(60)


def test_what_does_not_end_is_ended() -> None:
    with pytest.raises(DistributedError, match="0, 1 did not end in time"):
        run_distributed(sleep, 2, timeout=4)


# -- the whole command -------------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from fairseq_lite.config.core import CommonConfig, DistributedTrainingConfig, RunConfig
from fairseq_lite.parallel.launch import launch
from fairseq_lite_cli.entry import run_command

# A shell that runs the tests in the background has its children ignore this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
FOLDER, VICTIM, HOW = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def work(run, world):
    world.barrier()
    (FOLDER / str(os.getpid())).write_text(str(world.rank))
    if world.rank == VICTIM:
        time.sleep(0.5)
        if HOW == "raise":
            raise ZeroDivisionError("a bug of ours")
        if HOW == "wait":
            time.sleep(60)
        if HOW != "end":
            os.kill(os.getpid(), signal.Signals[HOW])
    world.barrier()
    time.sleep(0.3 * world.rank)  # ranks need not end together

def main(argv):
    flags = DistributedTrainingConfig(**json.loads(argv[3]))
    common = CommonConfig(cpu=True)
    launch(work, RunConfig("flite-train", common=common, distributed_training=flags))

if __name__ == "__main__":
    raise SystemExit(run_command("flite-train", main))
"""


def start(
    tmp_path: Path,
    victim: int,
    how: str,
    *,
    env: dict[str, str] | None = None,
    python: tuple[str, ...] = (),
    heartbeat: int = 3,
    **flags: object,
) -> subprocess.Popen[str]:
    """Start the script.

    Args:
        tmp_path: for the script and what its ranks write.
        victim: the rank to which something happens.
        how: what: a signal's name, "raise", "wait" (nothing, all wait) or "end" (nothing).
        env: the launcher's variables.
        python: options of the interpreter, such as `-m torch.distributed.run …`.
        heartbeat: --heartbeat-timeout.
        flags: --distributed-*.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    fields = {f"distributed_{name}": value for name, value in flags.items()}
    fields["heartbeat_timeout"] = heartbeat
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    environ.update({"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, **(env or {}))
    return subprocess.Popen(
        [sys.executable, *python, script, tmp_path, str(victim), how, json.dumps(fields)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that Ctrl-C can be sent to it as a terminal does
    )


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@LINUX
def test_killing_the_command_leaves_no_rank(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "wait", heartbeat=20, world_size=2)
    try:
        assert wait_until(lambda: len(ranks_in(tmp_path)) == 2, 60)
        process.kill()
        assert wait_until(lambda: not any(map(alive, ranks_in(tmp_path))), 5)
    finally:
        end(process)


@LINUX
@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_ends_all_without_a_traceback(tmp_path: Path, whole_group: bool) -> None:
    process = start(tmp_path, 0, "wait", heartbeat=20, world_size=2)
    try:
        assert wait_until(lambda: len(ranks_in(tmp_path)) == 2, 60)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=15)
        assert process.returncode == 130
        assert output.strip() == "flite-train: interrupted"
        assert not any(map(alive, ranks_in(tmp_path)))
    finally:
        end(process)


def launcher(kind: str, rank: int, size: int, port: int) -> dict[str, str]:
    """The variables a launcher sets for one rank."""
    if kind == "slurm":
        return {
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": str(size),
            "SLURM_LOCALID": str(rank),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
        }
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@LINUX
@pytest.mark.parametrize(
    ("kind", "victim", "how", "said"),
    [
        ("torchrun", 2, "SIGSTOP", "rank 2 has not answered for 3 s"),
        ("torchrun", 0, "SIGSTOP", "rank 0's machine"),
        ("torchrun", 0, "SIGKILL", "rank 0's machine"),
        ("torchrun", 0, "raise", "rank 0 stopped: ZeroDivisionError: a bug of ours"),
        ("slurm", 0, "end", ""),
    ],
)
def test_ranks_of_a_launcher_end_together(
    tmp_path: Path, kind: str, victim: int, how: str, said: str
) -> None:
    port = free_port()
    flags: dict[str, Any] = {"port": port} if kind == "slurm" else {}
    beat = 20 if how == "end" else 3  # a busy machine must not look like a dead rank
    ranks = [
        start(tmp_path, victim, how, env=launcher(kind, rank, 3, port), heartbeat=beat, **flags)
        for rank in range(3)
    ]
    try:
        for rank, process in enumerate(ranks):
            if rank == victim and how == "SIGSTOP":
                continue
            output, _ = process.communicate(timeout=60)
            if how == "end":
                assert (process.returncode, output) == (0, "")
            elif rank != victim:
                assert process.returncode not in (0, None)
                assert f"flite-train: error: {said}" in output
    finally:
        for process in ranks:
            end(process)


@LINUX
@pytest.mark.parametrize("how", ["SIGKILL", "end"])
def test_two_machines_without_a_launcher(tmp_path: Path, how: str) -> None:
    flags: dict[str, Any] = {"init_method": f"tcp://127.0.0.1:{free_port()}", "world_size": 3}
    machines = [
        start(tmp_path, 2, how, heartbeat=20, **flags, rank=rank, num_procs=count)
        for rank, count in ((0, 2), (2, 1))
    ]
    try:
        for process in machines:
            output, _ = process.communicate(timeout=60)
            if how == "end":
                assert (process.returncode, output) == (0, "")
            else:
                assert process.returncode == 2
                assert "flite-train: error: rank 2 died (signal 9: killed)" in output
        assert not any(map(alive, ranks_in(tmp_path)))
    finally:
        for process in machines:
            end(process)


@LINUX
@pytest.mark.parametrize(("how", "said"), [("SIGKILL", "Signal 9 (SIGKILL)"), ("end", "")])
def test_torchrun(tmp_path: Path, how: str, said: str) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}")
    process = start(tmp_path, 1, how, heartbeat=20, python=torchrun)
    try:
        output, _ = process.communicate(timeout=90)
        assert (process.returncode == 0) == (how == "end")
        assert said in output
        assert wait_until(lambda: not any(map(alive, ranks_in(tmp_path))), 5)
    finally:
        end(process)


PLUGIN = """
from dataclasses import dataclass
from fairseq_lite.criteria.api import CRITERIA

@dataclass(frozen=True)
class Config:
    weight: float = 1.0

@CRITERIA.register("weighted", config=Config)
class Weighted:
    pass
"""


def say_weight(world: World, choice: object) -> float:
    weight: float = choice.weight  # type: ignore[attr-defined]
    return weight * (1 + world.rank)


def test_a_plugins_classes_reach_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "my_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text(PLUGIN, encoding="utf-8")
    config = import_user_dir(folder).Config(weight=2.0)
    assert run_distributed(say_weight, 2, config, user_dir=str(folder)) == [2.0, 4.0]
