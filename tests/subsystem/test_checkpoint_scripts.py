"""The scripts that work on checkpoint files."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.training.checkpoint import store
from tests.helpers.commands import REPOSITORY


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, value: float, **more: torch.Tensor) -> Path:
    weights = OrderedDict(w=torch.full((3,), float(value)), **more)
    store.save(path, {"model": weights, "last_optimizer_state": {"x": torch.ones(50)}, "n": value})
    return path


def test_average_of_files(tmp_path):
    half = torch.tensor([60000.0], dtype=torch.float16)  # their sum would overflow
    a = write(tmp_path / "a.pt", 1.0, h=half, i=torch.tensor([3]))
    b = write(tmp_path / "b.pt", 2.0, h=half, i=torch.tensor([4]))
    output = tmp_path / "avg.pt"
    script("average_checkpoints").main(["--inputs", str(a), str(b), "--output", str(output)])
    averaged = store.load(output)
    assert averaged["model"]["w"].tolist() == [1.5, 1.5, 1.5]
    assert averaged["model"]["h"].tolist() == [60000.0]
    assert averaged["model"]["i"].tolist() == [3]
    assert averaged["n"] == 1.0


@pytest.mark.parametrize(
    ("flags", "mean"),
    [
        (["--num-epoch-checkpoints", "2"], 10.5),
        (["--num-epoch-checkpoints", "2", "--checkpoint-upper-bound", "10"], 9.5),
        (["--num-update-checkpoints", "1"], 900.0),
        (["--num-best-checkpoints", "2"], 1.5),
        (["--num-best-checkpoints", "2", "--maximize"], 2.5),
    ],
)
def test_average_of_a_folder(tmp_path, flags, mean):
    for epoch in range(1, 12):
        write(tmp_path / f"checkpoint{epoch}.pt", epoch)
    for updates in (500, 900):
        write(tmp_path / f"checkpoint_1_{updates}.pt", updates)
    for value in (1, 2, 3):
        write(tmp_path / f"checkpoint.best_loss_{value}.0001.pt", value)
    output = tmp_path / "avg.out"
    script("average_checkpoints").main(["--inputs", str(tmp_path), *flags, "--output", str(output)])
    assert store.load(output)["model"]["w"][0].item() == mean


def test_average_names_what_does_not_fit(tmp_path):
    a = write(tmp_path / "a.pt", 1.0)
    b = write(tmp_path / "b.pt", 2.0, other=torch.ones(1))
    average = script("average_checkpoints")
    with pytest.raises(CheckpointError, match=r"b\.pt: is another model.*other"):
        average.average([a, b])
    with pytest.raises(ConfigError, match="has 0 such checkpoints, 3 were asked for"):
        average.last_checkpoints([tmp_path], 3, r"checkpoint(\d+)\.pt")


def test_remove_opt_state_in_place(tmp_path):
    path = write(tmp_path / "a.pt", 1.0)
    script("remove_opt_state").main([str(path)])
    assert set(store.load(path)) == {"model", "n"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
