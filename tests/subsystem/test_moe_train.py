"""Models with experts through the commands: what is logged, on one process and two, and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_lite.parallel.world import World
from tests.helpers.commands import flite
from tests.helpers.distributed import run_distributed
from tests.helpers.languages import TINY_LM, write_corpus
from tests.helpers.toy import ADAM, TINY_MODEL

EXPERTS = ["--moe-freq", "1", "--moe-expert-count", "4"]
JSON = ["--log-format", "json", "--log-interval", "4", "--cpu", "--no-epoch-checkpoints"]
LM = [
    *TINY_LM,
    *ADAM,
    *EXPERTS,
    *JSON,
    *("--task", "language_modeling", "--tokens-per-sample", "16", "--batch-size", "8"),
    *("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.1"),
]
# Nothing is drawn, so that one process with two batches an update does what two processes do.
PAIR = [
    *TINY_MODEL,
    *ADAM,
    *EXPERTS,
    *JSON,
    *("--dropout", "0", "--moe-second-expert-policy", "all", "--batch-size", "8"),
    *("--criterion", "moe_label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--moe-gate-loss-wt", "0.1", "--clip-norm", "1.0"),
]
TIMINGS = ("wps", "ups", "train_wall", "wall")


def lines(log: Path, tag: str) -> list[dict[str, Any]]:
    """What a log says under a tag, timings left out."""
    marked = [line.split(f" | {tag} | ") for line in log.read_text().splitlines()]
    found = [json.loads(parts[1]) for parts in marked if len(parts) == 2]
    return [{k: v for k, v in line.items() if not k.endswith(TIMINGS)} for line in found]


def train(data: Path, save_dir: Path, *flags: object) -> Path:
    log = save_dir.with_suffix(".log")
    assert flite("train", data, *flags, "--save-dir", save_dir, "--log-file", log) == 0
    return log


def assert_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Equal but for the last printed digits."""
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for key, value in one.items():
            if key in ("split", "layer"):
                assert value == other[key]
            elif isinstance(value, list):
                assert value == pytest.approx(other[key], abs=1e-3), key
            else:
                assert float(value) == pytest.approx(float(other[key]), rel=1e-4, abs=2e-3), key


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"train": 200, "valid": 30, "test": 30}
    return write_corpus(tmp_path_factory.mktemp("corpus"), sizes)


@pytest.fixture(scope="module")
def language_model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of checkpoints and the log of its training."""
    save_dir = tmp_path_factory.mktemp("lm") / "checkpoints"
    return save_dir, train(corpus, save_dir, *LM, "--max-epoch", 3)


def test_a_language_model_learns_and_its_experts_are_watched(
    language_model: tuple[Path, Path],
) -> None:
    _, log = language_model
    epochs = lines(log, "train")
    assert float(epochs[-1]["train_inner_loss"]) < float(epochs[0]["train_inner_loss"])
    keys = list(epochs[0])
    assert keys[:5] == [
        *("epoch", "train_loss", "train_inner_loss", "train_ppl", "train_moe_gate_loss"),
    ]
    assert {f"train_unused_expert{k}_count" for k in (1, 2)} <= set(keys)
    for record in (*epochs, *lines(log, "valid")):
        [split] = {key.split("_")[0] for key in record if key.endswith("_ppl")}
        inner = float(record[f"{split}_inner_loss"])
        assert float(record[f"{split}_ppl"]) == pytest.approx(2**inner, rel=1e-3)
        assert float(record[f"{split}_loss"]) > inner
        assert 1.0 <= float(record[f"{split}_moe_gate_loss"]) < 2.0
    for valid in lines(log, "valid"):
        assert valid["valid_overflow_expert1"] == "0", "nothing is dropped in evaluation"
    layers = lines(log, "moe")
    assert {record["split"] for record in layers} == {"train_inner", "train", "valid"}
    assert {record["layer"] for record in layers} == {"decoder.layers.0"}
    for record in layers:
        assert len(record["load"]) == 4
        assert sum(record["load"]) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_validation_says_the_same_for_any_batches(
    language_model: tuple[Path, Path], corpus: Path, tmp_path: Path, batch_size: int
) -> None:
    save_dir, log = language_model
    path = save_dir / "checkpoint_last.pt"
    again = tmp_path / "validate.log"
    words = ["--path", path, "--batch-size", batch_size, "--cpu", "--log-format", "json"]
    words += ["--task", "language_modeling", "--log-file", again, "--is-moe"]
    assert flite("validate", corpus, *words) == 0
    [found], expected = lines(again, "valid"), lines(log, "valid")[-1]
    figures = [key for key in found if key.startswith("valid_") and key in expected]
    figures = [key for key in figures if not key.endswith(("wpb", "bsz", "num_updates"))]
    assert len(figures) > 10
    assert_close([{key: found[key] for key in figures}], [{key: expected[key] for key in figures}])
    trained = [record for record in lines(log, "moe") if record["split"] == "valid"][-1]
    [evaluated] = lines(again, "moe")
    for record in (trained, evaluated):
        del record["epoch"], record["updates"]
    assert_close([evaluated], [trained])


def test_a_dense_checkpoint_is_not_moe(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY_LM, *ADAM, *JSON, "--task", "language_modeling", "--tokens-per-sample", "16"]
    train(corpus, tmp_path / "dense", *flags, "--batch-size", 8, "--max-update", 1)
    path = tmp_path / "dense" / "checkpoint_last.pt"
    words = ["--path", path, "--task", "language_modeling", "--cpu", "--is-moe"]
    assert flite("eval_lm", corpus, *words) == 2
    assert "--is-moe" in capsys.readouterr().err.splitlines()[-1]


def test_training_goes_on_in_the_middle_of_an_interval(corpus: Path, tmp_path: Path) -> None:
    """The sums of the experts' vectors are part of a checkpoint, as all others."""
    whole = train(corpus, tmp_path / "whole", *LM, "--max-update", 12)
    train(corpus, tmp_path / "parts", *LM, "--max-update", 6)
    parts = train(corpus, tmp_path / "parts", *LM, "--max-update", 12)
    for tag in ("train_inner", "moe"):
        ours = {(r.get("updates"), r.get("num_updates"), r.get("split")): r
                for r in lines(parts, tag) if r.get("split") != "valid"}  # fmt: skip
        theirs = {(r.get("updates"), r.get("num_updates"), r.get("split")): r
                  for r in lines(whole, tag) if r.get("split") != "valid"}  # fmt: skip
        for key, record in theirs.items():
            assert ours[key] == record, key


