"""Loss scale and autocast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fairseq_lite.config.core import CommonConfig
from fairseq_lite.errors import ConfigError, TrainingError
from fairseq_lite.optim import precision as precision_module
from fairseq_lite.optim.float16 import Float16Products
from fairseq_lite.optim.precision import LossScaler, Precision, make_precision

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # only named: nothing is put there


def test_float32_changes_nothing():
    precision = make_precision(CommonConfig(), CPU)
    loss = torch.ones(())
    assert precision.scale(loss) is loss
    assert precision.unscale == 1.0
    assert precision.loss_scale is None
    assert precision.state_dict() == {}
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    precision.succeeded()


@pytest.mark.parametrize("flag", ["bf16", "memory_efficient_bf16", "amp"])
def test_bfloat16_on_a_cpu(flag):
    precision = make_precision(CommonConfig(**{flag: True}), CPU)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with precision.autocast():
        out = torch.ones(2, 2) @ weight
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert precision.scaler is None


def float16_step(known: bool, monkeypatch: pytest.MonkeyPatch, again: bool = False):
    """What a layer, attention and a loss give in float16 on a CPU, and the gradients."""
    monkeypatch.setattr(precision_module, "cpu_knows_float16", lambda: known)
    precision = make_precision(CommonConfig(fp16=True), CPU)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32))
    x = torch.randn(6, 10, 32)
    with precision.autocast():
        out = checkpoint(model, x, use_reentrant=False) if again else model(x)
        mixed = functional.scaled_dot_product_attention(out, out, out)
        scores = torch.baddbmm(torch.zeros(6, 10, 10), mixed, out.transpose(1, 2))
        loss = scores.float().square().sum()
    with precision.products():
        torch.autograd.backward(precision.scale(loss))
    return scores, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("again", [False, True])
def test_float16_on_a_cpu_that_does_not_know_it(again, monkeypatch):
    scores, grads = float16_step(True, monkeypatch)
    ours, our_grads = float16_step(False, monkeypatch, again)
    assert scores.dtype == ours.dtype == torch.float16
    torch.testing.assert_close(ours, scores, rtol=3e-3, atol=3e-3)
    for grad, expected in zip(our_grads, grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected, rtol=0, atol=3e-3 * float(expected.abs().max()))


def test_products_of_float16_are_rounded_and_overflow():
    row, column = torch.full((1, 3), 200.0).half(), torch.tensor([[200.0], [1.0], [-1.0]]).half()
    with Float16Products():
        assert float(row @ column) == float(torch.tensor(200.0 * 200.0).half())
        assert float((row * 2) @ column) == float("inf")
        wide = row.float() @ column.float()
    assert wide.dtype == torch.float32 and float(wide) == 40000.0


def test_amp_on_cuda_is_float16_with_its_own_settings():
    precision = make_precision(
        CommonConfig(amp=True, amp_init_scale=64, amp_scale_window=7, fp16_scale_window=9), CUDA
    )
    assert precision.dtype == torch.float16
    assert precision.scaler is not None
    assert (precision.scaler.scale, precision.scaler.window) == (64.0, 7)


def test_the_default_window_is_so_many_batches():
    common = CommonConfig(fp16=True)
    precision = make_precision(common, CUDA, update_freq=(4,), world_size=8)
    assert precision.scaler is not None
    assert precision.scaler.window == 2**14 // 32
    assert precision.loss_scale == 128.0
    with pytest.raises(ConfigError, match="--fp16-scale-window"):
        make_precision(common, CUDA, update_freq=(4, 2))


def test_a_norm_that_is_not_finite():
    precision = Precision()
    assert precision.finite(3.0)
    assert precision.finite(torch.tensor(3.0))
    for bad in (float("nan"), float("inf"), torch.tensor(float("nan"))):
        assert not precision.finite(bad)
    with pytest.raises(TrainingError, match="not finite.*--lr.*--clip-norm"):
        precision.back_off()


def test_the_scale_halves_and_doubles():
    scaler = LossScaler(128, window=3)
    scales = []
    for ok in (True, True, True, False, True, True, True, True, True, True):
        (scaler.succeeded if ok else scaler.overflowed)()
        scales.append(scaler.scale)
    # The first window counts from one update before the run, as in fairseq.
    assert scales == [128, 128, 256, 128, 128, 128, 256, 256, 256, 512]


def test_scaling_is_undone():
    precision = Precision(torch.float16, "cpu", LossScaler(8, window=100))
    w = torch.nn.Parameter(torch.ones(3))
    precision.scale((w * 2).sum()).backward()
    assert w.grad is not None
    assert torch.equal(w.grad * precision.unscale, torch.full((3,), 2.0))


def test_tolerance_spares_a_rare_overflow():
    scaler = LossScaler(128, window=1000, tolerance=0.3)
    for _ in range(9):
        scaler.succeeded()
    scaler.overflowed()  # 1 of 10
    assert scaler.scale == 128
    scaler.overflowed()  # 2 of 11
    scaler.overflowed()  # 3 of 12
    scaler.overflowed()  # 4 of 13
    assert scaler.scale == 64


def test_the_minimum_stops_training_and_says_what_to_do():
    scaler = LossScaler(4, window=10, minimum=1.0)
    scaler.overflowed()
    with pytest.raises(TrainingError, match=r"minimum \(1\).*--lr.*--bf16"):
        scaler.overflowed()
    assert scaler.scale == 2


def test_the_threshold_is_a_floor():
    scaler = LossScaler(4, window=10, threshold=2.0)
    for _ in range(5):
        scaler.overflowed()
    assert scaler.scale == 2


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60), st.integers(1, 5))
def test_resuming_a_scaler(outcomes, cut, window):
    def step(precision, outcome):
        precision.succeeded() if outcome else precision.back_off()

    def fresh():
        return Precision(torch.float16, "cpu", LossScaler(2.0**20, window=window, minimum=0.0))

    through = fresh()
    for outcome in outcomes:
        step(through, outcome)
    first = fresh()
    for outcome in outcomes[:cut]:
        step(first, outcome)
    second = fresh()
    second.load_state_dict(first.state_dict())
    for outcome in outcomes[cut:]:
        step(second, outcome)
    assert second.state_dict() == through.state_dict()


def test_fairseqs_state_has_the_scale_alone():
    precision = Precision(torch.float16, "cpu", LossScaler(128, window=3))
    precision.load_state_dict({"state": {}, "param_groups": [], "loss_scale": 32.0})
    assert precision.loss_scale == 32.0
    Precision().load_state_dict({"loss_scale": 32.0})
