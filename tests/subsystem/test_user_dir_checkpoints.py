"""DeepSpeed's layer on two processes and the native one on one read each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.commands import flite_process
from tests.helpers.user_dir import TINY, USER_DIR, needs_deepspeed

pytestmark = [pytest.mark.timeout(300), needs_deepspeed]

COMMON = [
    *("--user-dir", USER_DIR, *TINY, "--cpu", "--batch-size", "8", "--num-workers", "0"),
    *("--deepspeed_moe", "enc,dec", "--num-experts", "4", "--no-drop-tokens"),
    *("--task", "translation_deepspeed", "--criterion", "model_and_base"),
    *("--loss-weights", '{"experts_gate_loss": 0.5}', "--disable-validation"),
    *("--optimizer", "adam", "--lr", "1e-3", "--log-format", "json", "--log-interval", "1"),
]


def train(data: Path, save: Path, updates: int, layer: str, processes: int) -> None:
    """As many sentences an update, whatever the number of processes."""
    done = flite_process(
        *("train", data, *COMMON, "--moe-layer", layer, "--max-update", updates),
        *("--distributed-world-size", processes, "--ep-world-size", processes),
        *("--update-freq", 2 // processes, "--save-dir", save, "--log-file", save / "train.log"),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def losses(save: Path) -> dict[int, float]:
    """Of each update in the log."""
    found = {}
    for line in (save / "train.log").read_text(encoding="utf-8").splitlines():
        if " | train_inner | " in line:
            record = json.loads(line.split(" | train_inner | ")[1])
            found[int(record["num_updates"])] = float(record["loss"])
    return found


def translations(data: Path, save: Path, layer: str) -> list[str]:
    done = flite_process(
        *("generate", data, "--user-dir", USER_DIR, "--task", "translation_deepspeed", "--cpu"),
        *("--path", save / "checkpoint_last.pt", "--max-len-b", 10, "--batch-size", 8),
        *("--model-overrides", json.dumps({"moe_layer": layer})),
    )
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("H-"))


def test_layers_and_numbers_of_processes_may_change_on_the_way(toy_data, tmp_path):
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    for folder in (straight, changing):
        folder.mkdir()
    train(toy_data, straight, 6, "native", 1)
    train(toy_data, changing, 2, "deepspeed", 2)
    train(toy_data, changing, 4, "native", 1)
    train(toy_data, changing, 6, "native", 2)
    assert losses(changing).keys() == set(range(1, 7))
    assert losses(changing) == pytest.approx(losses(straight), abs=2e-3)
    ours, theirs = (translations(toy_data, changing, each) for each in ("native", "deepspeed"))
    assert [line.split("\t")[2] for line in ours] == [line.split("\t")[2] for line in theirs]
    assert len(ours) == 20
