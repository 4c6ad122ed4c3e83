"""Train the toy model, and tell whether two runs ended alike, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fairseq_lite.training.checkpoint import store
from tests.helpers.commands import flite
from tests.helpers.toy import ADAM, TINY_MODEL

# 200 pairs in batches of 16 are 13 updates an epoch, so 30 updates are in the middle of the third.
TOTAL = 30
FLAGS = [
    *TINY_MODEL,
    *ADAM,
    *("--batch-size", "16", "--log-format", "json", "--log-interval", "1", "--cpu"),
    *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "10", "--clip-norm", "1.0"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
]


def arguments(data: Path, save_dir: Path, *more: object) -> list[str]:
    log = save_dir.with_suffix(".log")
    words = [data, *FLAGS, "--save-dir", save_dir, "--log-file", log, *more]
    return [str(word) for word in words]


def train(data: Path, save_dir: Path, *more: object) -> None:
    assert flite("train", *arguments(data, save_dir, *more)) == 0


def updates(save_dir: Path) -> dict[str, dict[str, Any]]:
    """What the log says of each update, timings left out; one done twice must say the same."""
    found: dict[str, dict[str, Any]] = {}
    for line in save_dir.with_suffix(".log").read_text().splitlines():
        if " | train_inner | " in line:
            record = json.loads(line.split(" | train_inner | ")[1])
            for timing in ("wps", "ups", "train_wall", "wall"):
                record.pop(timing, None)
            number = record["num_updates"]
            assert found.setdefault(number, record) == record
    return found


def assert_same_end(one: Path, other: Path) -> None:
    """Equal to the last bit: weights, optimizer, and what the log said of every update."""
    files = [
        sorted(path.name for path in folder.glob("checkpoint_last*.pt")) for folder in (one, other)
    ]
    assert files[0] == files[1] != []
    for name in files[0]:
        first, second = (store.load(folder / name) for folder in (one, other))
        for part in ("model", "last_optimizer_state"):
            assert_same(first[part], second[part], f"{name}: {part}")
        iterators = [state["extra_state"]["train_iterator"] for state in (first, second)]
        assert iterators[0] == iterators[1]
    assert updates(one) == updates(other)


def assert_same(one: Any, other: Any, where: str) -> None:
    """Equal values all through nested mappings and lists, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, value in enumerate(one):
            assert_same(value, other[i], f"{where}[{i}]")
    else:
        assert one == other, where
