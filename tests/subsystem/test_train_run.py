"""flite-train as a user meets it: what the log says, when it stops, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_lite.training.checkpoint import store
from tests.helpers.commands import flite
from tests.helpers.toy import ADAM, TINY_MODEL

FLAGS = [*TINY_MODEL, *ADAM, "--batch-size", "16", "--cpu"]


class Trained:
    """A run that has ended: its checkpoints and its log."""

    def __init__(self, folder: Path) -> None:
        self.save_dir = folder / "checkpoints"
        self.log_file = folder / "log.txt"

    @property
    def lines(self) -> list[str]:
        return self.log_file.read_text().splitlines()

    def messages(self, logger: str = "") -> list[str]:
        parts = [line.split(" | ", 3) for line in self.lines if line.count(" | ") >= 3]
        return [p[3] for p in parts if logger in ("", p[2])]

    def records(self, tag: str) -> list[dict[str, Any]]:
        return [json.loads(message) for message in self.messages(tag)]

    def names(self) -> set[str]:
        return {path.name for path in self.save_dir.glob("*.pt")}


def run(data: Path, folder: Path, *more: object, status: int = 0) -> Trained:
    trained = Trained(folder)
    words = [data, *FLAGS, "--save-dir", trained.save_dir, "--log-file", trained.log_file, *more]
    assert flite("train", *words) == status
    return trained


def test_the_lines_of_the_log_in_their_order(toy_data: Path, tmp_path: Path) -> None:
    trained = run(
        toy_data,
        tmp_path,
        *("--max-epoch", 2, "--log-interval", 5, "--log-format", "simple"),
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1),
        *("--clip-norm", 1.0),
    )
    patterns = [
        r"\[src\] dictionary: \d+ types",
        r"\[tgt\] dictionary: \d+ types",
        r"task: TranslationTask",
        r"model: TransformerModel",
        r"criterion: LabelSmoothedCrossEntropy",
        r"num\. shared model params: [\d,]+ \(num\. trained: [\d,]+\)",
        r"num\. expert model params: 0 \(num\. trained: 0\)",
        r"training on 1 devices \(cpu\)",
        r"max tokens per device = None and max sentences per device = 16",
        r"loaded 20 examples from: .*valid\.src-tgt\.src",
        r"No existing checkpoint found .*checkpoint_last\.pt",
        r"loading train data for epoch 1",
        r"loaded 200 examples from: .*train\.src-tgt\.src",
        r"begin training epoch 1",
        r"Start iterating over samples",
        r"epoch 001:      5 / 13 loss=[\d.]+, nll_loss=.*, ppl=.*, wps=.*, ups=.*, wpb=.*, bsz=16, "
        r"num_updates=5, lr=0\.001, gnorm=.*, clip=.*, train_wall=.*, wall=\d+",
        r"epoch 001:     10 / 13 .*",
        r'begin validation on "valid" subset',
        r"epoch 001 \| valid on 'valid' subset \| loss [\d.]+ \| nll_loss .* \| ppl .* \| wps .* "
        r"\| wpb .* \| bsz .* \| num_updates 13",
        r"Saved checkpoint .*checkpoint1\.pt \(epoch 1 @ 13 updates, score [\d.]+\) "
        r"\(writing took [\d.e-]+ seconds\)",
        r"end of epoch 1 \(average epoch stats below\)",
        r"epoch 001 \| loss [\d.]+ \| nll_loss .* \| num_updates 13 \| lr 0\.001 \| gnorm .*",
        r"begin training epoch 2",
        r"epoch 002:      2 / 13 .*num_updates=15.*",
        r"epoch 002 \| valid on 'valid' subset .* \| num_updates 26 \| best_loss [\d.]+",
        r"end of epoch 2 \(average epoch stats below\)",
        r"done training in [\d.]+ seconds",
    ]
    messages = iter(trained.messages())
    for pattern in patterns:
        assert any(re.fullmatch(pattern, message) for message in messages), pattern
    assert trained.names() == {
        *("checkpoint1.pt", "checkpoint2.pt", "checkpoint_best.pt", "checkpoint_last.pt")
    }


def test_json_records(toy_data: Path, tmp_path: Path) -> None:
    trained = run(
        toy_data,
        tmp_path,
        *("--max-update", 6, "--log-interval", 3, "--log-format", "json", "--no-save"),
        *("--valid-subset", "valid,test"),
    )
    inner = trained.records("train_inner")
    assert [(r["epoch"], r["update"], r["num_updates"]) for r in inner] == [
        (1, 0.231, "3"),
        (1, 0.462, "6"),
    ]
    assert "nll_loss" not in inner[0], "cross entropy shows one loss"
    assert set(trained.records("valid")[0]) >= {"epoch", "valid_loss", "valid_ppl", "valid_wpb"}
    assert set(trained.records("test")[0]) >= {"epoch", "test_loss"}
    assert trained.records("train")[0]["train_num_updates"] == "6"
    assert "Stopping training due to num_updates: 6 >= max_update: 6" in trained.messages()
    assert not trained.save_dir.exists()


def test_each_epoch_has_its_update_freq_and_learning_rate(toy_data: Path, tmp_path: Path) -> None:
    trained = run(
        toy_data,
        tmp_path,
        *("--max-epoch", 3, "--log-format", "json", "--log-interval", 1, "--no-save"),
        *("--update-freq", "1,4", "--lr", "0.001,0.0005", "--disable-validation"),
    )
    inner = trained.records("train_inner")
    updates = [sum(r["epoch"] == epoch for r in inner) for epoch in (1, 2, 3)]
    assert updates == [13, 4, 4]
    assert [r["lr"] for r in inner[:1] + inner[-1:]] == ["0.001", "0.0005"]
    assert inner[-1]["update"] == 3.0


def test_stop_at_the_smallest_learning_rate(toy_data: Path, tmp_path: Path) -> None:
    trained = run(
        toy_data,
        tmp_path,
        *("--max-epoch", 9, "--lr-scheduler", "fixed", "--force-anneal", 2, "--no-save"),
        *("--stop-min-lr", 2e-4, "--disable-validation"),
    )
    assert any("(--stop-min-lr=0.0002)" in m for m in trained.messages())
    assert trained.messages()[-2].startswith("stopping training because current learning rate")


def test_patience_ends_training_and_saves(toy_data: Path, tmp_path: Path) -> None:
    trained = run(
        toy_data,
        tmp_path,
        *("--max-epoch", 9, "--patience", 2, "--lr", 0.0, "--validate-interval-updates", 5),
        *("--best-checkpoint-metric", "ppl", "--no-epoch-checkpoints"),
    )
    stop = "early stop since valid performance hasn't improved for last 2 runs"
    assert stop in trained.messages()
    last = store.load(trained.save_dir / "checkpoint_last.pt")
    assert last["optimizer_history"][-1]["num_updates"] == 13
    assert last["fairseq_lite"]["extra"]["early_stopping"]["runs"] == 2


def test_validation_leaves_no_trace_in_training(toy_data: Path, tmp_path: Path) -> None:
    more = ("--max-update", 15, "--no-epoch-checkpoints")
    without = run(toy_data, tmp_path / "without", *more, "--disable-validation")
    often = ("--validate-interval-updates", 4, "--fixed-validation-seed", 3)
    with_it = run(toy_data, tmp_path / "with", *more, *often)
    states = [store.load(t.save_dir / "checkpoint_last.pt") for t in (without, with_it)]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    assert "best" not in states[0]["extra_state"] and "best" in states[1]["extra_state"]


def test_bleu_decides_which_checkpoint_is_best(toy_data: Path, tmp_path: Path) -> None:
    trained = run(
        toy_data,
        tmp_path,
        *("--max-epoch", 1, "--eval-bleu", "--eval-bleu-print-samples", "--log-format", "json"),
        *("--eval-bleu-args", '{"beam": 2, "max_len_b": 10}', "--eval-tokenized-bleu"),
        *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
    )
    bleu = float(trained.records("valid")[0]["valid_bleu"])
    best = store.load(trained.save_dir / "checkpoint_best.pt")["extra_state"]["best"]
    assert best == pytest.approx(bleu, abs=0.01)
    samples = [m for m in trained.messages() if m.startswith("example ")]
    assert samples[0].startswith("example hypothesis: ")
    assert samples[1].startswith("example reference: ")


def test_the_number_of_processes_does_not_change_validation(toy_data: Path, tmp_path: Path) -> None:
    more = ("--max-update", 1, "--log-format", "json", "--no-save", "--lr", 0.0, "--eval-bleu")
    one = run(toy_data, tmp_path / "one", *more).records("valid")[0]
    two = run(toy_data, tmp_path / "two", *more, "--distributed-world-size", 2).records("valid")[0]
    for key in ("valid_loss", "valid_ppl", "valid_bleu"):
        assert one[key] == two[key]


def test_validate_gives_the_numbers_of_training(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = run(
        toy_data,
        tmp_path,
        *("--max-epoch", 1, "--log-format", "json", "--eval-bleu", "--sentence-avg"),
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.2),
    )
    log = tmp_path / "validate.txt"
    words = [toy_data, "--path", trained.save_dir / "checkpoint_last.pt", "--batch-size", 16]
    assert flite("validate", *words, "--log-format", "json", "--log-file", log, "--cpu") == 0
    line = next(x for x in log.read_text().splitlines() if " | valid | " in x)
    ours = json.loads(line.split(" | valid | ")[1])
    theirs = trained.records("valid")[0]
    for key in ("valid_loss", "valid_nll_loss", "valid_ppl", "valid_bleu", "valid_wpb"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--restore-file", "nowhere.pt"), "--restore-file nowhere.pt: no such checkpoint"),
        (("--finetune-from-model", "no.pt"), "--finetune-from-model no.pt: no such checkpoint"),
        (("--best-checkpoint-metric", "bleu", "--max-update", 1), "add --eval-bleu"),
        (("--best-checkpoint-metric", "blue"), "gives loss, ppl"),
        (("--skip-remainder-batch", "--update-freq", 999), "leaves out every update"),
        (("--max-tokens", 2), "the split 'train' has no batch"),
        (("--patience", 2, "--disable-validation"), "--patience needs validation"),
        (("--checkpoint-suffix", "-shard0"), "leave it out, parts are found without it"),
        (("--valid-subset", "dev"), "no split 'dev'"),
        (("--max-source-positions", 4), "are too long"),
        (("--lr-scheduler", "polynomial_decay"), "--total-num-update"),
    ],
)
def test_what_is_refused(
    more: tuple[object, ...],
    message: str,
    toy_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(toy_data, tmp_path, *more, status=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("flite-train: error: ") and message in error


def test_what_the_first_validation_would_stop_at_stops_before_the_first_update(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(toy_data, tmp_path / "data")
    for path in data.glob("valid.*.tgt.*"):
        path.unlink()
    trained = run(data, tmp_path, status=2)
    error = capsys.readouterr().err.strip()
    assert "the split 'valid' has no target side (tgt)" in error
    assert trained.messages("train_inner") == [] and trained.names() == set()


def test_skipping_the_remainder_ends_each_epoch(toy_data: Path, tmp_path: Path) -> None:
    trained = run(
        toy_data,
        tmp_path,
        *("--skip-remainder-batch", "--update-freq", 3, "--max-epoch", 2, "--max-update", 50),
        *("--log-format", "json", "--disable-validation"),
    )
    first, second = trained.records("train")
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert int(second["train_num_updates"]) == 2 * int(first["train_num_updates"])


def test_a_diverging_run_says_where_and_leaves_crash_pt(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = run(toy_data, tmp_path, "--lr", 1e38, "--max-epoch", 1, status=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"update \d+: gradient norm (nan|inf): .*rank 0: ids \d+", error)
    assert "is the first that is not finite" in error
    assert "crash.pt" in trained.names()


def test_a_profile_is_written(toy_data: Path, tmp_path: Path) -> None:
    trained = run(toy_data, tmp_path, "--max-update", 7, "--profile", "--disable-validation")
    events = json.loads((trained.save_dir / "profile.json").read_text())["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)


@pytest.mark.parametrize("precision", ["--bf16", "--amp", "--memory-efficient-bf16"])
def test_sixteen_bits_learn_alike(precision: str, toy_data: Path, tmp_path: Path) -> None:
    more = ("--max-epoch", 2, "--log-format", "json", "--disable-validation", "--dropout", 0)
    plain = run(toy_data, tmp_path / "plain", *more).records("train")[-1]
    half = run(toy_data, tmp_path / "half", *more, precision).records("train")[-1]
    assert float(half["train_loss"]) == pytest.approx(float(plain["train_loss"]), rel=0.01)
    saved = store.load(tmp_path / "half" / "checkpoints" / "checkpoint_last.pt")
    assert {t.dtype for t in saved["model"].values()} == {torch.float32}, "master weights"


def test_every_example_is_seen_once_an_epoch_by_two_processes(
    toy_data: Path, tmp_path: Path
) -> None:
    more = ("--max-epoch", 1, "--log-format", "json", "--log-interval", 1, "--no-save")
    two = ("--distributed-world-size", 2, "--disable-validation")
    trained = run(toy_data, tmp_path, *more, *two)
    inner = trained.records("train_inner")
    assert len(inner) == 7, "13 batches on 2 ranks: the last step has a dummy batch"
    assert sum(float(r["bsz"]) for r in inner) == 200
