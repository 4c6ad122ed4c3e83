"""Losses that balance experts: formula, figures by hand, independence of batches, logs."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import CommonConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.criteria.api import Criterion
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.moe import watch
from fairseq_lite.moe.router import RouterReport
from fairseq_lite.parallel.world import SingleWorld
from fairseq_lite.training.assembly import check
from fairseq_lite.training.loggers import ProgressLogs
from fairseq_lite.training.metrics import Meters, rounded
from fairseq_lite.training.trainer import add_sums, zero_sums
from tests.helpers.commands import REPOSITORY
from tests.helpers.generation import PAD, make_dictionary, make_model, make_sample

TASK = SimpleNamespace(target_dictionary=make_dictionary())
MOE: dict[str, Any] = {
    "moe_freq": 1,
    "moe_expert_count": 4,
    "moe_second_expert_policy": "all",
    "dropout": 0.0,
}
LAYERS = [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)]


def make(name: str = "moe_cross_entropy", sentence_avg: bool = False, **fields: Any) -> Criterion:
    entry = load_builtins()["criterion"].get(name)
    criterion: Criterion = entry.factory(entry.config(**fields), TASK, sentence_avg=sentence_avg)
    return criterion


def batch(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """A batch with all that criteria read."""
    sample = make_sample(lengths, seed)
    return {**sample, "ntokens": int(sample["target"].ne(PAD).sum()), "nsentences": len(lengths)}


def added(*parts: dict[str, Any]) -> dict[str, Any]:
    """The sums of several batches, as trainer and world add them up."""
    totals: dict[str, Any] = {}
    for part in parts:
        add_sums(totals, part)
    return SingleWorld().sum(totals)


# -- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["cross_entropy", "label_smoothed_cross_entropy"])
@pytest.mark.parametrize("method", ["average", "sum"])
@pytest.mark.parametrize("sentence_avg", [False, True])
def test_the_formula(base: str, method: str, sentence_avg: bool) -> None:
    fields = {} if base == "cross_entropy" else {"label_smoothing": 0.1}
    model, sample = make_model(**MOE).train(), batch([6, 4, 3])
    plain, size, _ = make(base, sentence_avg, **fields)(model, sample)
    reports = model(**sample["net_input"])[1]["experts"].values()
    balance = sum(report.balance for report in reports)
    z = sum(report.z for report in reports)
    share = 1 / 4 if method == "average" else 1
    criterion = make(
        f"moe_{base}", sentence_avg, **fields,
        moe_gate_loss_wt=0.5, moe_gate_loss_combine_method=method, moe_z_loss_wt=0.25,
    )  # fmt: skip
    loss, its_size, sums = criterion(model, sample)
    assert its_size == size == (3 if sentence_avg else sample["ntokens"])
    expected = plain + size * share * (0.5 * balance + 0.25 * z)
    torch.testing.assert_close(loss, expected)
    gate = torch.autograd.grad(loss, model.decoder.layers[1].moe_layer.gate.wg.weight)
    assert float(gate[0].abs().sum()) > 0
    shown = criterion.metrics(added(sums))
    assert shown["loss"] == pytest.approx(float(loss.detach()) / size / math.log(2))
    assert shown["inner_loss"] == pytest.approx(float(plain.detach()) / size / math.log(2))
    assert shown["moe_gate_loss"] == pytest.approx(share * float(balance.detach()), rel=1e-5)
    assert shown["moe_z_loss"] == pytest.approx(share * float(z.detach()), rel=1e-5)


def test_the_logarithm_of_the_balance(caplog: pytest.LogCaptureFixture) -> None:
    model, sample = (
        make_model(**MOE).train(),
        batch([5, 5, 5]),
    )  # padding would count in training only
    reports = model(**sample["net_input"])[1]["experts"].values()
    mean = sum(float(report.balance.detach()) for report in reports) / 4
    assert mean > 1.01
    with caplog.at_level(logging.WARNING):
        criterion = make(moe_gate_loss_transform="neg_log", moe_gate_loss_wt=-1.0)
        assert caplog.records == []
        make(moe_gate_loss_transform="neg_log")
    assert "give the weight a minus" in caplog.text
    for each in (criterion.train(), criterion.eval()):
        shown = each.metrics(added(each(model, sample)[2]))
        assert shown["moe_gate_loss"] == pytest.approx(-math.log(mean), rel=1e-5)
        total = shown["inner_loss"] + math.log(mean) / math.log(2)
        assert shown["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("base", ["cross_entropy", "label_smoothed_cross_entropy"])
@pytest.mark.parametrize("sentence_avg", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_base_figures_are_those_of_the_dense_criterion(
    base: str, sentence_avg: bool, training: bool
) -> None:
    """To the printed digit, so that runs with and without experts can be compared."""
    fields = {} if base == "cross_entropy" else {"label_smoothing": 0.1, "report_accuracy": True}
    model = make_model(**MOE).train(training)
    plain = make(base, sentence_avg, **fields).train(training)
    ours = make(f"moe_{base}", sentence_avg, **fields).train(training)
    samples = [batch([6, 4, 3]), batch([5, 5], seed=1)]
    expected = rounded(plain.metrics(added(*(plain(model, s)[2] for s in samples))))
    shown = rounded(ours.metrics(added(*(ours(model, s)[2] for s in samples))))
    assert shown["inner_loss"] == expected.pop("loss")
    assert {key: shown[key] for key in expected} == expected
    assert shown["loss"] > shown["inner_loss"]
    assert list(shown)[:2] == ["loss", "inner_loss"]


def test_a_rank_without_data_adds_nothing() -> None:
    criterion, model = make(), make_model(**MOE).train()
    sums = criterion(model, batch([6, 4, 3]))[2]
    alone = criterion.metrics(added(sums))
    assert criterion.metrics(added(sums, zero_sums(sums))) == alone


def test_a_dense_model_is_refused() -> None:
    dense, criterion = make_model(), make()
    line = r"--criterion moe_cross_entropy: the model has no experts: .*--criterion cross_entropy$"
    with pytest.raises(ConfigError, match=line):
        criterion.check(dense)
    with pytest.raises(ConfigError, match=line):
        criterion(dense, batch([4]))
    argv = ["data", "--arch", "transformer_tiny", "--optimizer", "adam", "--batch-size", "4"]
    argv += ["--criterion", "moe_cross_entropy"]
    with pytest.raises(ConfigError, match=line):
        check(parse("flite-train", argv, load_builtins()))
    check(parse("flite-train", [*argv, "--moe-freq", "2", "--moe-expert-count", "4"],
                load_builtins()))  # fmt: skip
    criterion.check(make_model(**MOE))


@pytest.mark.parametrize(
    "fields", [{"moe_gate_loss_wt": math.nan}, {"moe_z_loss_wt": -1.0}, {"label_smoothing": 1.0}]
)
def test_weights_that_make_no_loss_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        make("moe_label_smoothed_cross_entropy", **fields)


# -- figures ------------------------------------------------------------------------------------


def report(first: list[int], second: list[int], dropped: list[int], balance: float) -> RouterReport:
    """A layer's report of top-2 routing with equal probabilities."""
    wanted = torch.tensor([first, second])
    tokens = wanted[0].sum()
    load = wanted.sum(0)
    load[0] -= sum(dropped)
    return RouterReport(
        balance=torch.tensor(balance),
        z=torch.tensor(2.0),
        load=load,
        wanted=wanted,
        dropped=torch.tensor(dropped),
        tokens=tokens,
        entropy=tokens * 0.5,
        probability=torch.full((len(first),), float(tokens) / len(first)),
    )


