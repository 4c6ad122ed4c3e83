"""Attention kernels and dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fairseq_lite.models import attention
from fairseq_lite.models.attention import (
    MultiheadAttention,
    attend,
    attention_bias,
    causal_blocked,
    choose_kernel,
)
from fairseq_lite.models.dropout import Dropout, dropout


def heads(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=generator) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("masked", ["nothing", "future", "padding"])
def test_kernels_agree(masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    blocked = {
        "nothing": None,
        "future": causal_blocked(6),
        "padding": torch.arange(6)[None, None, None, :]
        >= torch.tensor([6, 4])[:, None, None, None],
    }[masked]
    bias = None if blocked is None else attention_bias(blocked, torch.float32)
    for kernel in ("sdpa", "matmul"):
        monkeypatch.setattr(attention, "choose_kernel", lambda *_, k=kernel, **__: k)
        q, k, v = (x.requires_grad_() for x in heads(2, 3, 6, 4))
        out, _ = attend(q, k, v, bias=bias, causal=masked == "future")
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_attention_is_the_formula() -> None:
    q, k, v = heads(1, 1, 3, 4)
    out, weights = attend(q, k, v, need_weights=True)
    expected = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(4), dim=-1)
    assert weights is not None
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, expected @ v)


def test_a_query_that_may_look_nowhere_is_finite() -> None:
    q, k, v = heads(1, 1, 3, 4)
    nowhere = torch.ones(3, 3, dtype=torch.bool)
    for dtype, of_bias in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),  # under autocast, states stay wider than queries
    ):
        bias = attention_bias(nowhere, of_bias)
        out, _ = attend(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias)
        assert out.isfinite().all()


def test_rule_for_kernels() -> None:
    def rule(device: str, dtype: torch.dtype, keys: int, grad: bool, p: float = 0.0) -> str:
        return choose_kernel(device, dtype, keys, grad=grad, dropout_p=p)

    assert rule("cuda", torch.bfloat16, 32, True, 0.1) == "sdpa"
    assert rule("cpu", torch.float32, 32, True) == "sdpa"
    assert rule("cpu", torch.bfloat16, 32, True) == "matmul"
    assert rule("cpu", torch.bfloat16, 512, True) == "matmul"
    assert rule("cpu", torch.bfloat16, 1024, True) == "sdpa"
    assert rule("cpu", torch.bfloat16, 32, False) == "sdpa"
    assert rule("cpu", torch.float32, 32, True, 0.1) == "matmul"


def test_multihead_attention_is_torchs() -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(12, 3)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        parts = (ours.q_proj, ours.k_proj, ours.v_proj)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, states = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    out, weights = ours(x, states, need_weights=True)
    expected, expected_weights = theirs(x, states, states, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 403, dtype=dtype)
    out = dropout(x, p)
    dropped = float((out == 0).double().mean())
    assert dropped == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / x.numel()) + 2e-5)
    kept = out[out != 0].double()
    assert float(kept.min()) == float(kept.max()) == pytest.approx(1 / (1 - p), rel=4e-3)


def test_dropped_elements_are_independent() -> None:
    torch.manual_seed(0)
    out = (dropout(torch.ones(1000, 400), 0.5) != 0).double() - 0.5
    for shifted in (out.roll(1, 1), out.roll(2, 1), out.roll(3, 1), out.roll(4, 1), out.roll(1, 0)):
        assert abs(float((out * shifted).mean()) / 0.25) < 5 / math.sqrt(out.numel())
    again = (dropout(torch.ones(1000, 400), 0.5) != 0).double() - 0.5
    assert abs(float((out * again).mean()) / 0.25) < 5 / math.sqrt(out.numel())


def test_dropout_follows_torchs_seed() -> None:
    x = torch.randn(50, 7)
    torch.manual_seed(4)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(4)
    assert torch.equal(dropout(x, 0.5), first)
    assert torch.equal(dropout(x, 0.5), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropouts_gradient_passes_where_the_value_did(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 9, dtype=dtype).add(3).requires_grad_()
    residual = torch.zeros(40, 9, dtype=dtype, requires_grad=True)
    out = dropout(x, 0.4, residual)
    grad_x, grad_residual = torch.autograd.grad(out, (x, residual), torch.ones_like(out))
    assert torch.equal(grad_x != 0, out != 0)
    torch.testing.assert_close(grad_x * x, out.detach())
    assert torch.equal(grad_residual, torch.ones_like(out))


def test_dropout_of_a_transposed_tensor_and_at_the_ends() -> None:
    x = torch.ones(6, 10).t()
    torch.manual_seed(0)
    out = dropout(x, 0.5, x)
    assert set(out.unique().tolist()) <= {1.0, 3.0}
    assert torch.equal(dropout(x, 0.0), x)
    assert not dropout(x, 1.0).any()
    assert dropout(torch.ones(0, 4), 0.5).shape == (0, 4)
    module = Dropout(0.5, "Test").eval()
    assert torch.equal(module(x), x)
    assert torch.equal(module.add(x, x), x + x)
