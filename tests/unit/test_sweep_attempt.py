"""Attempts at runs: what is executed, how it ends, and what the record says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.sweeps import attempt, grid, state

Attempt, Child, claimed = attempt.Attempt, attempt.Child, attempt.claimed
Record, Run, State = state.Record, grid.Run, state.State

# Runs that do not end by themselves: one that saves when told to, as flite-train does, and one that
# does not hear. The quotes keep the word out of the head of the log, which has the command.
_FOREVER = "echo be''gun; for i in $(seq 3000); do sleep 0.02; done"
PATIENT = f"trap 'echo the process was asked to end; exit 0' TERM USR1; {_FOREVER}"
STUBBORN = f"sleep 90 & trap '' TERM; {_FOREVER}"


def run_of(folder: Path, script: str, **more: object) -> Run:
    return Run("x", folder, ("sh", "-c", script), **more)


def execute(run: Run, before: Record | None = None) -> Record:
    done = Attempt(run, claimed(run, before, State.RUNNING)).execute()
    assert state.load(run.save_dir) == done
    return done


def log(folder: Path) -> list[str]:
    return (folder / state.LOG).read_text().splitlines()


def wait_for_the_end_of(*groups: int) -> bool:
    """Whether all processes of these groups have gone in a while."""

    def living() -> set[int]:
        found = set()
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # Behind the name: state, parent, group.
                how, _, group = path.read_text().rpartition(")")[2].split()[:3]
                found |= {int(group)} if how not in "ZX" else set()
        return found.intersection(groups)

    end = time.monotonic() + 5
    while living() and time.monotonic() < end:
        time.sleep(0.02)
    return not living()


@pytest.fixture
def interrupt():
    """Send this process a signal, as somebody else would, once a log has a word."""
    kept = {}

    def after(path: Path, word: str, number: int, handler=None) -> None:
        def look(timer: int, frame: object) -> None:
            if path.exists() and word in path.read_text():
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.raise_signal(number)

        if handler is not None:
            kept[number] = signal.signal(number, lambda number, frame: handler())
        kept[signal.SIGALRM] = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 0.03, 0.03)

    yield after
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_run_that_ends_well(tmp_path):
    done = execute(run_of(tmp_path, "echo out; echo warning: err >&2"))
    assert (done.state, done.exit_code, done.error, done.attempt) == (State.FINISHED, 0, "", 1)
    assert done.started <= done.ended
    head, *rest = log(tmp_path)
    assert head.startswith("sweep: attempt 1, ") and "sh -c" in head and "fairseq-lite" in head
    assert rest == ["out", "warning: err"]


def test_the_launcher_starts_the_command_and_not_the_steps(tmp_path):
    steps = (f"echo step $0 >>{tmp_path}/said",)
    run = run_of(tmp_path, "echo $X", launcher=("env", "X=launched"), post_steps=steps)
    assert execute(run).state is State.FINISHED
    assert log(tmp_path)[-1] == "launched"
    record = state.load(tmp_path)
    assert record is not None and record.command == run.command
    assert len((tmp_path / "said").read_text().splitlines()) == 1


def test_a_run_that_fails_says_why(tmp_path):
    done = execute(run_of(tmp_path, "echo flite-train: error: no data >&2; exit 2"))
    assert (done.state, done.exit_code) == (State.FAILED, 2)
    assert done.error == "flite-train: error: no data"


def test_a_command_that_is_not_there(tmp_path):
    run = Run("x", tmp_path, ("no-such-command", "--lr"))
    done = execute(run)
    assert (done.state, done.exit_code) == (State.FAILED, 127)
    assert done.error == "sweep: error: cannot start no-such-command: No such file or directory"


@pytest.mark.parametrize("script", ["kill -TERM $$", "exit 143", "exit 130", ASKED := (
    "echo the process was asked to end; echo done training in 1 seconds"
)])  # fmt: skip
def test_a_run_that_somebody_ended_was_interrupted(tmp_path, script):
    assert execute(run_of(tmp_path, script)).state is State.INTERRUPTED


def test_a_run_that_was_killed_failed(tmp_path):
    done = execute(run_of(tmp_path, "kill -KILL $$"))
    assert (done.state, done.exit_code) == (State.FAILED, -9)
    assert "memory" in done.error


def test_attempts_and_seconds_add_up(tmp_path):
    first = execute(run_of(tmp_path, "echo error: first; exit 1"))
    second = execute(run_of(tmp_path, "sleep 0.1; exit 1"), first.at(State.FAILED, seconds=100.0))
    assert second.attempt == 2
    assert 100.1 <= second.seconds < 110
    assert second.error == "ended with status 1, and said nothing", "the first attempt's is old"


def test_the_record_while_it_runs_names_the_process(tmp_path):
    script = f"cat {tmp_path / state.RECORD}; echo $$"
    execute(run_of(tmp_path, f"sleep 0.3; {script}"))
    *lines, pid = log(tmp_path)[1:]
    assert f' "pid": {pid},' in lines
    assert ' "state": "running",' in lines


def test_steps_afterwards(tmp_path):
    run = run_of(tmp_path, "echo run", post_steps=("echo one; true", "echo two"))
    assert execute(run).state is State.FINISHED
    assert log(tmp_path)[1:] == ["run", "one", "two"]


def test_a_step_that_fails_fails_the_run(tmp_path):
    done = execute(run_of(tmp_path, "true", post_steps=("exit 3", "echo never")))
    assert (done.state, done.exit_code) == (State.FAILED, 3)
    assert done.error == "the step 'exit 3' of --post-steps ended with status 3"
    assert len(log(tmp_path)) == 1


def test_no_steps_after_a_failure(tmp_path):
    execute(run_of(tmp_path, "exit 1", post_steps=("echo never",)))
    assert len(log(tmp_path)) == 1


def test_modules_are_looked_for_in_the_copied_code_first(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    execute(run_of(tmp_path, "echo $PYTHONPATH", python_path="copy"))
    assert log(tmp_path)[1] == f"copy{os.pathsep}mine"


def test_ctrl_c_ends_the_run_which_saves(tmp_path, interrupt, capsys):
    interrupt(tmp_path / state.LOG, "begun", signal.SIGINT)
    run = run_of(tmp_path, PATIENT)
    with pytest.raises(KeyboardInterrupt):
        Attempt(run, claimed(run, None, State.RUNNING)).execute()
    record = state.load(tmp_path)
    assert record is not None and record.state is State.INTERRUPTED
    assert log(tmp_path)[1:] == ["begun", "the process was asked to end"]
    assert "x saves and ends" in capsys.readouterr().err


def test_a_signal_while_a_process_is_started_leaves_none_behind(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def interrupted(*args, **more):
        started.append(popen(*args, **more))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return started[0]

    run = run_of(tmp_path, "sleep 90")
    going = Attempt(run, claimed(run, None, State.RUNNING))
    monkeypatch.setattr(attempt, "version", str)
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        going.execute()
    monkeypatch.undo()
    assert started[0].returncode == -signal.SIGTERM
    assert wait_for_the_end_of(started[0].pid)


def test_a_run_that_does_not_end_is_killed_with_its_processes(tmp_path, interrupt, monkeypatch):
    monkeypatch.setattr(attempt, "GRACE_SECONDS", 0.2)

    def sigterm() -> None:
        raise SystemExit(143)

    interrupt(tmp_path / state.LOG, "begun", signal.SIGTERM, sigterm)
    run = run_of(tmp_path, STUBBORN)
    with pytest.raises(SystemExit):
        Attempt(run, claimed(run, None, State.RUNNING)).execute()
    record = state.load(tmp_path)
    assert record is not None and record.state is State.INTERRUPTED
    assert wait_for_the_end_of(record.pid)


def test_a_handler_may_wait_for_the_process_that_is_being_waited_for(tmp_path, interrupt):
    """As when Slurm's warning comes: the handler ends the run, then the job."""

    def make_room() -> None:
        going.give_back(signal.SIGUSR1)
        sys.exit(1)

    run = run_of(tmp_path, PATIENT)
    going = Attempt(run, claimed(run, None, State.RUNNING, "17"))
    interrupt(tmp_path / state.LOG, "begun", signal.SIGUSR2, make_room)
    with pytest.raises(SystemExit):
        going.execute()
    record = state.load(tmp_path)
    assert record is not None and (record.state, record.job) == (State.SUBMITTED, "17")
    assert log(tmp_path)[-1] == "the process was asked to end"