# Ten experts: the busiest and the idlest fifth are two of them.
ONE = report([10, 6, 4, 0, 0, 0, 0, 0, 0, 0], [2] * 10, [5, 1], balance=1.5)
TWO = report([0, 0, 0, 10, 10, 10, 10, 10, 10, 20], [8] * 10, [0, 0], balance=1.0)


def test_figures_of_sums_and_not_means_of_means() -> None:
    sums = added(
        watch.report_sums({"a": ONE}, training=True), watch.report_sums({"a": TWO}, training=True)
    )
    assert list(sums) == ["experts.2.a"]
    figures = watch.metadata(sums)
    assert figures == {
        "overflow_expert1": pytest.approx(100 * 5 / 100),  # a mean of means says 12.5
        "overflow_expert2": pytest.approx(100 * 1 / 100),
        "entropy_gating": pytest.approx(0.5),
        "expert1_balance_top": pytest.approx(30.0),
        "expert1_balance_bottom": pytest.approx(10.0),
        "unused_expert1_count": 0.0,
        "expert2_balance_top": pytest.approx(20.0),
        "expert2_balance_bottom": pytest.approx(20.0),
        "unused_expert2_count": 0.0,
    }
    means = [watch.metadata(added(watch.report_sums({"a": each}, training=True)))
             for each in (ONE, TWO)]  # fmt: skip
    assert sum(each["overflow_expert1"] for each in means) / 2 == pytest.approx(12.5)
    assert means[0]["unused_expert1_count"] == 7.0
    layer = watch.shown_layers(sums)["a"]
    assert layer["balance"] == pytest.approx((20 * 1.5 + 80 * 1.0) / 100)
    assert layer["dropped"] == pytest.approx(6 / 200)
    assert layer["unused"] == 0
    assert sum(layer["load"]) == pytest.approx(1.0, abs=1e-3)
    assert layer["load"][9] == pytest.approx((20 + 10) / 194, rel=1e-3)
    assert layer["wanted"][0] == pytest.approx((10 + 10) / 200, rel=1e-3)


