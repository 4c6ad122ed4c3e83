"""The layer on DeepSpeed's code and the native one compute the same from the same parameters."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from torch import nn

from tests.helpers.user_dir import needs_deepspeed, part

DIM, EXPERTS, TOKENS = 8, 4, 37


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, 12)
        self.fc2 = nn.Linear(12, DIM)

    def between(self, inner):
        return inner.relu()

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x)))


def options(top_k=1, factor=None, **more):
    made = part("options")
    router = made.GateOptions(
        num_experts=EXPERTS,
        top_k=top_k,
        gate_fp32=True,
        second_policy=more.pop("second_policy", "all"),
        capacity_factor=factor,
        mask_padding=True,
        **more,
    )
    return made.DeepSpeedOptions(every=2, router=router, ffn_dim=12)


def layer(kind: str, chosen, seed=3):
    torch.manual_seed(seed)
    made = getattr(part("layers"), kind)(DIM, chosen, Feed, "layer")
    nn.init.normal_(made.gate.wg.weight)
    return made


def both(chosen):
    native, deepspeed = layer("NativeMixture", chosen), layer("DeepSpeedMixture", chosen)
    for a, b in zip(native.parameters(), deepspeed.parameters(), strict=True):
        assert torch.equal(a, b)
    return native, deepspeed


def run(mixture, x, padding=None, gate_weight=0.3):
    """Output, report and all gradients, of the tokens, too."""
    x = x.clone().requires_grad_()
    mixture.zero_grad()
    out, report = mixture(x, padding)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    ((out * weights).sum() + gate_weight * report.balance + 0.1 * report.z).backward()
    return out.detach(), report, [x.grad, *(p.grad for p in mixture.parameters())]


def assert_same(one, other):
    for a, b in zip([one[0], *one[2]], [other[0], *other[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name, a, b in zip(one[1]._fields, one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-5, atol=1e-5, msg=name)


def tokens(count=TOKENS, seed=5):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def padded():
    x = tokens(40).view(8, 5, DIM)
    padding = torch.arange(5)[None] >= torch.tensor([5, 4, 5, 1, 3, 5, 2, 4])[:, None]
    return x, padding


CASES = {
    "dropless": {},
    "roomy": {"factor": 8.0},
    "tight": {"factor": 0.75},
    "least": {"factor": 0.25, "min_capacity": 5},
    "more than there are": {"factor": 1.0, "min_capacity": 100},
}


@needs_deepspeed
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("top_k", "case"),
    # Which of a full expert's tokens top-1 keeps is for the next test.
    [(k, case) for k in (1, 2) for case in CASES if k == 2 or case not in ("tight", "least")],
)
def test_deepspeed_and_native_agree(top_k, case, training):
    native, deepspeed = both(options(top_k, **CASES[case]))
    for each in (native, deepspeed):
        each.train(training)
    assert_same(run(native, tokens()), run(deepspeed, tokens()))


@needs_deepspeed
def test_a_full_expert_of_top_1_keeps_as_many_tokens_and_computes_those_kept_alike():
    native, deepspeed = both(options(1, factor=0.75))
    ours, theirs = run(native, tokens()), run(deepspeed, tokens())
    assert int(ours[1].dropped) > 0
    for name in ("load", "wanted", "dropped", "balance", "z"):
        torch.testing.assert_close(getattr(ours[1], name), getattr(theirs[1], name))
    kept = ours[0].any(dim=1) & theirs[0].any(dim=1)
    assert kept.sum() > 10
    torch.testing.assert_close(ours[0][kept], theirs[0][kept])


@needs_deepspeed
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_padding_changes_nothing(top_k, factor):
    x, padding = padded()
    alone = x[~padding]
    for mixture in both(options(top_k, factor=factor)):
        with_pads, without = run(mixture, x, padding), run(mixture, alone)
        torch.testing.assert_close(with_pads[0][~padding], without[0])
        assert not with_pads[0][padding].any()
        torch.testing.assert_close(with_pads[1].balance, without[1].balance)
        torch.testing.assert_close(with_pads[1].load, without[1].load)


@needs_deepspeed
def test_padding_that_reaches_the_gate_is_noticed(monkeypatch):
    x, padding = padded()
    native, deepspeed = both(options(2))
    right = run(native, x, padding)
    monkeypatch.setattr(
        type(deepspeed), "forward", lambda self, x, p: _as_it_is(self, x), raising=True
    )
    with pytest.raises(AssertionError):
        assert_same(right, run(deepspeed, x, padding))


def _as_it_is(self, x):
    out, report = self.mix(x.reshape(-1, DIM))
    return out.view_as(x), report


@needs_deepspeed
@pytest.mark.parametrize("kind", ["NativeMixture", "DeepSpeedMixture"])
def test_an_eval_capacity_drops_in_evaluation_only(kind):
    mixture = layer(kind, options(1, eval_capacity_factor=0.5))
    assert int(mixture.train()(tokens())[1].dropped) == 0
    room = math.ceil(TOKENS / EXPERTS * 0.5)
    report = mixture.eval()(tokens())[1]
    assert int(report.dropped) > 0
    assert int(report.load.max()) == room


NOISE = {
    "RSample": (1, {"rsample": True}),
    "Jitter": (1, {"jitter": 0.5}),
    "random tokens": (1, {"random_tokens": True, "factor": 0.5}),
    "second expert": (2, {"second_policy": "sampling"}),
}


@needs_deepspeed
@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("kind", ["NativeMixture", "DeepSpeedMixture"])
def test_noise_is_of_training_alone(name, kind):
    top_k, flags = NOISE[name]
    mixture = layer(kind, options(top_k, **flags))
    quiet = layer(kind, options(top_k)).eval()(tokens())[0]
    x = tokens()
    mixture.eval()
    assert torch.equal(mixture(x)[0], quiet)
    mixture.train()
    torch.manual_seed(11)
    first, second = mixture(x)[0], mixture(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(mixture(x)[0], first), "the seed decides"


@needs_deepspeed
def test_rsample_draws_each_expert_as_often_as_the_gate_says():
    x = tokens(1).expand(4000, DIM)
    shares = []
    for mixture in both(options(1, rsample=True)):
        torch.manual_seed(2)
        report = mixture.train()(x)[1]
        shares.append(report.load / 4000)
        torch.testing.assert_close(shares[-1], report.probability / 4000, atol=0.03, rtol=0)


@needs_deepspeed
def test_no_second_expert_is_drawn_nor_tokens_at_random_unless_asked_for():
    for top_k, factor in ((1, 0.5), (2, 0.5)):
        mixture = layer("DeepSpeedMixture", options(top_k, factor=factor)).train()
        assert torch.equal(mixture(tokens())[0], mixture(tokens())[0])


@needs_deepspeed
def test_the_gate_stays_in_float32_under_autocast():
    chosen = options(2)
    native, deepspeed = both(chosen)
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [mixture(x.bfloat16()) for mixture in (native, deepspeed)]
    torch.testing.assert_close(outputs[0][1].balance, outputs[1][1].balance)
    assert outputs[0][1].balance.dtype == torch.float32
    torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=2e-2, rtol=2e-2)


@needs_deepspeed
def test_deepspeeds_parts_are_no_parameters_and_draw_no_random_numbers():
    mixture = layer("DeepSpeedMixture", options(1))
    names = set(mixture.state_dict())
    torch.manual_seed(4)
    before = torch.get_rng_state()
    mixture(tokens())
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        set(mixture.state_dict()) == names == set(layer("NativeMixture", options(1)).state_dict())
    )
    assert not any("deepspeed" in type(m).__module__ for m in mixture.modules())


@needs_deepspeed
def test_it_is_deepspeed_that_computes(monkeypatch):
    sharded_moe = importlib.import_module("deepspeed.moe.sharded_moe")
    ran = []
    right = sharded_moe.MOELayer.forward
    monkeypatch.setattr(
        sharded_moe.MOELayer, "forward", lambda self, *a: ran.append(1) or right(self, *a)
    )
    layer("DeepSpeedMixture", options(1))(tokens())
    assert ran == [1]


@pytest.mark.parametrize(
    ("tokens_", "factor", "least", "room"),
    [(30, 1.2, 0, 9), (30, 1.0, 0, 8), (1, 1.0, 0, 1), (40, 1.0, 64, 64)],
)
def test_capacity(tokens_, factor, least, room):
    chosen = options(1, factor=factor, min_capacity=least)
    gate = part("gate").Gate(DIM, chosen.router)
    assert gate.capacity(tokens_) == room
    gate.options = dataclasses.replace(gate.options, top_k=2)
    assert gate.capacity(tokens_) == max(least, math.ceil(tokens_ / EXPERTS * factor * 2))
