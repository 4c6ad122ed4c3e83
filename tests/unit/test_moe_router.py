"""The router against a slow one, which goes from token to token and knows no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairseq_lite.errors import ConfigError
from fairseq_lite.moe.options import RouterOptions
from fairseq_lite.moe.router import Router, Routing

DIM = 6


@dataclass
class Plain:
    """What the slow router says."""

    experts: list[list[int]]
    weights: list[list[float]]
    kept: list[list[bool]]
    order: list[int]
    wanted: list[list[int]]
    load: list[int]
    dropped: list[int]
    tokens: int
    balance: float
    z: float
    entropy: float
    probability: list[float]


def plain_capacity(cfg: RouterOptions, training: bool, tokens: int) -> float:
    if not training and cfg.eval_capacity_fraction is None:
        return math.inf
    if not training and cfg.eval_capacity_fraction >= 0:
        return math.ceil(cfg.eval_capacity_fraction * tokens)
    if cfg.capacity_factor is None:
        return math.inf
    return int(cfg.capacity_factor * math.ceil(tokens / cfg.num_experts))


def plain_route(
    logits: list[list[float]],
    cfg: RouterOptions,
    training: bool,
    routed: list[bool],
    noise: list[list[float]] | None,
    luck: list[float] | None,
) -> Plain:
    tokens, count, choices = len(logits), cfg.num_experts, cfg.top_k
    probs, sums = [], []
    for row in logits:
        top = max(row)
        total = sum(math.exp(value - top) for value in row)
        probs.append([math.exp(value - top) / total for value in row])
        sums.append(top + math.log(total))
    experts, weights, willing = [], [], []
    for t in range(tokens):
        first = max(range(count), key=lambda e: probs[t][e])
        chosen = [first]
        if choices == 2:
            score = [a + (noise[t][e] if noise else 0.0) for e, a in enumerate(logits[t])]
            chosen.append(max((e for e in range(count) if e != first), key=lambda e: score[e]))
        gates = [probs[t][e] for e in chosen]
        if choices == 2 and cfg.normalize_before_dropping:
            gates = [g / sum(gates) for g in gates]
        queues = [routed[t]] * choices
        if luck is not None:
            queues[1] = queues[1] and luck[t] < 2 * gates[1]
        experts.append(chosen)
        weights.append(gates)
        willing.append(queues)
    capacity = plain_capacity(cfg, training, tokens)
    queue = list(range(tokens))
    if cfg.prioritized and capacity < math.inf:
        queue.sort(key=lambda t: -max(probs[t]))
    standing: list[list[int]] = [[] for _ in range(count)]
    for k in range(choices):
        for t in queue:
            if willing[t][k]:
                standing[experts[t][k]].append(t * choices + k)
    served = [line[: int(min(capacity, len(line)))] for line in standing]
    if capacity == math.inf:
        served = [sorted(line) for line in served]
    order = [choice for line in served for choice in line]
    kept = [[t * choices + k in order for k in range(choices)] for t in range(tokens)]
    for t in range(tokens):
        weights[t] = [g * k for g, k in zip(weights[t], kept[t], strict=True)]
        if choices == 2 and not cfg.normalize_before_dropping and sum(weights[t]) > 0:
            weights[t] = [g / sum(weights[t]) for g in weights[t]]
    wanted = [
        [sum(willing[t][k] and experts[t][k] == e for t in range(tokens)) for e in range(count)]
        for k in range(choices)
    ]
    real = [t for t in range(tokens) if routed[t]]
    size = max(tokens, 1)
    return Plain(
        experts=experts,
        weights=weights,
        kept=kept,
        order=order,
        wanted=wanted,
        load=[len(line) for line in served],
        dropped=[sum(wanted[k]) - sum(row[k] for row in kept) for k in range(choices)],
        tokens=len(real),
        balance=count
        * sum(sum(p[e] for p in probs) / size * (wanted[0][e] / size) for e in range(count)),
        z=sum(sums[t] ** 2 for t in real) / max(len(real), 1),
        entropy=-sum(p * math.log(p) for t in real for p in probs[t]),
        probability=[sum(probs[t][e] for t in real) for e in range(count)],
    )


def expected(router: Router, x: Tensor, routed: Tensor | None, seed: int) -> Plain:
    """What the slow router makes of the same logits and the same random numbers."""
    cfg = router.options
    torch.manual_seed(seed)
    logits = router.logits(x).detach()
    noise = luck = None
    if router.training and cfg.top_k == 2:
        if cfg.second_policy == "sampling":
            noise = (-torch.empty_like(logits).exponential_().log()).tolist()
        if cfg.second_policy == "random":
            luck = torch.rand(x.size(0)).tolist()
    real = [True] * x.size(0) if routed is None else routed.tolist()
    return plain_route(logits.tolist(), cfg, router.training, real, noise, luck)


def assert_same(got: Routing, want: Plain, cfg: RouterOptions) -> None:
    report = got.report
    choices, count = cfg.top_k, cfg.num_experts

    def close(a: Tensor, b: Any, shape: tuple[int, ...]) -> None:
        torch.testing.assert_close(
            a.detach().double(), torch.tensor(b).double().view(shape), rtol=1e-5, atol=1e-6
        )

    tokens = len(want.experts)
    assert got.experts.tolist() == want.experts
    assert got.weights.dtype == torch.float32
    close(got.weights, want.weights, (tokens, choices))
    kept = torch.ones_like(got.experts).bool() if got.kept is None else got.kept
    assert kept.tolist() == want.kept
    assert got.order.tolist() == want.order
    assert report.wanted.tolist() == want.wanted
    assert report.load.tolist() == want.load
    assert report.dropped.tolist() == want.dropped
    assert int(report.tokens) == want.tokens
    close(report.balance, want.balance, ())
    close(report.z, want.z, ())
    close(report.entropy, want.entropy, ())
    close(report.probability, want.probability, (count,))


def make(cfg: RouterOptions, seed: int = 0, training: bool = True) -> Router:
    torch.manual_seed(seed)
    router = Router(DIM, cfg).train(training)
    torch.nn.init.normal_(router.wg.weight, std=0.5)
    return router


def check(router: Router, x: Tensor, routed: Tensor | None = None, seed: int = 3) -> Routing:
    want = expected(router, x, routed, seed)
    torch.manual_seed(seed)
    got = router(x, routed)
    assert_same(got, want, router.options)
    return got


OPTIONS = st.builds(
    RouterOptions,
    num_experts=st.integers(2, 5),
    top_k=st.sampled_from([1, 2]),
    gate_fp32=st.booleans(),
    second_policy=st.sampled_from(["all", "sampling", "random"]),
    normalize_before_dropping=st.booleans(),
    capacity_factor=st.sampled_from([None, 0.5, 1.0, 1.25, 2.0]),
    eval_capacity_fraction=st.sampled_from([None, -1.0, 0.0, 0.25, 0.5, 1.0]),
    prioritized=st.booleans(),
    jitter=st.sampled_from([0.0, 0.1]),
)


@settings(max_examples=100, deadline=None)
@given(
    cfg=OPTIONS,
    tokens=st.integers(0, 13),
    training=st.booleans(),
    masked=st.sampled_from(["none", "some", "all"]),
    seed=st.integers(0, 1000),
)
def test_every_rule_is_that_of_the_slow_router(
    cfg: RouterOptions, tokens: int, training: bool, masked: str, seed: int
) -> None:
    router = make(cfg, seed, training)
    x = torch.randn(tokens, DIM)
    routed = None
    if masked != "none":
        routed = torch.rand(tokens) < (0.6 if masked == "some" else 0.0)
    check(router, x, routed, seed)


class ReversedQueue(Router):
    def _queue(self, probs: Tensor) -> Tensor:
        return torch.arange(probs.size(0)).flip(0)


class OneTooMany(Router):
    def capacity(self, tokens: int) -> int | None:
        found = super().capacity(tokens)
        return None if found is None else found + 1


class NoisyEvaluation(Router):
    def _choose(self, logits: Tensor, probs: Tensor) -> Tensor:
        training, self.training = self.training, True
        chosen = super()._choose(logits, probs)
        self.training = training
        return chosen


class SecondWithFirst(Router):
    """Second choices do not wait for all first ones."""

    def _serve(self, experts: Any, willing: Any, probs: Any, capacity: int | None) -> Any:
        line = experts.flatten()
        before = torch.stack([(line[:i] == e).sum() for i, e in enumerate(line)])
        kept = (before < capacity).view_as(experts)
        goal = experts.masked_fill(~kept, self.options.num_experts).flatten()
        return goal.argsort(stable=True)[: int(kept.sum())], kept


@pytest.mark.parametrize("wrong", [ReversedQueue, OneTooMany, NoisyEvaluation, SecondWithFirst])
def test_a_wrong_rule_is_noticed(wrong: type[Router]) -> None:
    cfg = RouterOptions(num_experts=3, capacity_factor=1.0, eval_capacity_fraction=-1.0)
    training = wrong is not NoisyEvaluation
    x = torch.randn(40, DIM, generator=torch.Generator().manual_seed(1))
    check(make(cfg, training=training), x)
    router = make(cfg, training=training)
    router.__class__ = wrong
    with pytest.raises(AssertionError):
        check(router, x)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [None, 1.0])
def test_equal_probabilities_go_to_the_lowest_numbers(top_k: int, factor: float | None) -> None:
    cfg = RouterOptions(4, top_k, second_policy="all", capacity_factor=factor)
    router = make(cfg)
    torch.nn.init.zeros_(router.wg.weight)
    got = check(router, torch.randn(10, DIM))
    assert got.experts.tolist() == [list(range(top_k))] * 10
    places = 10 if factor is None else 3  # int(1.0 * ceil(10 / 4))
    assert got.report.load.tolist() == [places] * top_k + [0] * (4 - top_k)


def test_all_tokens_may_go_to_one_expert_and_one_token_to_any() -> None:
    for training in (True, False):
        cfg = RouterOptions(4, 1, capacity_factor=1.0)
        router = make(cfg, training=training)
        with torch.no_grad():
            router.wg.weight[2] = 10.0
        got = check(router, torch.rand(9, DIM))
        assert got.report.load.tolist() == [0, 0, 3 if training else 9, 0]
        assert check(router, torch.rand(1, DIM)).report.load.tolist() == [0, 0, 1, 0]


def test_nothing_but_padding_goes_nowhere_and_has_gradients() -> None:
    for top_k in (1, 2):
        for factor in (None, 1.0):
            router = make(RouterOptions(4, top_k, capacity_factor=factor))
            got = check(router, torch.randn(5, DIM), torch.zeros(5, dtype=torch.bool))
            assert got.order.numel() == 0
            assert int(got.report.tokens) == 0
            (got.weights.sum() + got.report.balance + got.report.z).backward()
            assert torch.equal(router.wg.weight.grad, torch.zeros_like(router.wg.weight))


def test_no_tokens() -> None:
    for factor in (None, 1.0):
        router = make(RouterOptions(3, capacity_factor=factor))
        got = check(router, torch.randn(0, DIM))
        (got.weights.sum() + got.report.balance + got.report.z).backward()
        assert torch.equal(router.wg.weight.grad, torch.zeros_like(router.wg.weight))


def test_capacity_by_the_documented_formulas() -> None:
    cfg = RouterOptions(64, 2, capacity_factor=2.0)
    assert make(cfg).capacity(1024) == 32  # 2 * ceil(1024 / 64)
    assert make(cfg).capacity(1025) == 34
    assert make(replace(cfg, capacity_factor=1.25)).capacity(1025) == 21  # int(1.25 * 17)
    assert make(replace(cfg, capacity_factor=None)).capacity(1024) is None
    assert make(cfg, training=False).capacity(1024) is None
    # The worked example: 48 places for 1024 tokens are a share of 0.046875.
    share = replace(cfg, eval_capacity_fraction=0.046875)
    assert make(share, training=False).capacity(1024) == 48
    assert make(share).capacity(1024) == 32
    assert make(replace(cfg, eval_capacity_fraction=0.25), training=False).capacity(10) == 3
    assert make(replace(cfg, eval_capacity_fraction=-1.0), training=False).capacity(1024) == 32


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_of_weights_and_losses(top_k: int, factor: float | None, before: bool) -> None:
    cfg = RouterOptions(
        3, top_k, second_policy="all", capacity_factor=factor, normalize_before_dropping=before
    )
    router = make(cfg).double()
    x = torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    routed = torch.tensor([True] * 6 + [False])

    def run(x: Tensor) -> tuple[Tensor, ...]:
        got = router(x, routed)
        return got.weights, got.report.balance, got.report.z

    assert torch.autograd.gradcheck(run, (x,))


def test_the_gate_in_float32_is_that_of_float32_under_autocast() -> None:
    x = torch.randn(50, DIM).bfloat16()
    wide, narrow = (make(RouterOptions(4, 1, gate_fp32=fp32)) for fp32 in (True, False))
    exact = wide.wg(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, rough = wide.logits(x), narrow.logits(x)
    assert got.dtype == rough.dtype == torch.float32
    torch.testing.assert_close(got, exact)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
def test_evaluation_draws_nothing_and_each_token_decides_alone(policy: Any) -> None:
    cfg = RouterOptions(5, second_policy=policy, jitter=0.2, capacity_factor=0.5, prioritized=True)
    router = make(cfg, training=False)
    x = torch.randn(30, DIM)
    state = torch.get_rng_state()
    whole = router(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.kept is None
    for rows in (slice(0, 1), slice(7, 19), slice(29, 30)):
        part = router(x[rows])
        assert part.experts.tolist() == whole.experts[rows].tolist()
        torch.testing.assert_close(part.weights, whole.weights[rows])
    padded = router(
        torch.cat([torch.randn(4, DIM), x]), torch.tensor([False] * 4 + [True] * x.size(0))
    )
    assert padded.experts[4:].tolist() == whole.experts.tolist()
    torch.testing.assert_close(padded.weights[4:], whole.weights)
    assert padded.report.load.tolist() == whole.report.load.tolist()
    torch.testing.assert_close(padded.report.entropy, whole.report.entropy)
    torch.testing.assert_close(padded.report.probability, whole.report.probability)


def test_a_second_expert_is_sampled_by_its_probability_among_the_rest() -> None:
    router = make(RouterOptions(4, second_policy="sampling"))
    x = torch.randn(1, DIM).expand(20_000, -1)
    got = router(x)
    first = int(got.experts[0, 0])
    probs = router.logits(x[:1])[0].softmax(0).detach()
    rest = probs / (1 - probs[first])
    for e in range(4):
        share = float((got.experts[:, 1] == e).float().mean())
        assert share == pytest.approx(0.0 if e == first else float(rest[e]), abs=0.02)


def test_a_second_expert_is_taken_at_random_with_twice_its_probability() -> None:
    cfg = RouterOptions(8, second_policy="random", normalize_before_dropping=True)
    router = make(cfg)
    with torch.no_grad():
        router.wg.weight.mul_(0.5)
    x = torch.randn(1, DIM).expand(20_000, -1)
    got = router(x)
    assert got.kept is not None
    assert bool(got.kept[:, 0].all())
    top = router.logits(x[:1])[0].softmax(0).topk(2).values.detach()
    second = float(top[1] / top.sum())
    assert float(got.kept[:, 1].float().mean()) == pytest.approx(min(1.0, 2 * second), abs=0.02)


def test_jitter_multiplies_what_the_gate_reads_in_training() -> None:
    router = make(RouterOptions(3, jitter=0.1, gate_fp32=True))
    with torch.no_grad():
        router.wg.weight.zero_()
        router.wg.weight[:, 0] = 1.0
    x = torch.ones(1000, DIM, dtype=torch.bfloat16)
    seen = router.logits(x)[:, 0].detach()
    assert 0.9 <= float(seen.min()) < 0.91
    assert 1.09 < float(seen.max()) <= 1.1
    assert seen.unique().numel() > 900  # not the few numbers that bfloat16 has there
    assert torch.equal(router.eval().logits(x), torch.ones(1000, 3))


def test_the_balance_loss_is_one_when_balanced() -> None:
    router = make(RouterOptions(4, 1))
    with torch.no_grad():
        router.wg.weight.zero_()
        router.wg.weight[:4, :4] = 30 * torch.eye(4)
    got = router(torch.eye(DIM)[:4].repeat(5, 1))
    assert float(got.report.balance.detach()) == pytest.approx(1.0)
    assert float(router(torch.eye(DIM)[:1].repeat(5, 1)).report.balance.detach()) == pytest.approx(
        4.0
    )


def test_two_experts_of_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="--moe-top1-expert"):
        Router(DIM, RouterOptions(1, 2))