def test_layers_are_averaged_and_top_1_has_one_choice() -> None:
    top1 = ONE._replace(wanted=ONE.wanted[:1], dropped=ONE.dropped[:1])
    figures = watch.metadata(added(watch.report_sums({"a": top1, "b": TWO}, training=True)))
    assert figures["overflow_expert1"] == pytest.approx((25.0 + 0.0) / 2)
    assert figures["overflow_expert2"] == 0.0  # of the one layer that has second choices
    assert figures["unused_expert1_count"] == pytest.approx((7 + 3) / 2)


def test_nothing_routed_is_no_division_by_zero() -> None:
    nothing = report([0] * 10, [0] * 10, [0, 0], balance=0.0)
    for training in (True, False):
        sums = added(watch.report_sums({"a": nothing}, training=training))
        assert all(math.isfinite(value) for value in watch.metadata(sums).values())
        shown = watch.shown_layers(sums)["a"]
        assert (shown["balance"], shown["dropped"], shown["unused"]) == (0.0, 0.0, 10)


def test_evaluation_does_not_depend_on_batches() -> None:
    criterion = make("moe_label_smoothed_cross_entropy", label_smoothing=0.1, moe_z_loss_wt=0.1)
    model = make_model(**MOE)
    lengths = [7, 6, 5, 3, 2]
    whole = batch(lengths)
    singles = [one_of(whole, i, n) for i, n in enumerate(lengths)]

    def figures() -> tuple[dict[str, float], dict[str, float]]:
        apart = criterion.metrics(added(*(criterion(model, s)[2] for s in singles)))
        return criterion.metrics(added(criterion(model, whole)[2])), apart

    criterion.eval()
    model.eval()
    together, apart = figures()
    assert apart == pytest.approx(together, rel=1e-5)
    # The mean of the batches' own balance losses, which training uses, does depend on them.
    criterion.train()
    together, apart = figures()
    assert apart["moe_gate_loss"] > 1.05 * together["moe_gate_loss"]


def one_of(sample: dict[str, Any], i: int, length: int) -> dict[str, Any]:
    """One sentence of a batch, without padding."""
    given = sample["net_input"]
    return {
        "target": sample["target"][i : i + 1, :length],
        "ntokens": length,
        "nsentences": 1,
        "net_input": {
            "src_tokens": given["src_tokens"][i : i + 1, -length:],
            "src_lengths": given["src_lengths"][i : i + 1],
            "prev_output_tokens": given["prev_output_tokens"][i : i + 1, :length],
        },
    }


# -- meters and logs ----------------------------------------------------------------------------


def meters_of(criterion: Criterion, *sums: dict[str, Any]) -> Meters:
    meters = Meters(criterion.metrics)
    for each in sums:
        meters.add(added(each))
    return meters


def test_meters_keep_vectors_through_a_checkpoint() -> None:
    criterion, model = make(), make_model(**MOE).train()
    sums = [criterion(model, batch([6, 4, 3], seed))[2] for seed in range(3)]
    expected = meters_of(criterion, *sums)
    resumed = Meters(criterion.metrics)
    stored = json.loads(json.dumps(meters_of(criterion, *sums[:2]).state()))  # plain values only
    resumed.load_state(stored)
    resumed.add(added(sums[2]))
    assert {k: v for k, v in resumed.values().items() if k != "wps"} == {
        k: v for k, v in expected.values().items() if k != "wps"
    }
    assert watch.shown_layers(resumed.sums) == watch.shown_layers(expected.sums)
    assert list(watch.shown_layers(resumed.sums)) == LAYERS


def shown_and_written(tmp_path: Path, log_format: str) -> dict[str, dict[str, Any]]:
    criterion, model = make(), make_model(**MOE).train()
    meters = meters_of(criterion, criterion(model, batch([6, 4, 3]))[2])
    layers = watch.shown_layers(meters.sums)
    common = CommonConfig(log_format=log_format, tensorboard_logdir=str(tmp_path))
    logs = ProgressLogs(common, terminal=False)
    with logs.begin(epoch=2, size=10) as progress:
        progress.layers(layers, tag="train_inner", num_updates=12)
        progress.layers({}, tag="train", num_updates=12)
    logs.close()
    return layers


