"""Killed while saving, or out of disk: the previous checkpoint still loads.

One helper process forks a child for each case; the child dies at a chosen byte or step of the save.
So torch is imported once, and the deaths are real ones.
"""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.helpers.commands import REPOSITORY

# Runs in the helper: argv is the folder, then the cases: "byte:N", "step:NAME", "limit:N".
SCRIPT = textwrap.dedent(
    """
    import os, resource, signal, sys
    from pathlib import Path
    import torch
    from fairseq_lite.errors import CheckpointError
    from fairseq_lite.training.checkpoint import store

    folder = Path(sys.argv[1])
    last = folder / "checkpoint_last.pt"

    def state(n):
        return {"model": {"w": torch.full((60_000,), float(n))}, "n": n}

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_at_byte(limit):
        written = 0
        original = store._Recorder.write
        def write(self, data):
            nonlocal written
            view = memoryview(data).cast("B")
            room = limit - written
            if room < len(view):
                original(self, view[:room])
                self._file.flush()
                die()
            written += len(view)
            return original(self, data)
        store._Recorder.write = write

    def arm(kind, value):
        if kind == "byte":
            die_at_byte(int(value))
        elif kind == "limit":  # as a full disk: writes beyond it fail
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
        elif value == "before-sync":
            os.fsync = die
        elif value == "before-rename":
            os.replace = die
        elif value == "after-rename":
            store._flush_folder = die

    store.save(last, state(0))
    previous = 0
    for number, case in enumerate(sys.argv[2:], start=1):
        kind, _, value = case.partition(":")
        pid = os.fork()
        if pid == 0:
            arm(kind, value)
            try:
                store.save(last, state(number))
            except CheckpointError as e:
                print(e, flush=True)
                os._exit(7)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if kind == "limit":
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7, status
            assert [p.name for p in folder.iterdir()] == [last.name]
        else:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        if value == "after-rename":
            previous = number
        loaded = store.load(last)
        assert loaded["n"] == previous, (case, loaded["n"])
        assert loaded["model"]["w"].eq(previous).all()
    store.remove_temporaries(folder)
    assert [p.name for p in folder.iterdir()] == [last.name]
    print("survived")
    """
)


def survive(folder: Path, *cases: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *cases],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "survived"
    return lines[:-1]


def test_killed_at_any_byte_the_previous_checkpoint_loads(tmp_path):
    size = 60_000 * 4
    rng = random.Random(3)
    at = [0, 1, 100, size, *(rng.randrange(size) for _ in range(12))]
    survive(tmp_path, *(f"byte:{n}" for n in at))


def test_killed_at_any_step_after_the_last_byte(tmp_path):
    survive(tmp_path, "step:before-sync", "step:before-rename", "step:after-rename", "byte:5000")


def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(tmp_path):
    messages = survive(tmp_path, *(f"limit:{n}" for n in (0, 70, 4096, 100_000, 239_000)))
    assert len(messages) == 5
    assert all("checkpoint_last.pt: cannot be written: File too large" in m for m in messages)
    assert all("previous file of this name is intact" in m for m in messages)
