"""Losses: the fused computation against the plain one, and what is logged."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.criteria import cross_entropy, fused
from fairseq_lite.criteria.api import CRITERIA, Criterion
from fairseq_lite.criteria.fused import fused_smoothed_loss, smoothed_loss
from fairseq_lite.errors import ConfigError

PAD = 1
TASK = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))


def problem(n: int = 60, v: int = 50, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator)
    weight = 0.3 * torch.randn(v, d, generator=generator)
    target = torch.randint(2, v, (n,), generator=generator)
    target[::7] = PAD
    return features.requires_grad_(), weight.requires_grad_(), target


def written_out(features: Tensor, weight: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """The loss token by token, from its definition."""
    total = torch.zeros((), dtype=torch.float64)
    log_probs = torch.log_softmax(features.double() @ weight.double().t(), dim=-1)
    others = epsilon / (weight.size(0) - 1)
    for row, y in zip(log_probs, target.tolist(), strict=True):
        if y != PAD:
            smoothed = torch.full_like(row, others)
            smoothed[y] = 1 - epsilon
            total = total - (smoothed * row).sum()
    return total


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("numbers", [1 << 25, 1])  # one chunk; as many as there may be
@pytest.mark.parametrize("device_path", ["cpu", "other"])
def test_fused_is_plain(
    epsilon: float, numbers: int, device_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK_NUMBERS", numbers)
    # Off the CPU padding stays in and its gradient is masked; both ways run here.
    monkeypatch.setattr(fused, "_drops_padding", lambda _: device_path == "cpu")
    features, weight, target = problem(n=200)
    plain = smoothed_loss(features @ weight.t(), target, epsilon, PAD, count_correct=True)
    ours = fused_smoothed_loss(features, weight, target, epsilon, PAD, count_correct=True)
    for a, b in zip(ours, plain, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6)
    exact = written_out(features, weight, target, epsilon)
    assert float(ours.loss) == pytest.approx(float(exact), rel=1e-6)
    got = torch.autograd.grad(3 * ours.loss, (features, weight))
    for loss in (plain.loss, exact):
        for a, b in zip(got, torch.autograd.grad(3 * loss, (features, weight)), strict=True):
            assert relative(a, b) < 1e-6


def test_the_usual_mistake_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """eps/V, as torch's own label smoothing has it, instead of fairseq's eps/(V-1)."""

    def over_all(epsilon: float, vocabulary: int) -> tuple[float, float]:
        return 1.0 - epsilon, epsilon / vocabulary

    features, weight, target = problem()
    exact = written_out(features, weight, target, 0.1)
    monkeypatch.setattr(fused, "smoothing_weights", over_all)
    wrong = smoothed_loss(features @ weight.t(), target, 0.1, PAD)
    theirs = torch.nn.functional.cross_entropy(
        features @ weight.t(), target, ignore_index=PAD, label_smoothing=0.1, reduction="sum"
    )
    assert float(wrong.loss) == pytest.approx(float(theirs), rel=1e-5)
    assert float(wrong.loss) != pytest.approx(float(exact), rel=1e-6)
    got = torch.autograd.grad(wrong.loss, (features, weight))
    for a, b in zip(got, torch.autograd.grad(exact, (features, weight)), strict=True):
        assert relative(a, b) > 1e-4


def test_fused_under_autocast_is_close() -> None:
    features, weight, target = problem(n=400)
    exact = smoothed_loss(features @ weight.t(), target, 0.1, PAD)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused_smoothed_loss(features, weight, target, 0.1, PAD)
    assert float(ours.loss) == pytest.approx(float(exact.loss), rel=3e-3)
    got = torch.autograd.grad(ours.loss, (features, weight))
    expected = torch.autograd.grad(exact.loss, (features, weight))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < 2e-2


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_but_padding_is_a_loss_of_zero(n: int) -> None:
    features, weight, _ = problem()
    target = torch.full((n,), PAD)
    loss = fused_smoothed_loss(features[:n], weight, target, 0.1, PAD).loss
    grads = torch.autograd.grad(loss, (features, weight))
    assert float(loss.detach()) == 0.0
    assert not any(g.any() for g in grads)


def test_no_gradient_is_made_when_none_is_needed() -> None:
    features, weight, target = problem()
    with torch.no_grad():
        loss = fused_smoothed_loss(features, weight, target, 0.1, PAD).loss
    assert not loss.requires_grad
    frozen = fused_smoothed_loss(features, weight.detach(), target, 0.1, PAD).loss
    (grad,) = torch.autograd.grad(frozen, features)
    both = fused_smoothed_loss(features, weight, target, 0.1, PAD).loss
    torch.testing.assert_close(grad, torch.autograd.grad(both, features)[0])


# -- criteria -----------------------------------------------------------------------------------


class Lookup(nn.Module):
    """The smallest model there is: the previous token decides."""

    def __init__(self, fused_path: bool, words: int = 20, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Parameter(torch.randn(words, width, generator=generator))
        self.out = nn.Parameter(torch.randn(words, width, generator=generator))
        self.fused_path = fused_path

    @property
    def output_weight(self) -> Tensor | None:
        return self.out if self.fused_path else None

    def output_layer(self, features: Tensor) -> Tensor:
        return features @ self.out.t()

    def get_targets(self, sample: Any, net_output: Any) -> Tensor:
        target: Tensor = sample["target"]
        return target

    def forward(self, prev_output_tokens: Tensor, features_only: bool = False) -> Any:
        features = self.embed[prev_output_tokens]
        return (features if features_only else self.output_layer(features)), {}


def batch() -> dict[str, Any]:
    target = torch.tensor([[5, 6, 7, 2], [8, 2, PAD, PAD], [9, 10, 2, PAD]])
    prev = target.roll(1, 1)
    prev[:, 0] = 2
    return {
        "target": target,
        "ntokens": 9,
        "nsentences": 3,
        "net_input": {"prev_output_tokens": prev},
    }


def make(name: str, sentence_avg: bool = False, **fields: Any) -> Criterion:
    entry = CRITERIA.get(name)
    criterion: Criterion = entry.factory(entry.config(**fields), TASK, sentence_avg=sentence_avg)
    return criterion


@pytest.mark.parametrize("fused_path", [True, False])
def test_cross_entropy(fused_path: bool) -> None:
    model, sample = Lookup(fused_path), batch()
    loss, size, sums = make("cross_entropy")(model, sample)
    logits = model(**sample["net_input"])[0]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), sample["target"].flatten(), ignore_index=PAD, reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert (size, sums["ntokens"], sums["nsentences"], sums["sample_size"]) == (9, 9, 3, 9)
    assert not torch.as_tensor(sums["loss"]).requires_grad


@pytest.mark.parametrize("fused_path", [True, False])
def test_label_smoothing_logs_both_losses_and_accuracy(fused_path: bool) -> None:
    model, sample = Lookup(fused_path), batch()
    criterion = make("label_smoothed_cross_entropy", label_smoothing=0.1, report_accuracy=True)
    loss, _, sums = criterion(model, sample)
    logits = model(**sample["net_input"])[0]
    real = sample["target"] != PAD
    hits = (logits.argmax(-1) == sample["target"])[real].sum()
    assert (float(sums["n_correct"]), float(sums["total"])) == (float(hits), 9)
    plain, _, _ = make("cross_entropy")(model, sample)
    assert float(sums["nll_loss"]) == pytest.approx(float(plain), rel=1e-6)
    assert float(loss) > float(sums["nll_loss"])


@pytest.mark.parametrize("fused_path", [True, False])
def test_a_prefix_can_be_left_out(fused_path: bool) -> None:
    model, sample = Lookup(fused_path), batch()
    fields = {"label_smoothing": 0.1, "report_accuracy": True}
    skipping = make("label_smoothed_cross_entropy", ignore_prefix_size=1, **fields)
    loss, size, sums = skipping(model, sample)
    cut = batch()
    cut["target"][:, 0] = PAD
    expected, _, _ = make("label_smoothed_cross_entropy", **fields)(model, cut)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert size == 9  # fairseq divides by all tokens all the same
    assert float(sums["total"]) == 6


def test_fp16_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("fused")

    monkeypatch.setattr(cross_entropy, "fused_smoothed_loss", fail)
    model = Lookup(fused_path=True).half()
    loss, _, _ = make("label_smoothed_cross_entropy", label_smoothing=0.1)(model, batch())
    loss.backward()
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothed_cross_entropy"])
def test_sentence_avg_counts_sentences(name: str) -> None:
    _, size, sums = make(name, sentence_avg=True)(Lookup(True), batch())
    assert (size, sums["sample_size"], sums["ntokens"]) == (3, 3, 9)


def test_metrics_are_base_2_in_log_order() -> None:
    sums = {"loss": 30 * math.log(2), "ntokens": 10, "sample_size": 10, "nsentences": 2}
    assert make("cross_entropy").metrics(sums) == pytest.approx({"loss": 3.0, "ppl": 8.0})
    by_sentence = make("cross_entropy", True).metrics({**sums, "sample_size": 2})
    assert list(by_sentence.items()) == [
        ("loss", pytest.approx(15.0)),
        ("nll_loss", pytest.approx(3.0)),
        ("ppl", pytest.approx(8.0)),
    ]
    smoothed = make("label_smoothed_cross_entropy").metrics(
        {**sums, "nll_loss": 20 * math.log(2), "n_correct": 2, "total": 3}
    )
    assert list(smoothed) == ["loss", "nll_loss", "ppl", "accuracy"]
    assert smoothed == pytest.approx({"loss": 3, "nll_loss": 2, "ppl": 4, "accuracy": 66.667})


def test_metrics_survive_extremes() -> None:
    sums = {"loss": 1e6, "nll_loss": 1e6, "ntokens": 1, "sample_size": 1, "nsentences": 1}
    assert make("cross_entropy").metrics(sums)["ppl"] == math.inf
    empty = dict.fromkeys(sums, 0.0)
    assert make("label_smoothed_cross_entropy").metrics(empty)["loss"] == 0.0


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"label_smoothing": 1.0}, "--label-smoothing"), ({"ignore_prefix_size": -1}, "--ignore-")],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make("label_smoothed_cross_entropy", **fields)


def test_names_checkpoints_record() -> None:
    assert make("cross_entropy").fairseq_name == "CrossEntropyCriterion"
    assert make("label_smoothed_cross_entropy").fairseq_name == "LabelSmoothedCrossEntropyCriterion"
