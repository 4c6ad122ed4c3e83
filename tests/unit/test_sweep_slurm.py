"""Runs as Slurm's jobs: what is asked for, that nothing is submitted twice, and what jobs do."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from fairseq_lite.errors import ConfigError, DataError, MissingDependency
from tests.helpers.sweeps import FOLDER, control, grid, hyperparam, options, slurm, state

State = state.State

# Slurm, as far as submitting is concerned: sbatch keeps the script and counts, squeue looks into a
# file of jobs, and srun is only looked for.
SBATCH = """\
cd "$(dirname "$0")"
n=$(($(cat count 2>/dev/null || echo 100) + 1))
if [ -e refuses ]; then
    echo "sbatch: error: invalid partition specified: $(cat refuses)" >&2
    exit 1
fi
echo $n >count
cp "$1" job.$n
echo $n >>jobs
echo "Submitted batch job $n"
"""
SQUEUE = 'grep -x "$5" "$(dirname "$0")/jobs"\nexit 0\n'


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("submitit")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (("sbatch", SBATCH), ("squeue", SQUEUE), ("srun", "")):
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def get_grid(args):
    return [hyperparam("--lr", [1, 2], save_dir_key=lambda v: f"lr{v}")]


def sweep(folder: Path, *words: str) -> None:
    fixed = ["-p", "s", "-g", "8", "-t", "-1", "--checkpoints-dir", str(folder / "out")]
    control.conduct([*fixed, "--script", "train.py", *words], get_grid, None, None, None, None)


def submitted(cluster: Path) -> list[str]:
    """The job scripts, in the order in which they came."""
    return [path.read_text() for path in sorted(cluster.glob("job.*"))]


def asked(script: str) -> dict[str, str]:
    """The #SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def test_what_is_asked_for(tmp_path, cluster):
    sweep(
        tmp_path,
        *("-n", "2", "--partition", "learnaccel", "--constraint", "volta32gb", "--mem", "400G"),
        *("--time", "3-00:00:00", "--comment", "a remark", "--reservation", "mine", "--exclusive"),
    )
    found = [asked(script) for script in submitted(cluster)]
    assert {one["job-name"] for one in found} == {"s.lr1.ngpu16", "s.lr2.ngpu16"}
    for one in found:
        wanted = {
            "nodes": "2",
            "ntasks-per-node": "1",
            "gpus-per-node": "8",
            "cpus-per-task": "64",
            "partition": "learnaccel",
            "constraint": "volta32gb",
            "mem": "400G",
            "time": "4320",
            "comment": "'a remark'",
            "reservation": "mine",
            "exclusive": "",
            "signal": "USR2@180",
            "requeue": "",
        }
        assert {name: one.get(name) for name in wanted} == wanted
    setup = submitted(cluster)[0]
    assert f"export PYTHONPATH={FOLDER}" in setup and "export SRUN_CPUS_PER_TASK=" in setup


def test_what_is_not_typed_is_left_to_slurm(tmp_path, cluster):
    sweep(tmp_path)
    for one in map(asked, submitted(cluster)):
        assert not {"partition", "constraint", "mem", "dependency", "reservation"} & one.keys()


def test_nothing_is_submitted_twice(tmp_path, cluster, capsys):
    sweep(tmp_path)
    sweep(tmp_path)
    assert len(submitted(cluster)) == 2
    lines = capsys.readouterr().out.splitlines()
    assert sum(": submitted as job 10" in line for line in lines) == 2
    assert sum("skipped, as it is submitted as job 10" in line for line in lines) == 2
    rows = [line.split() for line in lines if line.startswith("s.lr")]
    assert [row[1] for row in rows] == ["submitted"] * 4


def test_a_job_that_slurm_lost_is_submitted_again(tmp_path, cluster, capsys):
    sweep(tmp_path)
    (cluster / "jobs").write_text("102\n")
    sweep(tmp_path)
    assert "submitted as job 103, starts where it was interrupted" in capsys.readouterr().out
    assert len(submitted(cluster)) == 3
    jobs = [state.load(folder).job for folder in (tmp_path / "out").glob("s.lr*")]
    assert sorted(jobs) == ["102", "103"]


