"""Mixtures of experts through flite-train: names, retention, going on, scripts, lost files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fairseq_lite.training.checkpoint import parts, store
from fairseq_lite_cli.entry import run_command
from tests.helpers.commands import flite
from tests.helpers.moe_checkpoints import write_as_gshard
from tests.helpers.sharded import digests
from tests.helpers.training import arguments, assert_same, train
from tests.subsystem.test_checkpoint_scripts import script

pytestmark = pytest.mark.timeout(400)

MIXTURE = (
    *("--moe-freq", 1, "--moe-expert-count", 4, "--moe-second-expert-policy", "all"),
    *("--criterion", "moe_label_smoothed_cross_entropy", "--moe-gate-loss-wt", 0.01),
    *("--store-ema", "--ema-decay", 0.9, "--no-epoch-checkpoints"),
)
TWO = ("--distributed-world-size", 2)
PARTS = ["shared", *(f"expert{e}" for e in range(4))]


@pytest.fixture(scope="module")
def trained(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that wrote its parts in the background."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    often = ("--save-interval-updates", 4, "--keep-interval-updates", 3, "--save-async")
    train(toy_data, folder, *MIXTURE, *TWO, *often, "--max-update", 16)
    return folder


def test_names_and_retention_are_of_all_parts(trained: Path) -> None:
    names = ("2_8", "2_12", "3_16", "best", "last")
    expected = {f"checkpoint_{name}-{part}.pt" for name in names for part in PARTS}
    assert {path.name for path in trained.glob("*.pt*")} == expected
    for part in PARTS:
        last, best = (trained / f"checkpoint_{name}-{part}.pt" for name in ("last", "3_16"))
        assert last.read_bytes() == best.read_bytes()
    shared, *experts = (
        store.load(path) for path in parts.part_files(trained / "checkpoint_last.pt").values()
    )
    assert shared["cfg"]["model"]["moe_expert_count"] == 4
    for state in experts:  # little beside the expert's tensors
        assert state["optimizer_history"] == shared["optimizer_history"]
        assert "cfg" not in state and "bundle" not in parts.own(state)


def test_resumed_on_as_many_ranks_nothing_differs(
    trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    start = ("--restore-file", trained / "checkpoint_2_8.pt")
    train(toy_data, folder, *MIXTURE, *TWO, *start, "--max-update", 16)
    for part in PARTS:
        one, other = (store.load(path / f"checkpoint_last-{part}.pt") for path in (trained, folder))
        for key in ("model", "last_optimizer_state"):
            assert_same(one[key], other[key], key)
        for state in (one, other):
            for key in ("previous_training_time", "metrics"):
                state["extra_state"].pop(key, None)
        assert_same(one["extra_state"], other["extra_state"], "extra_state")


def test_one_process_goes_on_and_writes_parts(
    trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "alone"
    start = ("--restore-file", trained / "checkpoint_last-expert1.pt")
    train(toy_data, folder, *MIXTURE, *start, "--max-update", 16)  # restores, has nothing to do
    assert "(epoch 3 @ 16 updates)" in folder.with_suffix(".log").read_text()
    train(toy_data, folder, *MIXTURE, *start, "--max-update", 17)
    files = parts.part_files(folder / "checkpoint_last.pt")
    assert list(files) == PARTS
    state = parts.whole_state(folder / "checkpoint_last.pt")
    steps = {entry["step"] for entry in state["last_optimizer_state"]["state"].values()}
    assert steps == {17}


def test_gshards_files_are_read_by_every_command(
    trained: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs.pt"
    write_as_gshard(trained / "checkpoint_last.pt", theirs, 4, 2)
    for name in ("dict.src.txt", "dict.tgt.txt"):
        shutil.copy(trained / name, tmp_path)
    expected = hypotheses(toy_data, trained / "checkpoint_last.pt", capsys)
    assert hypotheses(toy_data, theirs, capsys) == expected
    # A run goes on with the weights; the optimizer's state goes by positions.
    folder = tmp_path / "on"
    train(toy_data, folder, *MIXTURE, "--restore-file", theirs, "--max-update", 1)
    log = folder.with_suffix(".log").read_text()
    assert "theirs.pt holds no optimizer state: the optimizer starts anew" in log
    (tmp_path / "theirs-rank-1.pt").unlink()
    assert flite("generate", toy_data, "--path", theirs, "--cpu") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'theirs-rank-1.pt'}: is missing" in error


@pytest.mark.parametrize("lost", ["shared", "expert0", "expert3"])
def test_a_lost_part_is_no_fresh_start(
    lost: str, trained: Path, toy_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "save"
    folder.mkdir()
    for path in trained.glob("checkpoint_last-*.pt"):
        shutil.copy(path, folder)
    gone = folder / f"checkpoint_last-{lost}.pt"
    gone.unlink()
    words = [str(word) for word in (toy_data, "--path", folder / "checkpoint_last.pt", "--cpu")]
    for command, more in (
        ("generate", words),
        ("train", _arguments(toy_data, folder)),
        ("train", _arguments(toy_data, tmp_path / "new", folder / "checkpoint_last.pt")),
    ):
        capfd.readouterr()
        assert flite(command, *more) != 0
        assert f"{gone}: is missing" in capfd.readouterr().err.splitlines()[-1], command
    assert not list(tmp_path.glob("new/*.pt"))


def _arguments(data: Path, folder: Path, restore: Path | None = None) -> list[str]:
    more = () if restore is None else ("--restore-file", restore)
    return arguments(data, folder, *MIXTURE, "--max-update", 17, *more)


# -- scripts ------------------------------------------------------------------------------------


def hypotheses(data: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    words = ("--path", path, "--batch-size", 20, "--beam", 2, "--cpu")
    assert flite("generate", data, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("H-")]


def test_one_file_of_parts(
    trained: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consolidate = script("consolidate_shards").main
    output = tmp_path / "whole.pt"
    consolidate([str(trained / "checkpoint_last"), "--output", str(output)])
    assert f"{output}: 5 files, " in capsys.readouterr().out
    assert digests(output) == digests(trained / "checkpoint_last.pt")
    expected = hypotheses(toy_data, output, capsys)
    assert len(expected) == 20
    assert hypotheses(toy_data, trained / "checkpoint_last.pt", capsys) == expected
    # Two ranks go on from it.
    folder = tmp_path / "on"
    start = ("--restore-file", output, "--max-update", 16)
    train(toy_data, folder, *MIXTURE, *TWO, *start)
    assert "(epoch 3 @ 16 updates)" in folder.with_suffix(".log").read_text()


def test_consolidating_refuses_what_is_missing_or_damaged(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in trained.glob("checkpoint_last-*.pt"):
        shutil.copy(path, tmp_path)
    main = script("consolidate_shards").main
    expert, shared = (tmp_path / f"checkpoint_last-{p}.pt" for p in ("expert2", "shared"))
    state = torch.load(expert)
    next(iter(state["model"].values())).view(-1)[0] += 1
    torch.save(state, expert)
    for gone, message in ((None, "is damaged"), (expert, "is missing"), (shared, "is missing")):
        if gone is not None:
            gone.unlink()
        assert run_command("consolidate_shards", main, [str(tmp_path / "checkpoint_last")]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and str(gone or expert) in error[0] and message in error[0]
    assert not (tmp_path / "checkpoint_last_consolidated.pt").exists()


def test_optimizer_state_is_left_out_of_every_part(trained: Path, tmp_path: Path) -> None:
    remove = script("remove_opt_state").main
    remove([str(trained / "checkpoint_last"), str(tmp_path), "--nproc", "2"])
    assert {path.name for path in tmp_path.iterdir()} == {
        f"checkpoint_eval-{part}.pt" for part in PARTS
    }
    before, after = (
        parts.whole_state(path)
        for path in (trained / "checkpoint_last.pt", tmp_path / "checkpoint_eval.pt")
    )
    assert "last_optimizer_state" not in after
    assert_same(dict(before["model"]), dict(after["model"]), "model")
    (tmp_path / "checkpoint_eval-expert1.pt").unlink()
    words = [str(tmp_path / "checkpoint_eval"), str(tmp_path / "more")]
    assert run_command("remove_opt_state", remove, words) == 2
    assert not list(tmp_path.glob("more/*"))


def test_average_of_mixtures_is_one_file(
    trained: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "average.pt"
    script("average_checkpoints").main(
        ["--inputs", str(trained), "--num-update-checkpoints", "2", "--output", str(output)]
    )
    name = "decoder.layers.0.moe_layer.experts.3.fc1.weight"
    found = store.load(output)["model"][name]
    weights = [
        parts.whole_state(trained / f"checkpoint_{updates}.pt")["model"][name]
        for updates in ("2_12", "3_16")
    ]
    assert torch.allclose(found, (weights[0] + weights[1]) / 2)
    assert len(hypotheses(toy_data, output, capsys)) == 20


def test_a_run_that_cannot_go_on_leaves_its_parts(
    toy_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "crash"
    with pytest.raises(AssertionError):
        train(toy_data, folder, *MIXTURE, *TWO, "--lr", "1e38", "--max-update", 20)
    assert "the gradient is not finite" in capfd.readouterr().err
    assert {path.name for path in folder.glob("*.pt")} == {f"crash-{part}.pt" for part in PARTS}
    assert parts.whole_state(folder / "crash.pt")["optimizer_history"][-1]["num_updates"] > 0


@pytest.mark.parametrize("suffix", ["-shared", "-expert2", "-shard0", "-rank-1"])
def test_a_suffix_that_looks_like_a_part_is_refused(
    suffix: str, toy_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*_arguments(toy_data, tmp_path / "x"), f"--checkpoint-suffix={suffix}"]
    assert flite("train", *words) == 2
    assert f"--checkpoint-suffix {suffix}: is the end of a part's name" in capfd.readouterr().err
