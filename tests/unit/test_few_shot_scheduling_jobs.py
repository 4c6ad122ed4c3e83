"""Scheduling of few-shot evaluations: who works on what, shares of a machine, needs on Slurm."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.few_shot import results
from examples.few_shot.scheduling import slurm, submissions
from examples.few_shot.scheduling.arguments import get_argparser
from examples.few_shot.scheduling.machine import Machine, share
from examples.few_shot.scheduling.plan import Job, Levels, plan_jobs
from examples.few_shot.scheduling.schedule import check_folder, shown_metrics
from examples.few_shot.scheduling.settings import ModelSettings, TaskSettings
from examples.few_shot.scheduling.slurm import Needs, needs
from examples.few_shot.scheduling.status import look
from examples.few_shot.scheduling.submissions import SLURM, Submission
from examples.few_shot.scheduling.worker import Order, order_of
from examples.few_shot.settings import PlannedEvaluation
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite_cli.alive import Process, slurm_jobs_alive


def _job(folder: Path, **params: Any) -> Job:
    levels = Levels({"nb_few_shot_samples_values": [0, 2], **params})
    model = ModelSettings("dummy", {}, {"predictor_name": "dummy"})
    (job,) = plan_jobs({"m": model}, {"t": TaskSettings("t", ["copa"])}, levels, folder).jobs
    return job


def _finish(planned: PlannedEvaluation, **changed: Any) -> None:
    found = {
        "format": results.FORMAT,
        "complete": True,
        "settings": dict(planned.settings),
        "preferred_metric": "accuracy",
        "accuracy": {"mean": 50.0},
    }
    results.write_results(planned.results_file, {**found, **changed})


def _dead() -> Process:
    """A process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    found = Process.of(done.pid)
    done.wait()
    return found


# -- how far a job is


def test_an_evaluation_is_complete_only_with_the_jobs_own_settings(tmp_path: Path):
    job = _job(tmp_path)
    none, two = job.evaluations
    assert look([job])[0].missing == (none, two)
    _finish(none)
    _finish(two, settings={**two.settings, "scoring": "other"})
    (status,) = look([job])
    assert (status.completed, status.missing, status.todo) == ((none,), (two,), (two,))
    none.results_file.write_text(none.results_file.read_text()[:-20])
    assert look([job])[0].todo == (none, two)


def test_what_somebody_works_on_is_left_to_them_even_with_override(tmp_path: Path):
    job = _job(tmp_path)
    none, two = job.evaluations
    _finish(none)
    for each in (none, two):
        assert submissions.claim(each, Submission.of_process("other", os.getppid()))
    (status,) = look([job])
    assert status.completed == (none,)  # whoever has made it need not be asked any more
    assert [each for each, _ in status.submitted] == [two] and status.todo == ()
    (status,) = look([job], override=True)
    assert [each for each, _ in status.submitted] == [none, two] and status.todo == ()


def test_override_does_again_and_recalculation_only_what_is_complete(tmp_path: Path):
    job = _job(tmp_path)
    none, two = job.evaluations
    _finish(none)
    assert look([job], override=True)[0].todo == (none, two)
    assert look([job], recalculate=True)[0].todo == (none,)


def test_a_trial_and_the_whole_are_not_made_at_the_same_time(tmp_path: Path):
    job = _job(tmp_path, num_trials=2)
    none, two = job.evaluations
    one, other = two.by_trial()
    assert none.by_trial() == [none] and (one.trial, other.trial) == (0, 1)

    def busy(of: PlannedEvaluation, with_override: bool = False) -> bool:
        (status,) = look([dataclasses.replace(job, evaluations=(of,))], override=with_override)
        assert bool(status.todo) != bool(status.submitted)
        return bool(status.submitted)

    theirs = Submission.of_process("other", os.getppid())
    assert submissions.claim(one, theirs)
    assert busy(one) and busy(two) and busy(two, True) and not busy(other)
    submissions.release([one])
    assert submissions.claim(two, theirs)
    assert busy(one) and busy(other) and busy(two)
    submissions.release([two])
    assert not any(map(busy, (one, other, two)))
    # Complete results are those of every trial.
    _finish(two)
    assert look([dataclasses.replace(job, evaluations=(one, other))])[0].completed == (one, other)


# -- who works on an evaluation