def test_layers_in_json_and_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is absent"
    )
    caplog.set_level(logging.INFO)
    layers = shown_and_written(tmp_path, "json")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "moe"]
    assert [line["layer"] for line in lines] == LAYERS
    for line in lines:
        name = line.pop("layer")
        assert line == {"split": "train_inner", "epoch": 2, "updates": 12, **layers[name]}
    events = accumulator.EventAccumulator(str(tmp_path / "train_inner"))
    events.Reload()
    keys = ("balance", "dropped", "entropy", "unused")
    assert set(events.Tags()["scalars"]) == {f"moe/{n}/{key}" for n in LAYERS for key in keys}
    for key in ("load", "wanted"):
        [event] = events.Histograms(f"moe/decoder.layers.1/{key}")
        assert event.step == 12
        assert event.histogram_value.bucket == pytest.approx(layers["decoder.layers.1"][key])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train_inner"], "nothing of no layers"


@pytest.mark.parametrize("log_format", ["simple", "tqdm", "none"])
def test_other_formats_stay_short(
    log_format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shown_and_written(tmp_path, log_format)
    assert [r for r in caplog.records if r.name == "moe"] == []


def test_one_process_sums_vectors() -> None:
    assert SingleWorld().sum({}) == {}
    sums = SingleWorld().sum({"a": 1, "v": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)})
    assert (sums["a"], sums["b"]) == (1.0, 3.0)
    assert isinstance(sums["b"], float)
    vector: Tensor = sums["v"]
    assert vector.dtype == torch.float64
    assert vector.tolist() == [1.0, 2.0]


# -- pictures -----------------------------------------------------------------------------------


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_moe", REPOSITORY / "scripts/plot_moe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plot_moe"] = module
    spec.loader.exec_module(module)
    return module


def log_line(split: str, layer: str, updates: int, load: list[float]) -> str:
    record = {"split": split, "epoch": 1, "updates": updates, "layer": layer, "balance": 1.0}
    record |= {"dropped": 0.25, "entropy": 0.5, "unused": 0, "load": load, "wanted": load}
    return f"2026-01-01 00:00:00 | INFO | moe | {json.dumps(record)}"


LOG = "\n".join(
    [
        '2026-01-01 00:00:00 | INFO | train_inner | {"epoch": 1, "num_updates": "10"}',
        log_line("train_inner", "a", 10, [0.5, 0.5]),
        log_line("train_inner", "b", 10, [0.9, 0.1]),
        log_line("train_inner", "a", 20, [0.75, 0.25]),
        log_line("train_inner", "a", 20, [0.7, 0.3]),
        log_line("train_inner", "b", 20, [0.6, 0.4]),
        log_line("valid", "a", 20, [0.4, 0.6]),
        log_line("train_inner", "a", 30, [0.1, 0.9])[:90],
    ]
)


def test_records_of_layers_are_found(script: ModuleType) -> None:
    found = script.read(LOG.splitlines())
    assert {split: list(layers) for split, layers in found.items()} == {
        "train_inner": ["a", "b"],
        "valid": ["a"],
    }
    loads = {updates: r["load"] for updates, r in found["train_inner"]["a"].items()}
    assert loads == {10: [0.5, 0.5], 20: [0.7, 0.3]}, "what was logged again counts"


def test_a_picture_of_the_experts(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log, out = tmp_path / "a.log", tmp_path / "moe.png"
    log.write_text(LOG)
    for more in ([], ["--split", "valid"], ["--layer", "b", "--key", "wanted"]):
        out.unlink(missing_ok=True)
        script.main([str(log), "--out", str(out), *more])
        assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--split", "test"], "--split test: .* has train_inner, valid"),
        (["--layer", "c"], "--layer c: .* has a, b"),
    ],
)
def test_what_the_log_does_not_have_is_named(
    script: ModuleType, tmp_path: Path, more: list[str], line: str
) -> None:
    (tmp_path / "a.log").write_text(LOG)
    with pytest.raises(DataError, match=line):
        script.main([str(tmp_path / "a.log"), *more])
    (tmp_path / "dense.log").write_text(LOG.splitlines()[0])
    with pytest.raises(DataError, match="--criterion moe_cross_entropy"):
        script.main([str(tmp_path / "dense.log")])