@pytest.mark.timeout(180)
def test_two_processes_log_what_one_does(toy_data: Path, tmp_path: Path) -> None:
    updates = ["--max-update", 8]
    one = train(toy_data, tmp_path / "one", *PAIR, *updates, "--update-freq", 2)
    # In the backward pass both run the layers, and their exchange, again.
    processes = ["--distributed-world-size", 2, "--checkpoint-activations"]
    two = train(toy_data, tmp_path / "two", *PAIR, *updates, *processes)
    for tag in ("train_inner", "train", "valid", "moe"):
        ours, theirs = lines(two, tag), lines(one, tag)
        assert ours
        for record in (*ours, *theirs):  # batches are counted by process in validation
            record.pop("valid_wpb", None)
            record.pop("valid_bsz", None)
            record.pop("update", None)
        assert_close(ours, theirs)
    layers = {record["layer"] for record in lines(two, "moe")}
    assert layers == {"encoder.layers.0", "decoder.layers.0"}
    # What rank 0 alone would say, were the vectors not summed.
    half = train(toy_data, tmp_path / "half", *PAIR, *updates)
    with pytest.raises(AssertionError):
        assert_close(
            [r for r in lines(half, "moe") if r["split"] == "train_inner"],
            [r for r in lines(one, "moe") if r["split"] == "train_inner"],
        )


def sum_vectors(world: World) -> list[dict[str, Any]]:
    """Sums with vectors: at first, when there is room for them, and where ranks differ."""
    vector = torch.arange(200.0, dtype=torch.float64) + 2**40 * world.rank
    values = {"z": world.rank, "v": vector, "a": torch.tensor(2.5)}
    other = {"v": vector[:3]} if world.rank else {"v": vector[:3], "w": vector[:2]}
    found = [world.sum(values), world.sum(values), world.sum({"a": 1}), world.sum(other)]
    return [{k: v if isinstance(v, float) else v.tolist() for k, v in f.items()} for f in found]


def test_vectors_are_summed_over_ranks() -> None:
    expected = [2.0 * i + 2**40 for i in range(200)]
    for first, second, plain, different in run_distributed(sum_vectors, 2):
        assert list(first) == ["z", "v", "a"], "in the order of the caller"
        assert first == second == {"z": 1.0, "v": expected, "a": 5.0}
        assert plain == {"a": 2.0}
        assert different == {"v": expected[:3], "w": [0.0, 1.0]}
