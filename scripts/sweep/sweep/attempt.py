"""One attempt at a run: execute its command, and keep its record from beginning to end.

The same here and in a job of Slurm's.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fairseq_lite
from fairseq_lite.errors import DataError

from . import state
from .grid import Run
from .state import Record, State

# How long a run may take to save when it is told to end: that of the job templates.
GRACE_SECONDS = 150.0
# Statuses of a command that somebody ended.
_ENDED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
# Signals that may end a sweep, or a job of it.
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A shell's status where there is no such command.
_NO_COMMAND = 127
_GIT_SECONDS = 10
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5


class Child:
    """A process of its own session, which Ctrl-C at a terminal does not reach.

    Args:
        command: words, or a line for the shell.
        log: where its output goes.
        env: its environment.
        deaf_to: a signal it shall not hear.
    """

    def __init__(
        self,
        command: Sequence[str] | str,
        log: BinaryIO,
        env: dict[str, str],
        deaf_to: int | None = None,
    ) -> None:
        self._command, self._log, self._env, self._deaf_to = command, log, env, deaf_to
        self._shell = isinstance(command, str)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it.

        Raises:
            OSError: there is no such command.
        """
        with _signals_later():
            self._process = subprocess.Popen(
                self._command,
                shell=self._shell,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
                preexec_fn=None if self._deaf_to is None else self._go_deaf,
            )

    def _go_deaf(self) -> None:
        assert self._deaf_to is not None
        signal.signal(self._deaf_to, signal.SIG_IGN)

    @property
    def pid(self) -> int:
        """Its number, once it has been started."""
        assert self._process is not None
        return self._process.pid

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most so long; whether it has."""
        end = None if seconds is None else time.monotonic() + seconds
        pause = _FIRST_PAUSE
        while not self._has_ended():
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _has_ended(self) -> bool:
        # Not `Popen.poll`: it holds a lock, and a signal's handler that comes in between, and waits
        # for the same process, would never see it end.
        if self._process is not None and self._process.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # the other one of the two has just seen it
                return True
            if pid == 0:
                return False
            self._process.returncode = os.waitstatus_to_exitcode(status)
        return True

    @property
    def exit_code(self) -> int:
        """Its status, once it has ended; negative: the signal that ended it."""
        assert self._process is not None
        return self._process.returncode

    def end(self, number: int = signal.SIGTERM) -> None:
        """Tell it to end, and end it with all that belongs to it when it does not."""
        try:
            if not self.wait(0):
                # A command tells its own processes; a shell does not.
                self._signal(number, everybody=self._shell)
            self.wait(GRACE_SECONDS)
        finally:  # also after a second Ctrl-C
            self.kill()

    def kill(self) -> None:
        """End it, and all that it started and left, at once."""
        if self._process is not None:
            self._signal(signal.SIGKILL, everybody=True)
            self.wait()

    def _signal(self, number: int, *, everybody: bool) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            (os.killpg if everybody else os.kill)(self.pid, number)


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Keep signals until the body is done.

    One that came between the start of a process and the next line would leave a process of which
    nobody knows.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    held = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN, signal.SIG_DFL)}
    for number in held:
        signal.signal(number, lambda one, frame: came.append(one))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(one)


class Attempt:
    """One attempt at a run.

    Args:
        run: what to execute.
        record: of the run, as it was claimed; None where another process keeps it.
        deaf_to: see `Child`.
    """

    def __init__(self, run: Run, record: Record | None, deaf_to: int | None = None) -> None:
        self.run = run
        self._kept = record is not None
        self._record = record or Record(State.RUNNING)
        self._deaf_to = deaf_to
        self._began = time.time()
        self._before = self._record.seconds
        self._child: Child | None = None
        self._returned = False

    def execute(self) -> Record:
        """Execute the run and its further steps.

        What ends this process (Ctrl-C, SIGTERM) ends the run first, which saves: the record says
        that it can go on.

        Returns:
            The record: finished, failed, or interrupted when somebody told the run to end.
        """
        run = self.run
        self._write(State.RUNNING, started=_now(), ended="", exit_code=None, error="")
        with open(run.save_dir / state.LOG, "ab") as log:
            self._head(log)
            try:
                code = self._one((*run.launcher, *run.command), log)
                done = self._judge(code)
                for step in run.post_steps if done.state is State.FINISHED else ():
                    code = self._one(step, log)
                    if code:
                        error = f"the step {step!r} of --post-steps ended with status {code}"
                        done = done.at(State.FAILED, exit_code=code, error=error)
                        break
            except BaseException as e:
                try:
                    if self._child is not None and not self._child.wait(0):
                        print(f"{run.name} saves and ends; once more kills it", file=sys.stderr)
                        self._child.end()
                finally:
                    # Slurm's handler exits when the job goes back into the queue.
                    if not (self._returned and isinstance(e, SystemExit)):
                        self._close(self._record.at(State.INTERRUPTED))
                raise
        return self._close(done)

    def _one(self, command: Sequence[str] | str, log: BinaryIO) -> int:
        """Execute a command to its end; returns its status."""
        env = dict(os.environ)
        if self.run.python_path is not None:
            paths = [self.run.python_path, env.get("PYTHONPATH", "")]
            env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self._child = Child(command, log, env, self._deaf_to)
        try:
            self._child.start()
        except OSError as e:
            log.write(f"sweep: error: cannot start {command[0]}: {e.strerror}\n".encode())
            log.flush()
            return _NO_COMMAND
        self._write(State.RUNNING, **state.child(self._child.pid))
        self._child.wait()
        return self._child.exit_code

    def give_back(self, number: int) -> None:
        """Tell the run to save and end, as its job goes back into the queue."""
        if self._child is not None:
            self._child.end(number)
        self._returned = True
        self._write(State.SUBMITTED, seconds=self._seconds())

    def _judge(self, code: int) -> Record:
        lines = state.last_attempt(self.run.save_dir / state.LOG) or []
        if code in _ENDED or (code == 0 and state.was_asked_to_end(lines)):
            return self._record.at(State.INTERRUPTED, exit_code=code)
        if code:
            error = state.error_of(lines, code)
            return self._record.at(State.FAILED, exit_code=code, error=error)
        return self._record.at(State.FINISHED, exit_code=code)

    def _head(self, log: BinaryIO) -> None:
        """Say in the log what begins here."""
        if self._kept:
            command = shlex.join(self.run.command)
            line = f"{state.ATTEMPT}{self._record.attempt}, {_now()}, {version()}: {command}\n"
            log.write(line.encode())
            log.flush()

    def _seconds(self) -> float:
        return round(self._before + time.time() - self._began, 1)

    def _close(self, record: Record) -> Record:
        self._record = record
        self._write(record.state, ended=_now(), seconds=self._seconds())
        return self._record

    def _write(self, new: State, **changes: Any) -> None:
        self._record = self._record.at(new, **changes)
        if self._kept:
            state.store(self.run.save_dir, self._record)


def claimed(run: Run, before: Record | None, new: State, job: str | None = None) -> Record:
    """The record of a run that this process is about to execute or submit."""
    # What was submitted has not begun: it is the same attempt.
    begun = before is not None and before.state is not State.SUBMITTED
    number = 1 if before is None else before.attempt + begun
    return Record(
        state=new,
        attempt=number,
        job=job,
        seconds=0.0 if before is None else before.seconds,
        steps=len(run.post_steps),
        command=run.command,
        version=version(),
        **state.this_process(),
    )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def code_folder(package: str) -> Path:
    """Where an installed package lies."""
    return Path(str(importlib.resources.files(package)))


def version() -> str:
    """The version of the code, with git's commit where it is a checkout."""
    git = ["git", "-C", str(code_folder("fairseq_lite"))]
    # A folder of installed packages may lie in the checkout of something else.
    commit = _said([*git, "ls-files", "__init__.py"]) and _said(
        [*git, "describe", "--always", "--dirty"]
    )
    return f"fairseq-lite {fairseq_lite.__version__}" + (f" ({commit})" if commit else "")


def _said(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def snapshot(folder: Path) -> None:
    """Copy the code that runs into a folder, in place of what is there.

    Raises:
        DataError: it cannot be written.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        for package in ("fairseq_lite", "fairseq_lite_cli"):
            target = folder / package
            shutil.copytree(
                code_folder(package), target, ignore=shutil.ignore_patterns("__pycache__")
            )
    except OSError as e:
        raise DataError(f"--snapshot-code: {e.filename}: {e.strerror}") from e
