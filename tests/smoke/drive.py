"""Run one row of the table: train, resume, generate, and look at what is left behind."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed

from fairseq_lite.training.checkpoint.parts import part_files
from tests.helpers.commands import flite, left_running
from tests.helpers.toy import ADAM, TINY_MODEL
from tests.smoke.matrix import Row


def updates_in(checkpoint: Path) -> int:
    """Updates done when a checkpoint was written; also proves that it loads safely."""
    found = set()
    for path in part_files(checkpoint).values():
        state = torch.load(path, map_location="cpu", weights_only=True)
        found.add(int(state["optimizer_history"][-1]["num_updates"]))
    (updates,) = found
    return updates


def drive(row: Row, data: Path, save: Path, output) -> None:
    """Set up, checkpoint, tear down; then again from the checkpoint; then use the model.

    Args:
        row: what to run.
        data: a data folder of toy sentences.
        save: the folder for checkpoints.
        output: pytest's `capfd`.
    """
    base = [data, *TINY_MODEL, *ADAM, "--batch-size", "8", "--num-workers", "0"]
    base += [*row.train_args(), "--save-dir", save, "--log-format", "simple", "--log-interval", "1"]
    last = save / "checkpoint_last.pt"

    assert flite("train", *base, "--max-update", "2") == 0
    assert updates_in(last) == 2
    first_log = output.readouterr().out
    assert "no existing checkpoint" in first_log.lower()

    assert flite("train", *base, "--max-update", "4", "--save-interval-updates", "3") == 0
    assert updates_in(last) == 4
    assert updates_in(save / "checkpoint_1_3.pt") == 3
    second_log = output.readouterr().out
    assert f"Loaded checkpoint {last} (epoch 1 @ 2 updates)" in second_log

    search = ["--beam", "2", "--max-len-b", "10", "--batch-size", "16", "--scoring", "sacrebleu"]
    cpu = ["--cpu"] if row.device == "cpu" else []
    assert flite("generate", data, "--path", last, *search, *cpu) == 0
    printed = output.readouterr().out.splitlines()
    numbers = {line.split("\t")[0] for line in printed if line.startswith("H-")}
    assert numbers == {f"H-{i}" for i in range(20)}
    assert any(line.startswith("Generate test with beam=2: ") for line in printed)

    assert left_running() == []
    assert not torch.distributed.is_initialized()
