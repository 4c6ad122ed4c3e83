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
from fairseq_lite.training.checkpoint.scratch import Scratch
from fairseq_lite_cli.entry import run_command
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


ENDINGS = ("-rank-0", "-rank-1", "-shared", "-rank-0-shard0")


def test_remove_opt_state_of_every_file_of_a_checkpoint(tmp_path, capsys):
    for ending in ENDINGS:
        write(tmp_path / f"checkpoint_last{ending}.pt", 1.0)
    write(tmp_path / "checkpoint_last2-rank-0.pt", 1.0)  # another checkpoint
    target = tmp_path / "new" / "eval"
    remove = script("remove_opt_state").main
    remove([str(tmp_path / "checkpoint_last"), str(target), "--nproc", "3"])
    expected = {f"checkpoint_eval{ending}.pt" for ending in ENDINGS}
    assert {path.name for path in target.iterdir()} == expected
    assert all(set(store.load(path)) == {"model", "n"} for path in target.iterdir())

    cut = target / "checkpoint_eval-shared.pt"
    cut.write_bytes(cut.read_bytes()[:-200])
    capsys.readouterr()
    again = ["--save-dir", str(target), "--resume-failed"]
    remove([str(tmp_path / "checkpoint_last.pt"), *again])
    lines = capsys.readouterr().out.splitlines()
    assert sum("is there already" in line for line in lines) == 3
    assert store.load(cut)["n"] == 1.0


def test_remove_opt_state_of_one_file_by_its_prefix(tmp_path):
    write(tmp_path / "checkpoint_last.pt", 2.0)
    remove = script("remove_opt_state").main
    remove([str(tmp_path / "checkpoint_last"), str(tmp_path)])  # the call of the gshard guide
    assert set(store.load(tmp_path / "checkpoint_eval.pt")) == {"model", "n"}
    remove([str(tmp_path / "checkpoint_last"), "--save-prefix", "small"])
    assert store.load(tmp_path / "small.pt")["n"] == 2.0
    assert "last_optimizer_state" in store.load(tmp_path / "checkpoint_last.pt")
    for words, message in (
        (["checkpoint_none", "."], "no checkpoint of this name"),
        (["checkpoint_last", ".", "x"], "expected PREFIX DEST"),
        (["checkpoint_last", ".", "--output", "x.pt"], "expected PREFIX DEST"),
        (["checkpoint_last", "--nproc", "0"], "expected 1 or more"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            remove([str(tmp_path / words[0]), *words[1:]])


def test_consolidating_what_is_no_set_of_shards(tmp_path, capsys):
    path = write(tmp_path / "a.pt", 1.0)
    module = script("consolidate_shards")
    words = [str(tmp_path / "a"), "--output", str(tmp_path / "b.pt")]
    assert run_command("consolidate_shards", module.main, words) == 2
    assert capsys.readouterr().err == f"consolidate_shards: error: {path}: is one file already\n"
    words[0] = str(tmp_path / "none")
    assert run_command("consolidate_shards", module.main, words) == 2
    assert "none.pt: no such checkpoint" in capsys.readouterr().err
    write(tmp_path / "c-shard0.pt", 1.0)
    words[0] = str(tmp_path / "c")
    assert run_command("consolidate_shards", module.main, words) == 2
    assert "c-shard0.pt: has neither a table" in capsys.readouterr().err
    assert not (tmp_path / "b.pt").exists()


def test_tensors_put_together_in_a_file(tmp_path, monkeypatch):
    scratch = Scratch(tmp_path)
    a = scratch.allocate((3, 5), torch.float32).fill_(2.0)
    b = scratch.allocate((70_000,), torch.bfloat16).fill_(1.0)
    assert scratch.allocate((0, 4), torch.float32).shape == (0, 4)
    store.save(tmp_path / "x.pt", {"model": {"a": a, "b": b}})
    assert (tmp_path / "x.pt").stat().st_size < 160_000  # no more than the tensors
    model = store.load(tmp_path / "x.pt")["model"]
    assert torch.equal(model["a"], a) and torch.equal(model["b"], b)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CheckpointError, match="no room to put tensors together: No space left"):
        scratch.allocate((3,), torch.float32)
