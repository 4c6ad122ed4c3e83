"""Log lines exactly as fairseq prints them."""

from __future__ import annotations

import json
import logging
import re
import sys
import types
from pathlib import Path

import pytest

from fairseq_lite.config.core import CommonConfig
from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite.training.loggers import (
    ProgressLogs,
    WandB,
    choose_format,
    formatted,
    setup_logging,
)
from tests.helpers.shared import shared_dir

VALUES = {
    "loss": 8.561,
    "nll_loss": 8.1,
    "ppl": 274.4,
    "wps": 1749.0,
    "num_updates": 1234567,
    "lr": 4.00081e-05,
    "clip": 100.0,
    "wall": 12.0,
}
TEXT = {
    "loss": "8.561",
    "nll_loss": "8.1",
    "ppl": "274.4",
    "wps": "1749",
    "num_updates": "1.23457e+06",
    "lr": "4.00081e-05",
    "clip": "100",
    "wall": "12",
}


@pytest.fixture(autouse=True)
def _quiet_after():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def messages(caplog, tag):
    return [r.getMessage() for r in caplog.records if r.name == tag]


def test_values_as_text():
    assert formatted(VALUES) == TEXT
    assert formatted({"a": 0.0, "b": float("nan"), "c": float("inf")}) == {
        "a": "0",
        "b": "nan",
        "c": "inf",
    }


def run(kind, caplog, **common):
    caplog.set_level(logging.INFO)
    logs = ProgressLogs(CommonConfig(log_format=kind, **common), terminal=False)
    with logs.begin(epoch=3, size=200, offset=98) as progress:
        progress.advance()
        progress.advance()
        progress.log(VALUES, tag="train_inner", num_updates=1234567)
        with logs.begin_validation("valid1", epoch=3, size=7) as valid:
            valid.summary(VALUES, tag="valid1", num_updates=1234567)
        progress.summary(VALUES, tag="train", num_updates=1234567)
    logs.close()


def test_simple(caplog):
    run("simple", caplog)
    commas = ", ".join(f"{k}={v}" for k, v in TEXT.items())
    pipes = " | ".join(f"{k} {v}" for k, v in TEXT.items())
    assert messages(caplog, "train_inner") == [f"epoch 003:    100 / 200 {commas}"]
    assert messages(caplog, "train") == [f"epoch 003 | {pipes}"]
    assert messages(caplog, "valid1") == [f"epoch 003 | valid on 'valid1' subset | {pipes}"]


def test_json(caplog):
    run("json", caplog)
    [line] = messages(caplog, "train_inner")
    assert line == json.dumps({"epoch": 3, "update": 2.5, **TEXT})
    assert line.startswith('{"epoch": 3, "update": 2.5, "loss": "8.561", "nll_loss": "8.1"')
    assert messages(caplog, "train") == [
        json.dumps({"epoch": 3, **{f"train_{k}": v for k, v in TEXT.items()}})
    ]
    assert messages(caplog, "valid1") == [
        json.dumps({"epoch": 3, **{f"valid1_{k}": v for k, v in TEXT.items()}})
    ]


def test_none(caplog):
    run("none", caplog)
    assert caplog.records == []


def test_other_ranks_are_silent(caplog, tmp_path):
    caplog.set_level(logging.INFO)
    common = CommonConfig(log_format="json", tensorboard_logdir=str(tmp_path / "tb"))
    logs = ProgressLogs(common, is_main=False)
    with logs.begin(epoch=1, size=2) as progress:
        progress.log(VALUES, tag="train_inner", num_updates=1)
        progress.summary(VALUES, tag="train", num_updates=1)
    assert caplog.records == []
    assert not (tmp_path / "tb").exists()


def test_tqdm_shows_a_bar_and_prints_summaries(caplog, capsys):
    caplog.set_level(logging.INFO)
    logs = ProgressLogs(CommonConfig(), terminal=True)
    with logs.begin(epoch=3, size=200, offset=98) as progress:
        progress.advance()
        progress.log({"loss": 8.561}, tag="train_inner", num_updates=1)
        progress.advance(101)
        progress.summary({"loss": 8.561}, tag="train", num_updates=1)
    bar = capsys.readouterr().err
    assert "epoch 003" in bar
    assert "98/200" in bar
    assert messages(caplog, "train") == ["epoch 003 | loss 8.561"]
    assert messages(caplog, "train_inner") == []


@pytest.mark.parametrize(
    ("common", "terminal", "expected"),
    [
        ({}, True, "tqdm"),
        ({}, False, "simple"),
        ({"no_progress_bar": True}, True, "simple"),
        ({"log_format": "tqdm"}, False, "simple"),
        ({"log_format": "json"}, False, "json"),
        ({"log_format": "json", "no_progress_bar": True}, True, "json"),
        ({"log_format": "none"}, True, "none"),
    ],
)
def test_which_format(common, terminal, expected):
    assert choose_format(CommonConfig(**common), terminal=terminal) == expected


