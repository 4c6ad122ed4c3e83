"""The native layer computes what DeepSpeed's `MOELayer` computes, where their rules are the same.

They are for one and for two experts of a token without noise, without a capacity and with one that
both formulas agree on. A top-1 expert of DeepSpeed that is full keeps tokens at random; here the
random numbers fall from token to token, which keeps the first ones, as the native layer does.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.moe.options import MoEOptions, RouterOptions

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)

DIM, EXPERTS = 8, 4


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, 12)
        self.fc2 = nn.Linear(12, DIM)

    def between(self, inner: Tensor) -> Tensor:
        return F.relu(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x)))


@pytest.fixture(scope="module")
def sharded_moe() -> Iterator[Any]:
    with contextlib.redirect_stdout(sys.stderr):  # it talks while it is imported
        from deepspeed.moe import sharded_moe
    kept = dict(sharded_moe.exp_selection_uniform_map)
    sharded_moe.exp_selection_uniform_map[torch.device("cpu")] = _falling
    yield sharded_moe
    sharded_moe.exp_selection_uniform_map.clear()
    sharded_moe.exp_selection_uniform_map.update(kept)


def _falling(shape: tuple[int, int]) -> Tensor:
    return torch.linspace(1.0, 0.5, shape[0])[:, None].expand(shape)


def native(top_k: Any, factor: float | None, **more: Any) -> MoELayer:
    torch.manual_seed(0)
    options = RouterOptions(
        EXPERTS,
        top_k,
        gate_fp32=True,
        second_policy="all",
        capacity_factor=None if factor is None else factor * top_k,
        **more,
    )
    layer = MoELayer(DIM, MoEOptions(1, options, 12), Feed, "layer")
    nn.init.normal_(layer.gate.wg.weight)
    return layer


def theirs(sharded_moe: Any, layer: MoELayer, factor: float | None) -> nn.Module:
    """DeepSpeed's layer with the weights of ours."""
    from deepspeed.moe.experts import Experts

    gate = sharded_moe.TopKGate(
        DIM,
        EXPERTS,
        layer.gate.options.top_k,
        capacity_factor=1.0 if factor is None else factor,
        min_capacity=0,
        drop_tokens=factor is not None,
        use_rts=True,
        top2_2nd_expert_sampling=False,
    )
    gate.load_state_dict(layer.gate.state_dict())
    experts = Experts(Feed(), EXPERTS)
    for ours, copy in zip(layer.experts.children(), experts.deepspeed_experts, strict=True):
        copy.load_state_dict(ours.state_dict())
    return sharded_moe.MOELayer(gate, experts, "ep_size_1", 1, EXPERTS)


def gradients(gate: nn.Module, experts: Any) -> list[Tensor]:
    found = [p.grad for module in (gate, *experts) for p in module.parameters()]
    return [torch.zeros(()) if grad is None else grad for grad in found]


def compare(
    sharded_moe: Any, layer: MoELayer, top_k: int, factor: float | None, padding: Tensor | None
) -> None:
    other = theirs(sharded_moe, layer, factor)
    for seed in range(4):
        x = torch.randn(3, 8, DIM, generator=torch.Generator().manual_seed(seed))
        mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, report = layer(mine, padding)
        used = None if padding is None else (~padding).long().view(-1)
        want = other(yours, used)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(report.balance, other.l_aux, rtol=1e-5, atol=1e-6)
        assert report.wanted.sum(0).tolist() == other.exp_counts.tolist()
        towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
        for module, result, loss in ((layer, out, report.balance), (other, want, other.l_aux)):
            module.zero_grad()
            ((result * towards).sum() + 3.0 * loss).backward()
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-5)
        got = gradients(layer.gate, layer.experts.children())
        for a, b in zip(got, gradients(other.gate, other.experts.deepspeed_experts), strict=True):
            torch.testing.assert_close(a, b.expand_as(a), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [None, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [1, 2])
def test_outputs_gradients_and_balance_loss(
    sharded_moe: Any, top_k: int, factor: float | None
) -> None:
    layer = native(top_k, factor)
    compare(sharded_moe, layer, top_k, factor, None)
    if factor == 0.5:  # tokens were dropped
        assert int(layer(torch.randn(24, DIM))[1].dropped.sum()) > 0


@pytest.mark.parametrize("factor", [None, 0.5])
def test_padding_is_routed_nowhere(sharded_moe: Any, factor: float | None) -> None:
    padding = torch.arange(8).expand(3, -1) >= torch.tensor([[8], [5], [2]])
    compare(sharded_moe, native(1, factor, mask_padding=True), 1, factor, padding)
    with pytest.raises(AssertionError):
        compare(sharded_moe, native(1, factor), 1, factor, padding)


def test_another_capacity_is_noticed(sharded_moe: Any) -> None:
    with pytest.raises(AssertionError):
        compare(sharded_moe, native(2, 0.75), 2, 0.5, None)
    with pytest.raises(AssertionError):
        compare(sharded_moe, native(2, 0.5, normalize_before_dropping=True), 2, 0.5, None)
