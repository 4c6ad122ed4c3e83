"""Sharded checkpoints of flite-train: resumed, evaluated, made one file, made smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fairseq_lite import hub
from fairseq_lite.training.checkpoint import parts, store
from tests.helpers.commands import flite
from tests.helpers.sharded import digests, flat_shards
from tests.helpers.training import assert_same, train
from tests.subsystem.test_checkpoint_scripts import script

pytestmark = pytest.mark.timeout(300)

SHARDED = (
    *("--ddp-backend", "fully_sharded", "--use-sharded-state", "--min-params-to-wrap", 1),
    *("--distributed-world-size", 2, "--store-ema", "--ema-decay", 0.9, "--no-epoch-checkpoints"),
)


@pytest.fixture(scope="module")
def trained(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that wrote its shards in the background."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    often = ("--save-interval-updates", 5, "--keep-interval-updates", 3, "--save-async")
    train(toy_data, folder, *SHARDED, *often, "--max-update", 20)
    return folder


def test_names_and_retention_are_of_all_shards(trained: Path) -> None:
    names = ("2_10", "3_15", "3_20", "best", "last")
    expected = {f"checkpoint_{name}-shard{rank}.pt" for name in names for rank in (0, 1)}
    assert {path.name for path in trained.glob("*.pt*")} == expected
    last, best = (
        [(trained / f"checkpoint_{name}-shard{rank}.pt").read_bytes() for rank in (0, 1)]
        for name in ("last", "3_20")
    )
    assert last == best
    states = [
        store.load(path) for path in parts.part_files(trained / "checkpoint_last.pt").values()
    ]
    for rank, state in enumerate(states):  # each has the whole header
        assert state["optimizer_history"][-1]["num_updates"] == 20
        assert state["cfg"]["model"]["encoder_embed_dim"] == 16
        manifest = parts.own(state)["manifest"]
        assert (manifest["shard"], manifest["world_size"]) == (rank, 2)
        rows = state["model"]["encoder.layers.0.fc1.weight"]
        assert tuple(rows.shape) == (16, 16) and set(state["extra_state"]["ema"]) == set(
            state["model"]
        )


def test_resumed_on_as_many_ranks_nothing_differs(
    trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    start = ("--restore-file", trained / "checkpoint_2_10.pt", "--checkpoint-shard-count", 2)
    train(toy_data, folder, *SHARDED, *start, "--max-update", 20)
    for rank in (0, 1):
        one, other = (
            store.load(path / f"checkpoint_last-shard{rank}.pt") for path in (trained, folder)
        )
        for key in ("model", "last_optimizer_state"):
            assert_same(one[key], other[key], key)
        for state in (one, other):
            del state["extra_state"]["previous_training_time"], state["extra_state"]["metrics"]
        assert_same(one["extra_state"], other["extra_state"], "extra_state")


def test_resumed_by_one_process_with_another_backend(
    trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "alone"
    start = ("--restore-file", trained / "checkpoint_3_20-shard1.pt", "--store-ema")
    train(toy_data, folder, *start, "--max-update", 20)  # restores, and has nothing to do
    assert "(epoch 3 @ 20 updates)" in folder.with_suffix(".log").read_text()
    train(toy_data, folder, *start, "--max-update", 22, "--no-epoch-checkpoints")
    state = store.load(folder / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 22
    steps = {entry["step"] for entry in state["last_optimizer_state"]["state"].values()}
    assert steps == {22}


def generated(data: Path, *more: object, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert flite("generate", data, "--batch-size", 20, "--beam", 2, "--cpu", *more) == 0
    return capsys.readouterr().out.splitlines()


def test_commands_and_hub_read_shards(
    trained: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "one.pt"
    script("consolidate_shards").main([str(trained / "checkpoint_last"), "--output", str(output)])
    expected = generated(toy_data, "--path", output, capsys=capsys)
    assert sum(line.startswith("H-") for line in expected) == 20
    last = trained / "checkpoint_last.pt"
    for more in (
        ("--path", last),
        ("--path", trained / "checkpoint_last-shard0.pt"),
        ("--path", last, "--checkpoint-suffix", "-shard0", "--checkpoint-shard-count", 2),
    ):
        assert generated(toy_data, *more, capsys=capsys) == expected
    validated = []
    for path in (last, output):
        assert flite("validate", toy_data, "--path", path, "--batch-size", 20, "--cpu") == 0
        lines = capsys.readouterr().out.splitlines()
        validated.append(next(line.split("loss ")[1][:6] for line in lines if "| loss " in line))
    assert validated[0] == validated[1]
    best = trained / "checkpoint_best.pt"
    translators = [hub.load(path, device="cpu") for path in (trained, best)]
    assert translators[0].translate("a b c") == translators[1].translate("a b c")


def test_one_file_of_shards(trained: Path, tmp_path: Path) -> None:
    consolidate = script("consolidate_shards").main
    consolidate([str(trained / "checkpoint_last"), "--output", str(tmp_path / "whole.pt")])
    assert digests(tmp_path / "whole.pt") == digests(trained / "checkpoint_last.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    model = state["model"]
    shared = ("encoder.embed_tokens.weight", "decoder.output_projection.weight")
    assert model[shared[0]].data_ptr() == model[shared[1]].data_ptr()
    assert list(state)[-2:] == ["last_optimizer_state", "fairseq_lite"]
    small_one = ["--output", str(tmp_path / "small.pt"), "--no-optimizer-state"]
    consolidate([str(trained / "checkpoint_last.pt"), *small_one])
    small = store.load(tmp_path / "small.pt")
    assert "last_optimizer_state" not in small
    assert_same(dict(small["model"]), dict(model), "model")


def test_optimizer_state_is_left_out_of_every_shard(trained: Path, tmp_path: Path) -> None:
    remove = script("remove_opt_state").main
    remove([str(trained / "checkpoint_last"), str(tmp_path), "--nproc", "2"])
    names = [f"checkpoint_eval-shard{rank}.pt" for rank in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    before, after = (
        parts.whole_state(path)
        for path in (trained / "checkpoint_last.pt", tmp_path / "checkpoint_eval.pt")
    )
    assert "last_optimizer_state" not in after
    assert_same(dict(before["model"]), dict(after["model"]), "model")
    size = sum((tmp_path / name).stat().st_size for name in names)
    assert size < 0.8 * sum(p.stat().st_size for p in trained.glob("checkpoint_last-*.pt"))


def test_average_of_shards(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "average.pt"
    script("average_checkpoints").main(
        ["--inputs", str(trained), "--num-update-checkpoints", "2", "--output", str(output)]
    )
    name = "decoder.layers.0.fc1.weight"
    found = store.load(output)["model"][name]
    weights = [
        parts.whole_state(trained / f"checkpoint_3_{updates}.pt")["model"][name]
        for updates in (15, 20)
    ]
    assert torch.allclose(found, (weights[0] + weights[1]) / 2)


def test_a_run_that_cannot_go_on_leaves_its_shards(
    toy_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "crash"
    with pytest.raises(AssertionError):
        train(toy_data, folder, *SHARDED, "--lr", "1e38", "--max-update", 20)
    assert "the gradient is not finite" in capfd.readouterr().err
    assert {path.name for path in folder.glob("*.pt")} == {"crash-shard0.pt", "crash-shard1.pt"}
    assert parts.whole_state(folder / "crash.pt")["optimizer_history"][-1]["num_updates"] > 0


@pytest.fixture
def of_fairseq(trained: Path, tmp_path: Path) -> Path:
    """The run's last checkpoint as fairseq writes it on three ranks with --use-sharded-state."""
    state = parts.whole_state(trained / "checkpoint_last.pt", optimizer=False)
    weights = dict(state["model"])
    first = "encoder.embed_tokens.weight"
    shared = {n: first for n, w in weights.items() if w is weights[first] and n != first}
    assert len(shared) == 2
    units = ["encoder.layers.0", "decoder.layers.0"]
    for rank, (flat, metadata) in enumerate(flat_shards(weights, units, shared, 3)):
        content = {key: value for key, value in state.items() if key != parts.OWN_KEY}
        optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"params": [0]}]}
        content |= {"model": flat, "last_optimizer_state": optimizer, "fsdp_metadata": metadata}
        torch.save(content, tmp_path / f"theirs-shard{rank}.pt")
    for name in ("dict.src.txt", "dict.tgt.txt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    return tmp_path / "theirs.pt"


def test_fairseqs_shards_are_read_by_every_command(
    of_fairseq: Path,
    trained: Path,
    toy_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = generated(toy_data, "--path", trained / "checkpoint_last.pt", capsys=capsys)
    count = ("--checkpoint-shard-count", 3)
    assert generated(toy_data, "--path", of_fairseq, *count, capsys=capsys) == expected
    script("consolidate_shards").main([str(of_fairseq)])
    one = of_fairseq.with_name("theirs_consolidated.pt")
    assert generated(toy_data, "--path", one, capsys=capsys) == expected
    assert not {"fsdp_metadata", "last_optimizer_state"} & store.load(one).keys()
    # A run goes on with its weights; its optimizer's state has no names.
    folder = tmp_path / "on"
    train(toy_data, folder, "--restore-file", of_fairseq, "--max-update", 1)
    log = folder.with_suffix(".log").read_text()
    assert "theirs.pt holds no optimizer state: the optimizer starts anew" in log
    of_fairseq.with_name("theirs-shard1.pt").unlink()
    assert flite("generate", toy_data, "--path", of_fairseq, "--cpu") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"{of_fairseq.with_name('theirs-shard1.pt')}: is missing")
