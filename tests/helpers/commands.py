"""Run the commands from tests: in this process, which is fast, or as a user would."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq_lite_cli.entry import run_command

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def _loggers_as_they_were() -> Iterator[None]:
    """Take back what a command does to the root logger, so that the next test's capture works."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


def flite(command: str, *args: object) -> int:
    """Run `flite-{command}` in this process; return its exit status."""
    main = importlib.import_module(f"fairseq_lite_cli.{command}").main
    with _loggers_as_they_were():
        name = f"flite-{command.replace('_', '-')}"
        return run_command(name, main, [str(arg) for arg in args])


def flite_process(
    command: str, *args: object, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run `python -m fairseq_lite_cli.{command}` in a process of its own, its output captured."""
    words = [sys.executable, "-m", f"fairseq_lite_cli.{command}", *(str(arg) for arg in args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)


def left_running() -> list[str]:
    """Child processes that a command should have ended."""
    return [str(child) for child in multiprocessing.active_children()]
