"""Stopped at any update, killed while training or while saving: the rest is as if it never was."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_lite.training.checkpoint import store
from tests.helpers.commands import REPOSITORY
from tests.helpers.training import TOTAL, arguments, assert_same_end, train


@pytest.fixture(scope="module")
def uninterrupted(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "checkpoints"
    train(toy_data, folder, "--max-update", TOTAL, "--no-epoch-checkpoints")
    return folder


@pytest.mark.parametrize("stop", [1, 7, 13, 20])
def test_stopped_and_resumed(
    stop: int, toy_data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    train(toy_data, folder, "--max-update", stop, "--no-epoch-checkpoints")
    train(toy_data, folder, "--max-update", TOTAL, "--no-epoch-checkpoints")
    assert_same_end(folder, uninterrupted)


def test_a_run_that_had_ended_is_not_trained_on(
    toy_data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted, folder)
    train(toy_data, folder, "--max-update", TOTAL, "--no-epoch-checkpoints")
    log = folder.with_suffix(".log").read_text()
    assert f"num_updates: {TOTAL} >= max_update: {TOTAL}" in log and "done training" in log
    assert "train_inner" not in log
    before, after = ((f / "checkpoint_last.pt").read_bytes() for f in (uninterrupted, folder))
    assert before == after


@pytest.mark.parametrize("stop", [13, 17])
def test_intervals_of_the_log_and_the_moving_average_go_on(
    stop: int, toy_data: Path, tmp_path: Path
) -> None:
    more = ("--log-interval", 5, "--store-ema", "--ema-decay", 0.9, "--ema-update-freq", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(toy_data, whole, *more, "--max-update", TOTAL, "--no-epoch-checkpoints")
    train(toy_data, parts, *more, "--max-update", stop, "--no-epoch-checkpoints")
    train(toy_data, parts, *more, "--max-update", TOTAL, "--no-epoch-checkpoints")
    assert_same_end(whole, parts)
    averages = [
        store.load(folder / "checkpoint_last.pt")["extra_state"]["ema"] for folder in (whole, parts)
    ]
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(averages[0][name], averages[1][name])
    assert not torch.equal(
        averages[0][name], store.load(whole / "checkpoint_last.pt")["model"][name]
    )


def test_a_bug_in_resuming_is_noticed(
    toy_data: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout that depends on the time since the start is what goes wrong most easily."""
    folder = tmp_path / "checkpoints"
    train(toy_data, folder, "--max-update", 7)
    monkeypatch.setattr("fairseq_lite.training.trainer.Trainer._seed_step", lambda self: None)
    train(toy_data, folder, "--max-update", TOTAL)
    with pytest.raises(AssertionError):
        assert_same_end(folder, uninterrupted)


def start(data: Path, save_dir: Path, *more: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "fairseq_lite_cli.train", *arguments(data, save_dir, *more)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY
    )


def test_killed_in_mid_epoch(toy_data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    often = ("--max-update", TOTAL, "--no-epoch-checkpoints", "--save-interval-updates", 4)
    process = start(toy_data, folder, *often, "--keep-interval-updates", 1)
    assert process.stdout is not None
    for line in process.stdout:
        if '"num_updates": "18"' in line:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert store.load(folder / "checkpoint_last.pt")["optimizer_history"][0]["num_updates"] >= 16
    train(toy_data, folder, *often)
    assert_same_end(folder, uninterrupted)


KILLS_ITSELF = '''
"""Ends the process, as kill -9 would, in the middle of writing its second checkpoint."""

import os
import signal

from fairseq_lite.training.checkpoint import store

written = {"files": 0}
real_save, real_write = store.save_temporary, store._Recorder.write


def save(path, state):
    written["files"] += 1
    real_save(path, state)


def write(self, data):
    if written["files"] == 2:
        half = bytes(data)[: max(1, len(data) // 2)]
        real_write(self, half)
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real_write(self, data)


store.save_temporary, store._Recorder.write = save, write
'''


def test_killed_in_mid_save(toy_data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "kills_itself"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(KILLS_ITSELF)
    folder = tmp_path / "checkpoints"
    often = ("--max-update", TOTAL, "--no-epoch-checkpoints", "--save-interval-updates", 9)
    process = start(toy_data, folder, *often, "--user-dir", plugin)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert any(folder.glob("*.tmp")), "the kill was in the middle of a write"
    assert store.load(folder / "checkpoint_last.pt")["optimizer_history"][0]["num_updates"] == 9
    train(toy_data, folder, *often)
    assert not any(folder.glob("*.tmp"))
    assert_same_end(folder, uninterrupted)


def test_asked_to_end_it_saves_first(toy_data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    process = start(toy_data, folder, "--max-update", 100000, "--disable-validation")
    assert process.stdout is not None
    for line in process.stdout:
        if '"num_updates": "5"' in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=30) == 0
    assert "asked to end" in rest and "done training" in rest
    done = store.load(folder / "checkpoint_last.pt")["optimizer_history"][0]["num_updates"]
    assert 5 <= done < 10000
    if done < TOTAL:
        train(toy_data, folder, "--max-update", TOTAL, "--no-epoch-checkpoints")
        assert_same_end(folder, uninterrupted)


@pytest.mark.timeout(180)
def test_sigterm_reaches_every_local_rank(toy_data: Path, tmp_path: Path) -> None:
    two = ("--distributed-world-size", 2, "--no-epoch-checkpoints", "--disable-validation")
    folder = tmp_path / "ended"
    words = arguments(toy_data, folder, *two, "--max-update", 100000)
    command = [sys.executable, "-m", "fairseq_lite_cli.train", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if '"num_updates": "5"' in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest
    assert "asked to end" in rest and "done training" in rest
    done = store.load(folder / "checkpoint_last.pt")["optimizer_history"][0]["num_updates"]
    assert 5 <= done < 100000


@pytest.mark.timeout(180)
def test_two_processes_resume(toy_data: Path, tmp_path: Path) -> None:
    two = ("--distributed-world-size", 2, "--no-epoch-checkpoints", "--disable-validation")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(toy_data, whole, *two, "--max-update", 10)
    train(toy_data, parts, *two, "--max-update", 4)
    train(toy_data, parts, *two, "--max-update", 10)
    assert_same_end(whole, parts)