def test_one_after_the_other(tmp_path, cluster):
    sweep(tmp_path, "--sequential", "--dep", "7")
    assert [asked(script)["dependency"] for script in submitted(cluster)] == [
        "afterany:7",
        "afterany:101",
    ]


def test_what_sbatch_refuses_leaves_nothing_behind(tmp_path, cluster):
    (cluster / "refuses").write_text("nowhere")
    with pytest.raises(ConfigError, match="not submitted: .*invalid partition.*nowhere") as error:
        sweep(tmp_path)
    assert "\n" not in str(error.value)
    folders = list((tmp_path / "out").glob("s.lr*"))
    assert [state.state_of(folder) for folder in folders] == [(State.NEW, None)]


def test_a_dry_run_submits_nothing_and_needs_no_slurm(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    sweep(tmp_path, "--dry-run", "--partition", "p")
    assert not (tmp_path / "out").exists()
    assert "slurm_partition=p" in capsys.readouterr().out


def language_models(args):
    return [
        hyperparam("--task", "language_modeling"),
        hyperparam("--arch", "transformer_lm_gpt2_tiny"),
        hyperparam("--optimizer", "adam"),
        hyperparam("--max-update", 3),
        hyperparam("--batch-size", 2),
        hyperparam("--lr", [1, 2], save_dir_key=lambda v: f"lr{v}"),
    ]


def test_a_data_folder_that_is_none_is_told_before_anything_is_submitted(tmp_path, cluster, capsys):
    words = ["-p", "s", "-g", "1", "-t", "-1", "--checkpoints-dir", str(tmp_path / "out")]
    data = f"{tmp_path}:{tmp_path / 'gone'}"
    for here in ([], ["--local"]):
        with pytest.raises(DataError, match="/gone: no such data folder.*; nothing was started$"):
            control.conduct([*words, *here, "-d", data], language_models, None, None, None, None)
    assert submitted(cluster) == [] and not (tmp_path / "out" / "s.lr1.ngpu1").exists()
    data = str(tmp_path / "gone")
    control.conduct([*words, "-d", data, "--dry-run"], language_models, None, None, None, None)
    line = f"not there yet: -d {data}: no such data folder; make it with flite-preprocess"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    control.conduct([*words, "-d", str(tmp_path)], language_models, None, None, None, None)
    assert len(submitted(cluster)) == 2


def test_what_a_script_prepares_is_looked_for_when_it_has(tmp_path, cluster, capsys):
    words = ["-p", "s", "-g", "1", "-t", "1", "--checkpoints-dir", str(tmp_path / "out")]
    made = tmp_path / "made"

    def with_data(args):
        args.data = str(made)
        return language_models(args)

    def prepare(args):
        made.mkdir()

    control.conduct([*words, "--dry-run"], with_data, None, None, prepare, None)
    assert "not there yet" not in capsys.readouterr().out
    control.conduct(words, with_data, None, None, prepare, None)
    assert len(submitted(cluster)) == 1


def test_an_allocation_is_needed_with_as_many_machines(tmp_path, cluster, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    sweep(tmp_path, "--salloc", "--dry-run")  # which needs none
    with pytest.raises(ConfigError, match="--salloc: no allocation .* type salloc first"):
        sweep(tmp_path, "--salloc")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(ConfigError, match="--salloc -n 3: this allocation has 2 machine"):
        sweep(tmp_path, "--salloc", "-n", "3")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="--salloc: no allocation"):
        sweep(tmp_path, "--salloc")
    assert not (tmp_path / "out").exists()


def test_without_submitit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MissingDependency, match=r"pip install 'fairseq-lite\[slurm\]'; or --local"):
        sweep(tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_slurm(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no sbatch here, so no Slurm: add --local"):
        sweep(tmp_path)
    assert not (tmp_path / "out").exists()


# -- jobs, through submitit's executor for debugging ---------------------------------------------


def job(folder: Path, script: str, before: state.Record | None = None) -> slurm.Job:
    folder.mkdir(exist_ok=True)
    if before is not None:
        state.store(folder, before)
    return slurm.Job(grid.Run("x", folder, ("sh", "-c", script)))


@pytest.fixture
def in_job(monkeypatch) -> None:
    """This process is job 17."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "debug")
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "17")


def claim(how_far: State, **more: object) -> state.Record:
    return state.Record(how_far, **{**state.this_process(), **more})


def test_a_job_that_an_executor_runs(tmp_path):
    package = pytest.importorskip("submitit")
    words = ["-p", "s", "-g", "1", "-t", "1"]
    queue = slurm.Queue(options.read(words, None, None), tmp_path / "jobs", cluster="debug")
    run = job(tmp_path / "run", "echo trained").run
    number = queue.submit(run)
    assert number.startswith("DEBUG")
    work = package.core.utils.DelayedSubmission(slurm.Job(run))
    os.environ["SUBMITIT_DEBUG_JOB_ID"] = number
    try:
        assert work.result() == "finished"
    finally:
        del os.environ["SUBMITIT_DEBUG_JOB_ID"]
    record = state.load(run.save_dir)
    assert record is not None and (record.state, record.job) == (State.FINISHED, number)


def test_a_job_whose_run_fails_fails(tmp_path, in_job):
    work = job(tmp_path, "echo error: no memory; exit 1", claim(State.SUBMITTED, job="17"))
    with pytest.raises(RuntimeError, match="x: error: no memory"):
        work()
    record = state.load(tmp_path)
    assert record is not None and (record.state, record.attempt) == (State.FAILED, 1)


@pytest.mark.parametrize(
    "other",
    [
        claim(State.RUNNING),  # by a local sweep
        claim(State.RUNNING, job="16"),
        claim(State.SUBMITTED, job="16"),
    ],
)
def test_a_job_leaves_alone_what_another_works_on(tmp_path, in_job, monkeypatch, other):
    monkeypatch.setattr(state, "slurm_jobs_alive", set)
    assert "left alone" in job(tmp_path, "echo never", other)()
    assert state.load(tmp_path) == other
    assert not (tmp_path / state.LOG).exists()


@pytest.mark.parametrize(
    "mine",
    [
        claim(State.SUBMITTED),  # the number is not noted yet
        claim(State.SUBMITTED, job="17"),
        claim(State.RUNNING, job="17"),  # Slurm itself has put it back into the queue
    ],
)
def test_a_job_takes_up_its_own(tmp_path, in_job, monkeypatch, mine):
    monkeypatch.setattr(state, "slurm_jobs_alive", set)
    assert job(tmp_path, "true", mine)() == "finished"


def test_of_several_machines_one_keeps_the_record(tmp_path, in_job, monkeypatch):
    from submitit.local.debug import DebugJobEnvironment

    monkeypatch.setattr(DebugJobEnvironment, "global_rank", 1)
    assert job(tmp_path, "echo rank 1")() == "finished"
    assert state.load(tmp_path) is None


def test_a_job_that_must_make_room_saves_and_comes_back(tmp_path, in_job):
    """What submitit does at a signal: `checkpoint`, requeue, exit, all inside the handler."""
    script = (
        "trap 'echo saved; exit 0' USR1; echo be''gun; kill -USR2 $PPID; "
        "for i in $(seq 3000); do sleep 0.02; done"
    )
    work = job(tmp_path, script, claim(State.SUBMITTED, job="17"))
    again = []

    def make_room(number: int, frame: object) -> None:
        again.append(work.checkpoint())
        sys.exit(-1)

    before = signal.signal(signal.SIGUSR2, make_room)
    try:
        with pytest.raises(SystemExit):
            work()
    finally:
        signal.signal(signal.SIGUSR2, before)
    record = state.load(tmp_path)
    assert record is not None and (record.state, record.job) == (State.SUBMITTED, "17")
    assert (tmp_path / state.LOG).read_text().endswith("begun\nsaved\n")
    (delayed,) = again
    back = delayed.function
    back.run = grid.Run("x", tmp_path, ("true",))
    assert back() == "finished"