def test_of_two_only_one_gets_an_evaluation_until_it_lets_go(tmp_path: Path):
    (each, _) = _job(tmp_path).evaluations
    theirs, mine = Submission.of_process("a", os.getppid()), Submission.of_process("b")
    assert submissions.claim(each, theirs) and not submissions.claim(each, mine)
    assert submissions.read(each) == theirs
    submissions.release([each])
    assert submissions.claim(each, mine) and submissions.claim(each, mine)
    assert [path.name for path in each.results_file.parent.iterdir()] == [
        each.results_file.name + ".submitted"
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": 1}', '{"process": {}}'])
def test_a_file_that_says_nothing_blocks_nothing(tmp_path: Path, text: str):
    (each, _) = _job(tmp_path).evaluations
    each.results_file.parent.mkdir(parents=True)
    submissions.marker(each).write_text(text)
    assert submissions.read(each) is None
    assert submissions.claim(each, Submission.of_process("a"))


def test_a_process_that_has_ended_blocks_nothing(tmp_path: Path):
    job = _job(tmp_path)
    each, _ = job.evaluations
    dead = dataclasses.replace(Submission.of_process("a"), process=_dead())
    assert submissions.claim(each, dead)
    assert look([job])[0].submitted == ()
    assert submissions.claim(each, Submission.of_process("b"))


def test_of_two_that_find_a_dead_marker_in_one_moment_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (each, _) = _job(tmp_path).evaluations
    submissions.record(each, Submission("a", submissions.HERE, _dead()))
    living, others = submissions.living, []

    def another_looks_too(found: Any) -> set[Submission]:
        monkeypatch.setattr(submissions, "living", living)
        others.append(os.fork())
        if others[0] == 0:
            try:
                os._exit(int(submissions.claim(each, Submission.of_process("other"))))
            finally:
                os._exit(2)
        # It is through now, unless it waits for this one.
        until = time.monotonic() + 0.3
        while time.monotonic() < until and not _has_ended(others[0]):
            time.sleep(0.01)
        return living(found)

    monkeypatch.setattr(submissions, "living", another_looks_too)
    got = submissions.claim(each, Submission.of_process("b"))
    _, status = os.waitpid(others[0], 0)
    assert (got, os.waitstatus_to_exitcode(status)) == (True, 0)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_a_later_process_with_the_same_number_is_another_one():
    me = Process.of(os.getpid())
    assert me.is_alive and not dataclasses.replace(me, began="long ago").is_alive


def test_nobody_knows_of_another_machines_process():
    other = Process("elsewhere", 1)
    assert other.is_alive and not other.is_here


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that knows the jobs in a file, and says so as Slurm does when it knows none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    known = folder / "jobs"
    known.write_text("")
    (folder / "squeue").write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\n'
        f"if [ -s {known} ]; then cat {known}; exit 0; fi\n"
        'echo "slurm_load_jobs error: Invalid job id specified" >&2\nexit 1\n'
    )
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return known


def test_slurm_is_asked_once_for_all_jobs_element_by_element(squeue: Path):
    squeue.write_text("4711_0\n4712\n")
    assert slurm_jobs_alive(["4711_0", "4711_1", "4712", "4713"]) == {"4711_0", "4712"}
    calls = (squeue.parent / "calls").read_text().splitlines()
    assert len(calls) == 1 and "--array" in calls[0] and "4711_0,4711_1,4712,4713" in calls[0]
    assert slurm_jobs_alive([]) == set()


def test_slurm_forgets_jobs_that_have_ended(squeue: Path):
    assert slurm_jobs_alive(["4711_0"]) == set()


