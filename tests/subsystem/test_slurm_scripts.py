"""The job templates on a make-believe cluster: a warned job saves, goes back, and goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fake_slurm
from tests.helpers.commands import REPOSITORY
from tests.helpers.hosts import Processes, wait_until
from tests.helpers.training import TOTAL, arguments, assert_same_end, train

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

TEMPLATES = ["train.sbatch", "train_torchrun.sbatch"]
FOLDER = REPOSITORY / "scripts" / "slurm"
QUIET = ("--no-epoch-checkpoints", "--disable-validation")


class Cluster:
    """Jobs of one test."""

    def __init__(self, tmp_path: Path, processes: Processes) -> None:
        self.state = tmp_path / "slurm"
        self.state.mkdir()
        self._processes = processes
        self._path = f"{fake_slurm.install(tmp_path / 'bin')}:{os.environ['PATH']}"

    def submit(self, *words: object, **environ: str) -> subprocess.Popen[bytes]:
        settings = {"PATH": self._path, "FAKE_SLURM": str(self.state), "OMP_NUM_THREADS": ""}
        return self._processes.start(["sbatch", *words], **{**settings, **environ})

    def signal(self, number: signal.Signals) -> None:
        """As Slurm sends one to the batch script, once its step runs."""
        assert wait_until(lambda: (self.state / "started").exists(), 20)
        os.kill(int((self.state / "batch.pid").read_text()), number)

    def calls(self) -> str:
        calls = self.state / "calls"
        return calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_asks_for(name: str) -> None:
    assert subprocess.run(["bash", "-n", FOLDER / name]).returncode == 0
    wanted = fake_slurm.directives(FOLDER / name)
    assert "requeue" in wanted
    assert wanted["open-mode"] == "append", "a requeued job must not overwrite its log"
    warning = re.fullmatch(r"B:USR1@(\d+)", wanted["signal"])
    assert warning is not None and int(warning[1]) >= 120


# -- what the job does when its step ends, or is told to ----------------------------------------

# In the place of Python: a rank that saves on the signal and ends, or ends by itself.
RANK = """#!/bin/bash
echo "$SLURM_CPUS_PER_TASK $OMP_NUM_THREADS" > "$FAKE_SLURM/threads"
trap 'echo saved >> "$FAKE_SLURM/saved"; exit 0' USR1
trap 'exit 0' TERM
[[ -n ${ENDS:-} ]] && exit "$ENDS"
touch "$FAKE_SLURM/waiting"
for _ in {1..400}; do sleep 0.05; done
"""


def run_job(
    tmp_path: Path, name: str, send: signal.Signals | None = None, **environ: str
) -> tuple[int, str, bool]:
    """The job's status, what it told scontrol, and whether its rank saved."""
    rank = tmp_path / "rank"
    rank.write_text(RANK)
    rank.chmod(0o755)
    with Processes(tmp_path) as processes:
        cluster = Cluster(tmp_path, processes)
        cluster.submit(FOLDER / name, "data-bin", PYTHON=str(rank), **environ)
        if send is not None:
            assert wait_until(lambda: (cluster.state / "waiting").exists(), 20)
            cluster.signal(send)
        (status,) = processes.wait(30)
        assert wait_until(lambda: not processes.alive(), 5)
    calls = [line for line in cluster.calls().splitlines() if "show hostnames" not in line]
    return status, "\n".join(calls), (cluster.state / "saved").exists()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("status", [0, 2, 137])
def test_the_jobs_status_is_the_steps(tmp_path: Path, name: str, status: int) -> None:
    assert run_job(tmp_path, name, ENDS=str(status)) == (status, "", False)


@pytest.mark.parametrize(
    ("name", "given", "threads"),
    [
        ("train.sbatch", {}, "4 4"),
        ("train.sbatch", {"OMP_NUM_THREADS": "3"}, "4 3"),
        ("train_torchrun.sbatch", {}, "32 32"),
        ("train_torchrun.sbatch", {"NPROC": "8"}, "32 4"),
        ("train_torchrun.sbatch", {"SLURM_GPUS_ON_NODE": "64"}, "32 1"),
    ],
)
def test_ranks_share_the_cores(
    tmp_path: Path, name: str, given: dict[str, str], threads: str
) -> None:
    """What the step is told: cores of a task, threads of a rank."""
    run_job(tmp_path, name, ENDS="0", **given)
    assert (tmp_path / "slurm" / "threads").read_text().strip() == threads


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cancelled_job_does_not_come_back(tmp_path: Path, name: str) -> None:
    assert run_job(tmp_path, name, signal.SIGTERM) == (143, "", False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_job_that_cannot_go_back_has_saved(tmp_path: Path, name: str) -> None:
    status, calls, saved = run_job(tmp_path, name, signal.SIGUSR1, FAKE_SLURM_REFUSES="1")
    assert (status, calls, saved) == (1, f"scontrol requeue {fake_slurm.JOB}", True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_job_does_not_go_back_for_ever(tmp_path: Path, name: str) -> None:
    assert run_job(tmp_path, name, signal.SIGUSR1, MAX_REQUEUES="0") == (1, "", True)


# -- training -----------------------------------------------------------------------------------

# In the first attempt only, both ranks wait in the same update until the signal has come.
IS_WARNED = '''
"""Slurm warns the job in mid-training, once."""

import os
import signal
import time
from pathlib import Path

from fairseq_lite.training.trainer import Trainer

state, train_step = Path(os.environ["FAKE_SLURM"]), Trainer.train_step


def is_warned(self, batches):
    if self.state.num_updates == 12 and "SLURM_RESTART_COUNT" not in os.environ:
        if self.world.is_main:
            os.kill(int((state / "batch.pid").read_text()), signal.SIGUSR1)
        end = time.monotonic() + 30
        while not self._stop_asked and time.monotonic() < end:
            time.sleep(0.05)
    return train_step(self, batches)


Trainer.train_step = is_warned
'''


@pytest.fixture(scope="module")
def uninterrupted(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "checkpoints"
    train(toy_data, folder, "--max-update", TOTAL, "--distributed-world-size", 2, *QUIET)
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_warned_job_goes_on_to_the_same_end(
    name: str, toy_data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    plugin = tmp_path / "is_warned"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(IS_WARNED)
    folder = tmp_path / "checkpoints"
    words = arguments(toy_data, folder, *QUIET, "--max-update", TOTAL, "--user-dir", plugin)
    with Processes(tmp_path) as processes:
        cluster = Cluster(tmp_path, processes)
        options = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
        cluster.submit(*options, FOLDER / name, *words, PYTHON=sys.executable)
        assert processes.wait(120) == [0], processes.output()
        assert wait_until(lambda: not processes.alive(), 5)
    assert f"scontrol requeue {fake_slurm.JOB}" in cluster.calls()
    log = folder.with_suffix(".log").read_text()
    assert "asked to end" in log
    assert "checkpoint_last.pt (epoch 2 @ 13 updates)" in log
    assert_same_end(folder, uninterrupted)
