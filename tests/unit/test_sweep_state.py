"""How far a run is, judged by its folder; and what a sweep does about it."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.helpers.sweeps import control, grid, state

Record, Run, State = state.Record, grid.Run, state.State

ENDED = "2026-01-01 | INFO | fairseq_lite.training.run | done training in 6.8 seconds"
ASKED = "2026-01-01 | INFO | run | Stopping training because the process was asked to end"


def running(**changes: object) -> Record:
    return dataclasses.replace(
        Record(State.RUNNING, command=("python", "train"), **state.this_process()), **changes
    )


def write(folder: Path, record: Record | None = None, log: str | None = None) -> Path:
    if record is not None:
        state.store(folder, record)
    if log is not None:
        (folder / state.LOG).write_text(log)
    return folder


def test_a_folder_that_is_not_there_is_new(tmp_path):
    assert state.state_of(tmp_path / "none") == (State.NEW, None)
    assert state.state_of(tmp_path) == (State.NEW, None)


@pytest.mark.parametrize("how_far", [State.FINISHED, State.FAILED, State.INTERRUPTED])
def test_what_is_over_is_as_recorded(tmp_path, how_far):
    record = running(error="no memory", exit_code=2).at(how_far)
    write(tmp_path, record, log=f"{ENDED}\n")
    assert state.state_of(tmp_path) == (how_far, record)


def test_a_process_that_lives_is_running(tmp_path):
    write(tmp_path, running())
    assert state.state_of(tmp_path)[0] is State.RUNNING


def test_a_process_that_has_gone_was_interrupted(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    write(tmp_path, running(pid=gone.pid), log="some words\n")
    assert state.state_of(tmp_path)[0] is State.INTERRUPTED


def test_a_process_that_nobody_has_waited_for_has_gone(tmp_path):
    child = subprocess.Popen(["sleep", "60"])
    try:
        record = running(**state.child(child.pid) | {"keeper": 0})
        assert state.is_alive(record)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not state.is_alive(record)
    finally:
        child.wait()


def test_another_process_with_its_number_is_not_it(tmp_path):
    write(tmp_path, running(began="another boot:1"))
    assert state.state_of(tmp_path)[0] is State.INTERRUPTED


def test_a_process_of_another_machine_is_left_alone(tmp_path):
    write(tmp_path, running(host=socket.gethostname() + "x", pid=1))
    assert state.state_of(tmp_path)[0] is State.RUNNING


def test_a_run_that_outlived_its_sweep_and_finished(tmp_path):
    write(tmp_path, running(began="?"), log=f"{state.ATTEMPT}1\n{ENDED}\n")
    assert state.state_of(tmp_path)[0] is State.FINISHED


def test_steps_that_nobody_executed_are_not_forgotten(tmp_path):
    write(tmp_path, running(began="?", steps=1), log=f"{state.ATTEMPT}1\n{ENDED}\n")
    assert state.state_of(tmp_path)[0] is State.INTERRUPTED


def test_a_run_that_was_asked_to_end_has_not_finished(tmp_path):
    write(tmp_path, running(began="?"), log=f"{ASKED}\n{ENDED}\n")
    assert state.state_of(tmp_path)[0] is State.INTERRUPTED


def test_only_the_last_attempt_counts(tmp_path):
    earlier = f"{state.ATTEMPT}1\n{ENDED}\n{state.ATTEMPT}2\n"
    write(tmp_path, running(began="?"), log=earlier)
    assert state.state_of(tmp_path)[0] is State.INTERRUPTED
    write(tmp_path, log=f"{state.ATTEMPT}1\n{ASKED}\n{ENDED}\n{state.ATTEMPT}2\n{ENDED}\n")
    assert state.state_of(tmp_path)[0] is State.FINISHED


def test_a_long_log_is_judged_by_its_end(tmp_path):
    noise = "a line of the log\n" * 40_000
    write(tmp_path, running(began="?"), log=f"{state.ATTEMPT}1\n{noise}{ENDED}\n")
    assert state.state_of(tmp_path)[0] is State.FINISHED


def test_folders_of_fairseqs_sweeps(tmp_path):
    # What is on standard error says nothing: fairseq's sweeps took any of it for a failure.
    write(tmp_path, log=f"epoch 1\n{ENDED}\n")
    (tmp_path / "train.stderr.17").write_text("UserWarning: a warning\n")
    assert state.state_of(tmp_path) == (State.FINISHED, None)
    write(tmp_path, log="epoch 1\n")
    (tmp_path / "train.stderr.17").write_text("")
    how_far, record = state.state_of(tmp_path)
    assert how_far is State.FAILED
    assert record is not None and "done training" in record.error


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"state": "odd"}', '{"state": "finished"}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, damage):
    (tmp_path / state.RECORD).write_text(damage)
    assert state.load(tmp_path) is None
    assert state.state_of(tmp_path) == (State.NEW, None)


def test_a_record_comes_back_as_it_was(tmp_path):
    record = running(attempt=3, seconds=1.5, job="17_2", error="ü").at(State.FAILED)
    state.store(tmp_path, record)
    assert state.load(tmp_path) == record
    assert os.listdir(tmp_path) == [state.RECORD], "nothing else is left"


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    command = folder / "squeue"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "alive"),
    [
        ('test "$*" = "--noheader --array --format=%i --jobs 17" && echo 17', True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
    ],
)
def test_jobs_live_while_slurm_says_so(tmp_path, monkeypatch, script, alive):
    fake_squeue(tmp_path, monkeypatch, script)
    assert state.is_alive(running(job="17", began="?")) is alive


def test_where_slurm_cannot_be_asked_jobs_are_left_alone(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert state.is_alive(running(job="17", host="elsewhere"))


@pytest.mark.parametrize(
    ("lines", "code", "error"),
    [
        (["a", "flite-train: error: no data", ""], 2, "flite-train: error: no data"),
        (["Traceback", "ValueError: x", "done"], 1, "ValueError: x"),
        (["just words"], 1, "just words"),
        ([], 7, "ended with status 7, and said nothing"),
        (["error: x"], -9, "killed (signal 9); if nobody killed it, the machine ran out of memory"),
        (["error " + "x" * 900], 1, "error " + "x" * 233 + "…"),
    ],
)
def test_an_error_in_one_line(lines, code, error):
    assert state.error_of(lines, code) == error


def test_one_at_a_time(tmp_path):
    order = []

    def second() -> None:
        with state.locked(tmp_path):
            order.append("second")

    with state.locked(tmp_path):
        other = threading.Thread(target=second)
        other.start()
        other.join(0.2)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_a_claim_is_taken_back_unless_somebody_went_on(tmp_path):
    claim, before = running(), running(seconds=3.0).at(State.FAILED)
    state.store(tmp_path, claim)
    state.take_back(tmp_path, claim, before)
    assert state.load(tmp_path) == before
    state.store(tmp_path, claim)
    state.take_back(tmp_path, claim, None)
    assert state.state_of(tmp_path) == (State.NEW, None)
    state.store(tmp_path, claim.at(State.FINISHED))
    state.take_back(tmp_path, claim, None)
    assert state.state_of(tmp_path)[0] is State.FINISHED


@pytest.mark.parametrize(
    ("how_far", "flags", "start", "words"),
    [
        (State.NEW, "", True, "starts"),
        (State.INTERRUPTED, "", True, "where it was interrupted"),
        (State.FAILED, "", False, r"failed \(--resume-failed goes on\): no memory"),
        (State.FAILED, "failed", True, "after its failure: no memory"),
        (State.FINISHED, "failed", False, "has finished"),
        (State.FINISHED, "finished", True, "once more"),
        (State.RUNNING, "failed finished", False, "is running on h .process 5."),
        (State.SUBMITTED, "failed finished", False, "is submitted on h"),
    ],
)
def test_what_is_done_about_a_run(how_far, flags, start, words):
    record = Record(how_far, host="h", pid=5, error="no memory")
    plan = control.plan(
        how_far,
        record,
        resume_failed="failed" in flags,
        resume_finished="finished" in flags,
    )
    assert plan.start is start
    assert re.search(words, plan.words)


def test_other_flags_in_the_same_folder_are_told():
    command = (sys.executable, "-m", "t", "data", "--lr", "1", "--fp16", "--log-interval", "1")
    other = ("python", "-m", "t", "more", "--lr", "2", "--cap=-1", "--log-interval", "9")
    run = Run("x", Path("x"), other)
    told = control.changed(Record(State.FINISHED, command=command), run)
    assert told == (
        "; other flags than before: what is run was -m t data and is -m t more, "
        "--lr was 1 and is 2, --fp16 was given and is not given, --cap was not given and is -1"
    )
    assert control.changed(None, run) == control.changed(Record(State.NEW), run) == ""
    assert control.changed(Record(State.FINISHED, command=other), run) == ""