def test_one_of_several_machines_keeps_no_record(tmp_path):
    done = Attempt(run_of(tmp_path, "echo other"), None).execute()
    assert done.state is State.FINISHED
    assert log(tmp_path) == ["other"]
    assert state.load(tmp_path) is None


def test_a_child_hears_no_signal_it_shall_not(tmp_path):
    with open(tmp_path / "log", "wb") as out:
        child = Child(["sh", "-c", "kill -USR2 $$; echo alive"], out, {}, signal.SIGUSR2)
        child.start()
        assert child.wait(10) and child.exit_code == 0
        other = Child(["sh", "-c", "kill -USR2 $$; echo alive"], out, {})
        other.start()
        assert other.wait(10) and other.exit_code == -signal.SIGUSR2


def test_the_snapshot_runs_on_its_own(tmp_path):
    code = tmp_path / "code"
    (code / "old").mkdir(parents=True)
    attempt.snapshot(code)
    assert sorted(path.name for path in code.iterdir()) == ["fairseq_lite", "fairseq_lite_cli"]
    mark = code / "fairseq_lite" / "__init__.py"
    mark.write_text(mark.read_text() + 'print("the copy")\nraise SystemExit\n')
    train = code / "fairseq_lite_cli" / "train.py"
    run = Run("x", tmp_path, (sys.executable, str(train)), python_path=str(code))
    assert execute(run).state is State.FINISHED
    assert "the copy" in log(tmp_path)