@pytest.mark.parametrize("name", ["uf1", "uf2", "np2", "sentavg", "ce_bs48"])
def test_a_reference_log_comes_out_byte_for_byte(name, caplog):
    caplog.set_level(logging.INFO)
    path = shared_dir("reference", "mt", "logs", f"{name}.jsonl")
    lines = [x for x in path.read_text(encoding="utf-8").splitlines() if '"update"' in x]
    size = {"ce_bs48": 126, "uf2": 35, "np2": 35}.get(name, 70)
    logs = ProgressLogs(CommonConfig(log_format="json"), terminal=False)
    with logs.begin(epoch=1, size=size) as progress:
        for line in lines:
            record = json.loads(line)
            values = {k: float(v) for k, v in record.items() if k not in ("epoch", "update")}
            progress.advance()
            progress.log(values, tag="train_inner", num_updates=int(values["num_updates"]))
    assert messages(caplog, "train_inner") == lines
    assert len(lines) == 20


def test_tensorboard_has_a_folder_for_each_tag(tmp_path, caplog):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is absent"
    )
    run("none", caplog, tensorboard_logdir=str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train", "train_inner", "valid1"]
    events = accumulator.EventAccumulator(str(tmp_path / "train_inner"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(VALUES) - {"num_updates"}
    [loss] = events.Scalars("loss")
    assert (loss.step, loss.value) == (1234567, pytest.approx(8.561))


def test_a_tensorboard_folder_that_cannot_be_made_is_named_at_once(tmp_path):
    pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--tensorboard-logdir"):
        ProgressLogs(CommonConfig(tensorboard_logdir=str(tmp_path / "file" / "x")), terminal=False)


def test_without_tensorboard_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependency, match="pip install tensorboard"):
        ProgressLogs(CommonConfig(tensorboard_logdir="x"), terminal=False)


def test_wandb(monkeypatch):
    seen = []
    stub = types.SimpleNamespace(
        log=lambda values, step: seen.append((values, step)), finish=lambda: seen.append("end")
    )
    made = []

    def init(**kwargs):
        made.append(kwargs)
        return stub

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_NAME", raising=False)
    logs = ProgressLogs(
        CommonConfig(log_format="none"), terminal=False, sinks=(WandB("mine", "run1"),)
    )
    with logs.begin(epoch=1, size=2) as progress:
        progress.log({"loss": 2.0, "num_updates": 5}, tag="train_inner", num_updates=5)
    logs.close()
    assert made == [{"project": "mine", "name": "run1"}]
    assert seen == [({"train_inner/loss": 2.0}, 5), "end"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependency, match="pip install wandb"):
        WandB("mine", "run1")


def test_lines_go_to_standard_output_and_the_file(capsys, tmp_path):
    log_file = tmp_path / "new" / "train.log"
    common = CommonConfig(log_file=str(log_file), log_format="simple")
    for _ in range(2):  # a second command in the same process must not print twice
        setup_logging(common)
    logs = ProgressLogs(common, terminal=False)
    with logs.begin(epoch=1, size=2) as progress:
        progress.summary({"loss": 2.0}, tag="train", num_updates=5)
    out = capsys.readouterr().out
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| INFO \| train \| epoch 001 \| loss 2\n"
    assert re.fullmatch(line, out)
    assert log_file.read_text(encoding="utf-8") == out


def test_other_ranks_only_warn(capsys):
    setup_logging(CommonConfig(), is_main=False)
    logging.getLogger("x").info("hidden")
    logging.getLogger("x").warning("shown")
    out = capsys.readouterr().out
    assert "hidden" not in out
    assert "| WARNING | x | shown" in out


def test_bad_log_settings_are_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--log-file"):
        setup_logging(CommonConfig(log_file=str(tmp_path / "file" / "x.log")))
    monkeypatch.setenv("LOGLEVEL", "LOUD")
    with pytest.raises(ConfigError, match="LOGLEVEL=LOUD: expected one of DEBUG"):
        setup_logging(CommonConfig())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_costs_one_line_and_no_traceback(capsys):
    setup_logging(CommonConfig(log_file="/dev/full"))
    logging.getLogger("x").info("first")
    logging.getLogger("x").info("second")
    captured = capsys.readouterr()
    assert "first" in captured.out and "second" in captured.out
    assert captured.err.count("\n") == 1
    assert "log lines to /dev/full are lost from here on" in captured.err
