"""Logs of training beside fairseq's, to the printed digits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.parallel.launch import launch
from fairseq_lite.training.run import train
from tests.helpers.commands import flite_process
from tests.helpers.shared import shared_dir

# Timings mean nothing, and the sixth digit of a perplexity is beyond what two machines agree on.
COMPARED = (
    "epoch",
    "update",
    "loss",
    "nll_loss",
    "wpb",
    "bsz",
    "num_updates",
    "lr",
    "gnorm",
    "clip",
)


def train_here(words: Sequence[str], fn: Any = train) -> None:
    """Run flite-train in this process, so that `fn` or a patched class can carry a bug."""
    launch(fn, parse("flite-train", list(words), load_builtins()), setup=load_builtins)


def train_inner(log: Path) -> list[dict[str, Any]]:
    """What a log file says of each update."""
    marked = [line.split(" | train_inner | ") for line in log.read_text().splitlines()]
    return [json.loads(parts[1]) for parts in marked if len(parts) == 2]


def reference_log(folder: str, variant: str, updates: int) -> list[dict[str, Any]]:
    """The first updates of a reference log, `lm` or `mt`."""
    path = shared_dir("reference", folder, "logs", f"{variant}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()][:updates]


def compared(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two logs must agree on."""
    return [{key: record[key] for key in COMPARED if key in record} for record in log]


def differ(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> bool:
    """Whether two logs differ in a number by far more than rounding."""
    least = 3e-4 if key == "loss" else 0.01  # losses are printed to 1e-4 of themselves
    pairs = [(float(m[key]), float(o[key])) for m, o in zip(ours, theirs, strict=True)]
    return any(abs(mine - other) > least * other for mine, other in pairs)


def assert_equals_reference(
    folder: str,
    variant: str,
    command_line: Callable[[str, Path, int], list[str]],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Train as a reference log was made and compare twenty updates, digit by digit.

    Args:
        folder: `lm` or `mt`.
        variant: the name of the log.
        command_line: makes the arguments of flite-train from a variant, a log file and a number
            of updates.
        work: a folder for the log.
        monkeypatch: of the test.
    """
    # The float32 norm of 400,000 numbers has an error of 1e-5, which depends on how many of them
    # the processor adds at once. Without vector instructions it is the same everywhere.
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    log = work / "log.txt"
    done = flite_process("train", *command_line(variant, log, 20), timeout=240)
    assert done.returncode == 0, done.stderr
    ours, theirs = train_inner(log), reference_log(folder, variant, updates=20)
    assert compared(ours) == compared(theirs)
    keys = [list(record) for record in theirs]
    assert [list(record) for record in ours] == keys, "same keys in the same order"
    for mine, other in zip(ours, theirs, strict=True):
        assert float(mine["ppl"]) == pytest.approx(float(other["ppl"]), rel=1e-5)
