"""Sums to log values: fairseq's keys, order and rounding; resuming."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fairseq_lite.training.metrics import Meters, TrainMetrics, rounded, valid_report
from tests.helpers.shared import shared_dir

LOGS = ["uf1", "uf2", "np2", "sentavg", "ce_bs48"]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def smoothed(sums):
    loss = sums["loss"] / sums["sample_size"] / math.log(2)
    nll = sums["nll_loss"] / sums["ntokens"] / math.log(2)
    return {"loss": loss, "nll_loss": nll, "ppl": 2**nll}


def plain(sums):
    loss = sums["loss"] / sums["sample_size"] / math.log(2)
    return {"loss": loss, "ppl": 2**loss}


def records(name: str) -> list[dict[str, str]]:
    path = shared_dir("reference", "mt", "logs", f"{name}.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if "num_updates" in r]


def sums_of(record: dict[str, str], sentence_avg: bool) -> dict[str, float]:
    """Sums that could have led to a logged line, exact where it prints enough digits."""
    tokens, sentences = float(record["wpb"]), float(record["bsz"])
    size = sentences if sentence_avg else tokens
    nll = math.log2(float(record["ppl"]))
    loss = float(record["loss"]) if "nll_loss" in record else nll
    return {
        "loss": loss * size * math.log(2),
        "nll_loss": nll * tokens * math.log(2),
        "ntokens": tokens,
        "nsentences": sentences,
        "sample_size": size,
    }


@pytest.mark.parametrize("name", LOGS)
def test_a_reference_log_line_by_line(name):
    clock = Clock()
    metrics = TrainMetrics(plain if name == "ce_bs48" else smoothed, clock)
    for record in records(name):
        if float(record["wps"]):
            clock.now += float(record["wpb"]) / float(record["wps"])
        metrics.add(
            sums_of(record, name == "sentavg"),
            grad_norm=torch.tensor(float(record["gnorm"])),
            clip_norm=1.0,
            num_updates=int(record["num_updates"]),
            lr=float(record["lr"]),
            seconds=float(record["train_wall"]),
        )
        values = metrics.report(metrics.inner)
        metrics.inner.reset()
        text = {k: f"{v:g}" for k, v in values.items()}
        assert list(text) == [k for k in record if k not in ("epoch", "update")]
        # The two rates are measured a moment apart in fairseq; wall counts its start-up.
        assert float(text.pop("ups")) == pytest.approx(float(record["ups"]), abs=0.02)
        text.pop("wall")
        assert text == {k: record[k] for k in text}


def test_an_epoch_averages_over_tokens_and_not_over_updates():
    metrics = TrainMetrics(smoothed, Clock())
    kept = {"clip_norm": 1.0, "seconds": 0.4, "lr": 0.1}
    for n, (tokens, loss, norm) in enumerate([(10, 30.0, 0.5), (90, 90.0, 2.0)], start=1):
        sums = {"loss": loss, "nll_loss": loss, "ntokens": tokens, "sample_size": tokens}
        metrics.add({**sums, "nsentences": n}, grad_norm=norm, num_updates=n, **kept)
        metrics.inner.reset()
    values = metrics.report(metrics.epoch)
    assert values["loss"] == round(120 / 100 / math.log(2), 3)
    assert values["ppl"] == round(math.exp(1.2), 2)
    assert (values["wpb"], values["bsz"]) == (50.0, 1.5)
    assert (values["gnorm"], values["clip"]) == (1.25, 50.0)
    assert (values["num_updates"], values["train_wall"]) == (2, 1.0)


def test_rates_start_after_the_first_update_and_restart_with_each_interval():
    clock = Clock()
    meters = Meters(plain, clock)
    sums = {"loss": 1.0, "ntokens": 100, "nsentences": 5, "sample_size": 100}
    meters.add(sums)
    assert meters.values()["wps"] == 0
    clock.now += 2
    meters.add(sums)
    assert meters.values()["wps"] == 50
    meters.reset()
    clock.now += 4
    meters.add(sums)
    assert meters.values()["wps"] == 25


def test_all_keys_stand_in_fairseqs_order():
    meters = Meters(lambda sums: {**smoothed(sums), "accuracy": 50.0, "bleu": 12.345}, Clock())
    meters.add_update(
        grad_norm=1.23456,
        clip_norm=0.5,
        num_updates=7,
        lr=1e-4,
        seconds=1.6,
        loss_scale=128.0,
        gb_free=10.26,
    )
    meters.add({"loss": 1.0, "nll_loss": 1.0, "ntokens": 3, "nsentences": 1, "sample_size": 3})
    values = rounded(meters.values())
    assert list(values) == [
        *("loss", "nll_loss", "ppl", "accuracy", "bleu", "wps", "ups", "wpb", "bsz"),
        *("num_updates", "lr", "gnorm", "clip", "loss_scale", "train_wall", "gb_free"),
    ]
    assert (values["gnorm"], values["bleu"], values["gb_free"]) == (1.235, 12.35, 10.3)


def test_without_clipping_there_is_no_clip():
    meters = Meters(plain, Clock())
    meters.add_update(grad_norm=5.0, clip_norm=0.0, num_updates=1, lr=1.0, seconds=1.0)
    assert "clip" not in meters.values()


def test_a_validation():
    meters = Meters(lambda sums: {**smoothed(sums), "bleu": 20.004}, Clock())
    for tokens in (30, 10):
        sums = {"loss": 40.0, "nll_loss": 30.0, "ntokens": tokens, "nsentences": 4}
        meters.add({**sums, "sample_size": tokens})
    values = valid_report(meters, num_updates=1250, best=("best_loss", 2.5))
    assert list(values) == [
        *("loss", "nll_loss", "ppl", "bleu", "wps", "wpb", "bsz", "num_updates", "best_loss"),
    ]
    assert (values["wpb"], values["bsz"], values["bleu"]) == (20.0, 4.0, 20.0)
    assert "best_loss" not in valid_report(meters, num_updates=3)


def filled(clock: Clock) -> TrainMetrics:
    metrics = TrainMetrics(smoothed, clock)
    for n in range(1, 4):
        sums = {"loss": 1.1 * n, "nll_loss": 0.7 * n, "ntokens": 9, "nsentences": 2}
        metrics.add(
            {**sums, "sample_size": 9, "n_correct": n / 3},
            grad_norm=0.1 * n,
            clip_norm=0.2,
            num_updates=n,
            lr=0.1 / n,
            seconds=0.3,
            loss_scale=128.0,
        )
        clock.now += 1
    return metrics


def test_resuming_is_exact(tmp_path):
    clock = Clock()
    metrics = filled(clock)
    torch.save(metrics.state_dict(), tmp_path / "state.pt")
    clock_2 = Clock()
    clock_2.now = 5.0
    resumed = TrainMetrics(smoothed, clock_2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for mine, theirs in ((metrics.inner, resumed.inner), (metrics.epoch, resumed.epoch)):
        assert theirs.values() == mine.values()
        assert theirs.sums == mine.sums


def test_the_state_is_what_fairseq_reads():
    """Fairseq makes each meter by its class name and gives it its state."""
    fields = {
        "AverageMeter": {"val", "sum", "count", "round"},
        "TimeMeter": {"init", "n", "round"},
        "StopwatchMeter": {"sum", "n", "round"},
    }
    state = filled(Clock()).state_dict()
    assert set(state) == {"train", "train_inner"}
    for rows in state.values():
        assert [r[0] for r in rows] == sorted(r[0] for r in rows)
        for _, _, kind, meter in rows:
            assert set(meter) == fields[kind]
        by_key = {key: meter for _, key, _, meter in rows}
        assert by_key["loss"]["sum"] / by_key["loss"]["count"] == pytest.approx(
            6.6 / 27 / math.log(2)
        )
        assert by_key["wpb"]["sum"] / by_key["wpb"]["count"] == 9


def test_fairseqs_own_state_loads():
    rows = [
        (10, "loss", "AverageMeter", _average(torch.tensor(3.2), torch.tensor(345715.125), 106877)),
        (
            10,
            "nll_loss",
            "AverageMeter",
            _average(torch.tensor(1.7), torch.tensor(181370.39), 106877),
        ),
        (90, "wps", "TimeMeter", {"init": 44.0, "n": 106877, "round": 1}),
        (100, "ups", "TimeMeter", {"init": 44.0, "n": 50.0, "round": 2}),
        (180, "wpb", "AverageMeter", _average(2707, np.int64(106877), 50)),
        (190, "bsz", "AverageMeter", _average(160, 6000, 50)),
        (200, "num_updates", "AverageMeter", _average(1250, 0, 0)),
        (300, "lr", "AverageMeter", _average(0.00146969, 0, 0)),
        (400, "gnorm", "AverageMeter", _average(torch.tensor(0.7), torch.tensor(43.849), 50)),
        (500, "clip", "AverageMeter", _average(torch.tensor(0.0), torch.tensor(800.0), 50)),
        (800, "train_wall", "StopwatchMeter", {"sum": 41.19, "n": 0.0, "round": 0}),
    ]
    metrics = TrainMetrics(smoothed, Clock())
    metrics.load_state_dict({"default": [], "train": rows, "valid": []})
    values = rounded(metrics.epoch.values())
    assert values == {
        "loss": round(345715.125 / 106877, 3),
        "nll_loss": round(181370.39 / 106877, 3),
        "ppl": round(2 ** (181370.39 / 106877), 2),
        "wps": round(106877 / 44, 1),
        "ups": round(50 / 44, 2),
        "wpb": round(106877 / 50, 1),
        "bsz": 120.0,
        "num_updates": 1250,
        "lr": 0.00146969,
        "gnorm": round(43.849 / 50, 3),
        "clip": 16.0,
        "train_wall": 41.0,
    }


def _average(val, total, count):
    return {"val": val, "sum": total, "count": count, "round": 3}


def test_an_empty_interval_has_a_state_and_values():
    metrics = TrainMetrics(smoothed, Clock())
    assert metrics.report(metrics.inner) == {"wall": 0.0}
    other = TrainMetrics(smoothed, Clock())
    other.load_state_dict(metrics.state_dict())
    assert other.epoch.values() == {}