def test_where_slurm_cannot_be_asked_jobs_count_as_alive(
    squeue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    by = Submission("a", SLURM, _dead(), "4711_0")
    assert not submissions.living([by]) and submissions.can_tell(by)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_jobs_alive(["4711_0"]) is None
    assert submissions.living([by]) == {by} and not submissions.can_tell(by)
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact controller' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    assert slurm_jobs_alive(["4711_0"]) is None


# -- this machine


@pytest.mark.parametrize(
    ("machine", "asked", "jobs", "gpus", "found", "said"),
    [
        (Machine(8), 4, 9, 1, (4, 2, ()), ""),
        (Machine(8), 4, 2, 1, (2, 4, ()), ""),
        (Machine(2), 8, 9, 1, (2, 1, ()), "-j 8: 2 core(s) here, so 2 job(s) at a time"),
        (Machine(8, None, ("0", "1")), 1, 9, 2, (1, 8, ()), ""),
        (Machine(8, None, tuple("0123")), 2, 9, 1, (2, 4, (("0", "1"), ("2", "3"))), ""),
        (Machine(8, None, tuple("0123")), 4, 9, 2, (2, 4, (("0", "1"), ("2", "3"))), "4 GPU(s)"),
        (Machine(8, None, ("0",)), 4, 9, 2, (1, 8, ()), "1 GPU(s) here and 2 for a job"),
        (Machine(8, None, tuple("012")), 3, 9, 0, (3, 2, (("0",), ("1",), ("2",))), ""),
    ],
)
def test_a_machine_is_shared_out_within_its_limits(
    machine: Machine, asked: int, jobs: int, gpus: int, found: tuple[Any, ...], said: str
):
    each, reason = share(machine, asked, jobs, gpus)
    assert (each.jobs, each.threads, each.gpus) == found
    assert said in reason and bool(said) == bool(reason)


def test_a_share_is_told_to_processes_and_a_smaller_one_that_was_asked_for_is_kept():
    each, _ = share(Machine(8, 16 << 30, ("3", "5")), 2, 2)
    environ = each.environ(1, {"A": "b"})
    assert environ == {"A": "b", "OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "5"}
    assert each.environ(0, {"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "1"
    assert each.environ(0, {"OMP_NUM_THREADS": "64"})["OMP_NUM_THREADS"] == "4"
    assert "8.0 GB" in str(each) and "4 core(s)" in str(each)
    with pytest.raises(ConfigError, match="-j 0: expected 1 or more"):
        share(Machine(8), 0, 1)


def test_this_machine_has_cores():
    assert 1 <= Machine.here(cpu=True).cores <= (os.cpu_count() or 1)


def test_gpus_are_those_that_processes_would_see(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert Machine.here().gpus == ("2", "5")
    assert Machine.here(cpu=True).gpus == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Machine.here().gpus == ()


# -- Slurm


def test_a_models_setting_wins_over_the_flags_of_slurm():
    args = get_argparser("x", {}, {}, {}, {}).parse_args(
        ["--slurm-nodes", "3", "--slurm-partition", "p", "--slurm-array-parallelism", "7",
         "--slurm-mail-user", "me@example.org", "--slurm-time", "60"]
    )  # fmt: skip
    free = needs(ModelSettings("m"), args)
    assert (free.nodes, free.partition, free.parallel, free.minutes) == (3, "p", 7, 60)
    own = needs(ModelSettings("m", {}, {}, 2, 8, 1, 4, 5, partition="q", mem="9G"), args)
    assert own == Needs(2, 8, 1, 4, 5, 60, "q", None, "9G", "me@example.org", "FAIL")
    assert (
        needs(ModelSettings("m"), get_argparser("x", {}, {}, {}, {}).parse_args([])).parallel == 3
    )


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        (Needs(gpus_per_node=1), 1),
        (Needs(gpus_per_node=8), 8),
        (Needs(nodes=2, gpus_per_node=8), 16),
        (Needs(nodes=2, gpus_per_node=8, ntasks_per_node=8), 16),
        (Needs(gpus_per_node=0, ntasks_per_node=4), 4),
        (Needs(nodes=2, gpus_per_node=0), 2),
    ],
)
def test_processes_of_a_job(wanted: Needs, size: int):
    assert wanted.world_size == size


def test_without_gpus_none_are_asked_for():
    args = get_argparser("x", {}, {}, {}, {}).parse_args(["--cpu"])
    found = needs(ModelSettings("m", {}, {}, 2, 8), args)
    assert (found.gpus_per_node, found.world_size) == (0, 2)


def test_needs_in_submitits_words():
    found = Needs(gpus_per_node=2, mail_user="me", mail_type="END").parameters("a b")
    assert found["name"] == "a_b_few_shot"
    assert found["slurm_mem"] == "116GB" and found["slurm_array_parallelism"] == 3
    assert (found["slurm_mail_user"], found["slurm_mail_type"]) == ("me", "END")
    none = Needs(gpus_per_node=0, mail_type="FAIL").parameters("a")
    assert none["slurm_mem"] is None and none["slurm_mail_type"] is None
    assert none["gpus_per_node"] is None


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job of submitit's, in this process."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "DEBUG_1")


@pytest.mark.usefixtures("debug")
def test_a_job_says_that_it_works_on_its_evaluations_while_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = _job(tmp_path)
    seen = []

    def execute(order: Order, ranks: int) -> list[str]:
        seen.extend(submissions.read(each) for each in job.evaluations)
        return ["one mistake", "another"] if len(seen) > 2 else []

    monkeypatch.setattr(slurm, "execute", execute)
    remote = slurm.RemoteJob(order_of(job, job.evaluations))
    assert remote() == "2 evaluations"
    assert [each.process for each in seen if each] == [Process.of(os.getpid())] * 2
    with pytest.raises(RuntimeError, match="one mistake\nanother"):
        remote()
    assert not any(submissions.marker(each).exists() for each in job.evaluations)


@pytest.mark.parametrize(
    ("rank", "array", "number"), [(0, {"ARRAY_JOB_ID": 4711, "ARRAY_TASK_ID": 3}, "4711_3"),
                                  (0, {}, "4714"), (1, {}, None)],
)  # fmt: skip
def test_in_a_job_of_slurms_the_first_task_writes_its_number(
    rank: int, array: dict[str, int], number: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    pytest.importorskip("submitit")
    said = {"JOB_ID": 4714, "NTASKS": 2, "PROCID": rank, "LOCALID": rank, **array}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in said.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    job = _job(tmp_path)
    # As whoever submits has marked it, under the same number.
    for each in job.evaluations:
        submissions.record(each, Submission("t.m", SLURM, _dead(), number or "4714"))
    seen: list[Submission | None] = []

    def execute(order: Order, ranks: int) -> list[str]:
        assert ranks == 2
        seen.extend(submissions.read(each) for each in job.evaluations)
        return []

    monkeypatch.setattr(slurm, "execute", execute)
    slurm.RemoteJob(order_of(job, job.evaluations))()
    me = Process.of(os.getpid())
    for by in seen:
        assert by is not None and by.kind == SLURM
        assert (by.job_id == number and by.process == me) if rank == 0 else by.process != me
    assert len(seen) == 2
    # The first lets go.
    left = [submissions.marker(each).exists() for each in job.evaluations]
    assert left == [rank != 0] * 2


@pytest.mark.usefixtures("debug")
def test_a_job_whose_time_is_over_goes_back_with_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = _job(tmp_path)
    none, two = job.evaluations
    _finish(two)  # of an earlier run, which --override-completed makes anew
    back = []

    def execute(order: Order, ranks: int) -> list[str]:
        _finish(none)
        back.append(remote.checkpoint())
        raise SystemExit(255)  # as submitit does then

    monkeypatch.setattr(slurm, "execute", execute)
    remote = slurm.RemoteJob(order_of(job, job.evaluations, override=True))
    with pytest.raises(SystemExit):
        remote()
    assert back[0].function.order.only == (str(two.results_file),)
    assert all(submissions.marker(each).exists() for each in job.evaluations)


def test_tasks_of_submitits_local_executor_meet(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    env = SimpleNamespace(cluster="local", num_tasks=3, global_rank=2, local_rank=2, job_id="41234")
    with slurm.meeting_point(env):
        found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        assert found == {"RANK": "2", "WORLD_SIZE": "3", "MASTER_PORT": str(10000 + 1234)}
    assert "RANK" not in os.environ
    for other in ({"cluster": "slurm"}, {"num_tasks": 1}):
        with slurm.meeting_point(SimpleNamespace(**{**vars(env), **other})):
            assert "RANK" not in os.environ


# -- orders and lines


def test_an_order_means_the_evaluations_it_was_made_for(tmp_path: Path):
    job = _job(tmp_path)
    none, two = job.evaluations
    order = order_of(job, [two], world_size=4)
    (found,) = order.planned()
    assert (found.results_file, found.settings) == (two.results_file, two.settings)
    assert found.options.distributed_world_size == 4
    assert order_of(job, [none, two]).without([none]).only == (str(two.results_file),)
    first, second = two.by_trial()[:2]
    order = order_of(job, [none, first, second])
    assert order.only == tuple(str(each.product) for each in (none, first, second))
    assert [each.trial for each in order.planned()] == [None, 0, 1]
    assert order.without([none, first]).only == (str(second.product),)
    own = _job(tmp_path, distributed_world_size=2)
    assert order_of(own, [two], world_size=4).planned()[0].options.distributed_world_size == 2


def test_main_metrics_are_told_apart_by_what_differs(tmp_path: Path):
    none, two = _job(tmp_path).evaluations
    _finish(none)
    _finish(two, accuracy={"mean": None})
    assert shown_metrics([none]) == "accuracy 50.00"
    assert shown_metrics([none, two]) == "accuracy 50.00 (k=0), accuracy undefined (k=2)"
    assert shown_metrics([none, two] * 3) == "accuracy 50.00 (mean of 3)"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    check_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file; expected a folder"):
        check_folder(tmp_path / "file" / "b")


def test_a_folder_without_permission_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(DataError, match=f"no permission to write in {tmp_path}"):
        check_folder(tmp_path / "a")
