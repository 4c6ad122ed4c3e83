"""Killed in mid-save and in mid-epoch, then started again: as if it had never stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fairseq_lite.training.checkpoint import store
from tests.helpers.commands import REPOSITORY
from tests.helpers.toy import ADAM, TINY_MODEL

# Runs flite-train, and dies at the N-th byte of the K-th save, or right after update U.
KILLER = textwrap.dedent(
    """
    import os, signal, sys
    from fairseq_lite.training import trainer
    from fairseq_lite.training.checkpoint import store
    from fairseq_lite_cli.train import main

    kind, at, *argv = sys.argv[1:]

    def die():
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    saves = 0
    save, write, step = store.save_temporary, store._Recorder.write, trainer.Trainer.train_step

    def counting_save(*args):
        global saves
        saves += 1
        save(*args)

    def dying_write(self, data):
        done = write(self, data)
        if saves == int(at) and self._file.tell() > 3000:
            self._file.flush()
            die()
        return done

    def dying_step(self, batches):
        result = step(self, batches)
        if self.state.num_updates == int(at):
            die()
        return result

    if kind == "save":
        store.save_temporary, store._Recorder.write = counting_save, dying_write
    if kind == "update":
        trainer.Trainer.train_step = dying_step
    main(argv)
    """
)


def train(data: Path, save: Path, *flags: str, die: tuple[str, int] = ("never", 0)) -> dict:
    """Run flite-train; returns update -> loss as logged."""
    argv = [str(data), *TINY_MODEL, *ADAM, "--save-dir", str(save), "--batch-size", "8"]
    argv += ["--num-workers", "1", "--max-update", "40", "--save-interval-updates", "6"]
    argv += ["--log-format", "json", "--log-interval", "1", "--clip-norm", "0.5", *flags]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, die[0], str(die[1]), *argv],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=REPOSITORY,
    )
    expected = 0 if die[0] == "never" else -signal.SIGKILL
    assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-3000:]
    losses = {}
    for line in done.stdout.splitlines():
        if "| train_inner | " in line:
            values = json.loads(line.split("| train_inner | ")[1])
            losses[int(values["num_updates"])] = (values["loss"], values["gnorm"], values["lr"])
    return losses


@pytest.fixture(scope="module")
def uninterrupted(toy_data, tmp_path_factory):
    save = tmp_path_factory.mktemp("whole")
    return train(toy_data, save), save / "checkpoint_last.pt"


@pytest.mark.parametrize(
    "die",
    # 25 updates an epoch: in the second epoch, and in the save at its end.
    [("update", 33), ("save", 5)],
    ids=lambda die: f"{die[0]}-{die[1]}",
)
def test_a_killed_run_goes_on_bit_for_bit(toy_data, uninterrupted, tmp_path, die):
    whole, reference = uninterrupted
    train(toy_data, tmp_path, die=die)
    losses = train(toy_data, tmp_path)
    assert losses and min(losses) > 1  # it did not begin anew
    assert losses == {update: whole[update] for update in range(min(losses), 41)}
    ours, theirs = store.load(tmp_path / "checkpoint_last.pt"), store.load(reference)
    assert all(torch.equal(ours["model"][k], v) for k, v in theirs["model"].items())
    assert ours["extra_state"]["train_iterator"] == theirs["extra_state"]["train_iterator"]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_comparison_sees_a_run_that_forgets_its_place(toy_data, uninterrupted, tmp_path):
    """The planted bug: everything is restored but where in the data the run was."""
    whole, _ = uninterrupted
    train(toy_data, tmp_path, die=("update", 10))
    losses = train(toy_data, tmp_path, "--reset-dataloader")
    assert min(losses) == 7
    assert losses[7] != whole[7]
