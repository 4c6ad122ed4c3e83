"""Optimizers against the formulas they state, in float64, and against fairseq's state."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lite.config.core import OptimizationConfig
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.optim import adam as adam_module
from fairseq_lite.optim.adafactor import Adafactor, AdafactorConfig
from fairseq_lite.optim.adam import Adam, AdamConfig
from fairseq_lite.optim.api import OPTIMIZERS
from fairseq_lite.optim.lamb import Lamb, LambConfig
from fairseq_lite.optim.optimizers import (
    SGD,
    Adadelta,
    AdadeltaConfig,
    Adagrad,
    AdagradConfig,
    Adamax,
    AdamaxConfig,
    Nag,
    NagConfig,
    SGDConfig,
)
from tests.helpers.shared import shared_dir

SHAPES = ((6, 5), (7,))
CONFIG = AdamConfig(adam_betas=(0.9, 0.98), adam_eps=1e-6, weight_decay=0.1)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(steps: int, scale: float = 1.0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(s, generator=generator) * scale for s in SHAPES] for _ in range(steps)]


def run(optimizer, params, grads, lrs=None):
    for i, step in enumerate(grads):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone().to(p.dtype)
        if lrs is not None:
            optimizer.set_lr(lrs[i])
        optimizer.step()
    return params


def adam_reference(grads, lrs, cfg, *, corrected_eps=False):
    """Fairseq's formula in float64; `corrected_eps` plants torch's epsilon."""
    b1, b2 = cfg.adam_betas
    params = [p.detach().double().numpy() for p in parameters()]
    m = [np.zeros_like(p) for p in params]
    v = [np.zeros_like(p) for p in params]
    for t, (step, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        for i, g in enumerate(step):
            g = g.double().numpy()
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            c1, c2 = 1 - b1**t, 1 - b2**t
            eps = cfg.adam_eps * (math.sqrt(c2) if corrected_eps else 1)
            params[i] = params[i] - cfg.weight_decay * lr * params[i]
            params[i] = params[i] - lr * math.sqrt(c2) / c1 * m[i] / (np.sqrt(v[i]) + eps)
    return params


def distance(params, expected) -> float:
    return max(
        float(np.abs(p.detach().double().numpy() - e).max())
        for p, e in zip(params, expected, strict=True)
    )


PATHS = ("fused", "foreach")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "foreach":
        monkeypatch.setattr(adam_module, "_has_fused", lambda *_: False)
    return request.param


# Gradients near eps: there the place of eps decides the step.
TINY = 1e-6
LRS = [1e-2 * (i + 1) for i in range(6)]


def test_adam_is_fairseqs_formula(path):
    grads = gradients(6, TINY)
    params = parameters()
    run(Adam(params, CONFIG, lr=1e-2), params, grads, LRS)
    assert distance(params, adam_reference(grads, LRS, CONFIG)) < 2e-6


def test_the_planted_bug_fails(path):
    """The parity test above would catch an epsilon that is bias-corrected, as torch's is."""
    grads = gradients(6, TINY)
    params = parameters()
    run(Adam(params, CONFIG, lr=1e-2), params, grads, LRS)
    wrong = adam_reference(grads, LRS, CONFIG, corrected_eps=True)
    assert distance(params, wrong) > 1e-2
    torch_params = parameters()
    theirs = torch.optim.AdamW(torch_params, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for step, lr in zip(grads, LRS, strict=True):
        for p, g in zip(torch_params, step, strict=True):
            p.grad = g.clone()
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
    assert distance(torch_params, wrong) < 2e-6  # so the planted bug is torch's formula


@settings(max_examples=25, deadline=None)
@given(
    b1=st.floats(0, 0.99),
    b2=st.floats(0.5, 0.9999),
    eps=st.sampled_from([1e-8, 1e-6, 1e-3]),
    decay=st.floats(0, 0.5),
    scale=st.sampled_from([1e-7, 1e-3, 1.0, 1e3]),
)
def test_fused_and_foreach_agree(b1, b2, eps, decay, scale):
    cfg = AdamConfig(adam_betas=(b1, b2), adam_eps=eps, weight_decay=decay)
    grads = gradients(4, scale)
    fused, plain = parameters(), parameters()
    run(Adam(fused, cfg, lr=1e-2), fused, grads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adam_module, "_has_fused", lambda *_: False)
        run(Adam(plain, cfg, lr=1e-2), plain, grads)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_a_parameter_without_gradient_waits(path):
    params = parameters()
    optimizer = Adam(params, CONFIG, lr=1e-2)
    before = params[1].detach().clone()
    params[0].grad = torch.ones(SHAPES[0])
    optimizer.step()
    assert torch.equal(params[1], before)
    run(optimizer, params, gradients(1))
    assert [optimizer.state[p]["step"] for p in params] == [2, 1]
    # Their counts differ, so do their bias corrections: the late one moves as at its first update.
    late = [torch.nn.Parameter(before.clone())]
    alone = Adam(late, CONFIG, lr=1e-2)
    late[0].grad = gradients(1)[0][1].clone()
    alone.step()
    torch.testing.assert_close(late[0], params[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scale_and_clip_is_scale_then_clip(path, as_tensor):
    grads = gradients(1)[0]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    scale, most = 0.25, 0.3
    a, b = parameters(), parameters()
    one, two = Adam(a, CONFIG, lr=1.0), Adam(b, CONFIG, lr=1.0)
    for params in (a, b):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
    logged = one.scale_and_clip(torch.tensor(norm) if as_tensor else norm, scale, most)
    assert float(logged) == pytest.approx(norm * scale)
    one.step()
    factor = scale * most / (norm * scale + 1e-6)
    for p, g in zip(b, grads, strict=True):
        p.grad = g * factor
    two.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.state[x]["exp_avg"], two.state[y]["exp_avg"])


def test_scale_gradients_is_immediate_and_clip_is_forgotten_with_the_update():
    params = parameters()
    optimizer = SGD(params, SGDConfig(), lr=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.scale_gradients(0.5)
    assert all(bool((p.grad == 0.5).all()) for p in params)
    optimizer.clip(float("nan"), 1.0)
    optimizer.zero_grad()  # the update is skipped
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b - 1)


@pytest.mark.parametrize("norm", [0.5, torch.tensor(0.5)])
def test_a_short_gradient_is_not_clipped(norm):
    params = parameters()
    optimizer = SGD(params, SGDConfig(), lr=1.0)
    before = params[0].detach().clone()
    params[0].grad = torch.full_like(params[0], 0.01)
    optimizer.clip(norm, 1.0)
    optimizer.step()
    assert torch.equal(params[0].detach(), before - 0.01)


# -- the state ------------------------------------------------------------------------------------


def test_adam_state_has_fairseqs_layout():
    params = parameters()
    optimizer = Adam(params, CONFIG, lr=1e-2)
    run(optimizer, params, gradients(3))
    state = optimizer.state_dict()
    assert list(state) == ["state", "param_groups"]
    assert list(state["state"][0]) == ["step", "exp_avg", "exp_avg_sq"]
    assert state["state"][1]["step"] == 3
    assert isinstance(state["state"][1]["step"], int)
    assert state["param_groups"] == [
        {
            "lr": 1e-2,
            "betas": (0.9, 0.98),
            "eps": 1e-6,
            "weight_decay": 0.1,
            "amsgrad": False,
            "params": [0, 1],
        }
    ]


BUILD = {
    "adam": lambda p: Adam(p, CONFIG, lr=0.01),
    "adam fp16": lambda p: Adam(p, AdamConfig(fp16_adam_stats=True), lr=0.01),
    "sgd": lambda p: SGD(p, SGDConfig(momentum=0.9, weight_decay=0.1), lr=0.01),
    "nag": lambda p: Nag(p, NagConfig(weight_decay=0.1), lr=0.01),
    "adagrad": lambda p: Adagrad(p, AdagradConfig(weight_decay=0.1), lr=0.01),
    "adadelta": lambda p: Adadelta(p, AdadeltaConfig(weight_decay=0.1), lr=0.01),
    "adamax": lambda p: Adamax(p, AdamaxConfig(weight_decay=0.1), lr=0.01),
    "adafactor": lambda p: Adafactor(
        p, AdafactorConfig(beta1=0.9, scale_parameter=True, weight_decay=0.1), lr=0.01
    ),
    "adafactor relative": lambda p: Adafactor(
        p, AdafactorConfig(relative_step=True, warmup_init=True), lr=0.01
    ),
    "lamb": lambda p: Lamb(p, LambConfig(weight_decay=0.1), lr=0.01),
}


@pytest.mark.parametrize("name", BUILD)
def test_resuming_is_bit_exact(name):
    grads, lrs = gradients(6), [0.01, 0.02, 0.03, 0.02, 0.01, 0.01]
    through = parameters()
    run(BUILD[name](through), through, grads, lrs)

    first = parameters()
    optimizer = BUILD[name](first)
    run(optimizer, first, grads[:3], lrs[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = BUILD[name](second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, second, grads[3:], lrs[3:])
    for a, b in zip(through, second, strict=True):
        assert torch.equal(a, b)


def test_loading_copies():
    params = parameters()
    optimizer = Adam(params, CONFIG, lr=1e-2)
    run(optimizer, params, gradients(1))
    state = optimizer.state_dict()
    kept = state["state"][0]["exp_avg"].clone()
    other = parameters()
    loaded = Adam(other, CONFIG, lr=1e-2)
    loaded.load_state_dict(state)
    run(loaded, other, gradients(1))
    assert torch.equal(state["state"][0]["exp_avg"], kept)


def test_flags_win_over_the_checkpoint_and_overrides_over_both():
    params = parameters()
    optimizer = Adam(params, CONFIG, lr=1e-2)
    run(optimizer, params, gradients(1))
    state = optimizer.state_dict()
    other = Adam(parameters(), AdamConfig(weight_decay=0.5), lr=0.7)
    other.load_state_dict(state)
    assert other.get_lr() == 1e-2
    assert other.hyper["weight_decay"] == 0.5
    other.load_state_dict(state, {"betas": [0.8, 0.9], "lr": 0.3})
    assert other.hyper["betas"] == (0.8, 0.9)
    assert other.get_lr() == 0.3
    with pytest.raises(ConfigError, match="--optimizer-overrides 'beta'"):
        other.load_state_dict(state, {"beta": 1})


def test_a_state_of_other_parameters_is_refused():
    params = parameters()
    optimizer = Adam(params, CONFIG, lr=1e-2)
    run(optimizer, params, gradients(1))
    state = optimizer.state_dict()
    three = [*parameters(), torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(CheckpointError, match="2 parameters, the model has 3.*--reset-optimizer"):
        Adam(three, CONFIG, lr=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"\(6, 5\), its parameter \(7,\)"):
        Adam(parameters()[::-1], CONFIG, lr=1).load_state_dict(state)


def test_fairseqs_flat_fp16_state_is_cut_up():
    params = parameters()
    optimizer = Adam(params, CONFIG, lr=1e-2)
    run(optimizer, params, gradients(2))
    state = optimizer.state_dict()
    flat = {
        key: torch.cat([state["state"][i][key].flatten() for i in (0, 1)])
        for key in ("exp_avg", "exp_avg_sq")
    }
    group = {**state["param_groups"][0], "params": [0]}
    other_params = parameters()
    other = Adam(other_params, CONFIG, lr=1)
    other.load_state_dict(
        {"state": {0: {"step": 2, **flat}}, "param_groups": [group], "loss_scale": 4.0}
    )
    for mine, theirs in zip(params, other_params, strict=True):
        assert other.state[theirs]["step"] == 2
        assert torch.equal(optimizer.state[mine]["exp_avg"], other.state[theirs]["exp_avg"])
    short = {"step": 2, "exp_avg": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="3 values, the model 37"):
        other.load_state_dict({"state": {0: short}, "param_groups": [group]})


def test_a_torch_state_with_tensor_steps_loads():
    params = parameters()
    theirs = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    theirs.step()
    mine = Adam(parameters(), CONFIG, lr=1)
    mine.load_state_dict(theirs.state_dict())
    assert [s["step"] for s in mine.state.values()] == [1, 1]


def test_our_state_loads_into_torchs_optimizer():
    params = parameters()
    optimizer = Adam(params, CONFIG, lr=1e-2)
    run(optimizer, params, gradients(1))
    theirs = torch.optim.AdamW(parameters())
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.param_groups[0]["betas"] == (0.9, 0.98)


def test_a_real_fairseq_state_loads():
    import argparse

    path = shared_dir("reference", "mt", "trained.pt")
    # weights_only, with the few plain classes real files hold.
    allowed = [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        np._core.multiarray._reconstruct,
        np._core.multiarray.scalar,
        *(type(np.dtype(t)) for t in ("int64", "float64", "int32")),
    ]
    with torch.serialization.safe_globals(allowed):
        state = torch.load(path, weights_only=True, map_location="cpu")["last_optimizer_state"]
    params = [
        torch.nn.Parameter(torch.zeros(state["state"][i]["exp_avg"].shape))
        for i in state["param_groups"][0]["params"]
    ]
    optimizer = Adam(params, AdamConfig(adam_betas=(0.9, 0.98), weight_decay=1e-4), lr=1)
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    assert again["param_groups"] == state["param_groups"]
    assert list(again["state"]) == list(state["state"])
    for i, entry in state["state"].items():
        assert list(again["state"][i]) == list(entry)
        assert again["state"][i]["step"] == entry["step"] == 1250
        assert torch.equal(again["state"][i]["exp_avg_sq"], entry["exp_avg_sq"])


# -- 16 bits --------------------------------------------------------------------------------------


def test_half_state_follows_the_full_one():
    grads = gradients(20)
    full, half = parameters(), parameters()
    run(Adam(full, AdamConfig(), lr=1e-2), full, grads)
    optimizer = Adam(half, AdamConfig(fp16_adam_stats=True), lr=1e-2)
    run(optimizer, half, grads)
    assert optimizer.state[half[0]]["exp_avg_sq"].dtype == torch.float16
    for a, b in zip(full, half, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_bfloat16_parameters_keep_float32_state():
    params = parameters(torch.bfloat16)
    optimizer = Adam(params, AdamConfig(), lr=1e-2)
    run(optimizer, params, gradients(3))
    assert params[0].dtype == torch.bfloat16
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    wide = parameters()
    run(Adam(wide, AdamConfig(), lr=1e-2), wide, gradients(3))
    torch.testing.assert_close(params[0].float(), wide[0].detach(), rtol=0.02, atol=0.02)


# -- the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1)),
        (
            "adadelta",
            lambda p: torch.optim.Adadelta(p, lr=0.01, weight_decay=0.1),
        ),
    ],
)
def test_those_that_fairseq_takes_from_torch(name, theirs):
    mine_params, their_params = parameters(), parameters()
    run(BUILD[name](mine_params), mine_params, gradients(5))
    other = theirs(their_params)
    for step in gradients(5):
        for p, g in zip(their_params, step, strict=True):
            p.grad = g.clone()
        other.step()
    for a, b in zip(mine_params, their_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def reference(update, steps=5, lrs=None):
    """Run `update(i, p, g, state, lr, t)` -> new p, in float64, over the usual gradients."""
    params = [p.detach().double() for p in parameters()]
    states = [{} for _ in params]
    for t, step in enumerate(gradients(steps), start=1):
        lr = 0.01 if lrs is None else lrs[t - 1]
        params = [
            update(p, g.double(), s, lr, t) for p, g, s in zip(params, step, states, strict=True)
        ]
    return [p.numpy() for p in params]


def test_nag():
    lrs = [0.0, 0.01, 0.02, 0.01, 0.01]

    def update(p, g, state, lr, t):
        buffer = state.get("buffer", torch.zeros_like(p))
        old = state.get("lr", 0.01)
        c = lr / old if old else 1.0
        p = p * (1 - lr * 0.1) + 0.99**2 * c * buffer - 1.99 * lr * g
        state.update(buffer=0.99 * c * buffer - lr * g, lr=lr)
        return p

    params = parameters()
    run(BUILD["nag"](params), params, gradients(5), lrs)
    assert distance(params, reference(update, lrs=lrs)) < 1e-6


def test_adamax():
    def update(p, g, state, lr, t):
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
        state["u"] = torch.maximum(0.999 * state.get("u", torch.zeros_like(g)), g.abs())
        return p * (1 - lr * 0.1) - lr / (1 - 0.9**t) * state["m"] / (state["u"] + 1e-8)

    params = parameters()
    run(BUILD["adamax"](params), params, gradients(5))
    assert distance(params, reference(update)) < 1e-6


@pytest.mark.parametrize("relative", [False, True])
def test_adafactor(relative):
    cfg = AdafactorConfig(beta1=0.9, weight_decay=0.1, scale_parameter=True, relative_step=relative)

    def rms(x):
        return float(x.square().mean().sqrt())

    def update(p, g, state, lr, t):
        d = 1 - t**-0.8
        square = g * g + 1e-30
        if p.dim() == 2:
            state["r"] = d * state.get("r", 0) + (1 - d) * square.mean(1)
            state["c"] = d * state.get("c", 0) + (1 - d) * square.mean(0)
            v = torch.outer(state["r"], state["c"]) / state["r"].mean()
        else:
            v = state["v"] = d * state.get("v", 0) + (1 - d) * square
        u = g / v.sqrt()
        u = u / max(1.0, rms(u))
        rate = (min(0.01, t**-0.5) if relative else lr) * max(1e-3, rms(p))
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * rate * u
        return p - rate * 0.1 * p - state["m"]

    params = parameters()
    run(Adafactor(params, cfg, lr=0.01), params, gradients(5), [0.01] * 5)
    assert distance(params, reference(update)) < 1e-6


def test_adafactor_keeps_rows_and_columns_only():
    params = parameters()
    optimizer = Adafactor(params, AdafactorConfig(), lr=0.01)
    run(optimizer, params, gradients(1))
    assert {k: tuple(getattr(v, "shape", ())) for k, v in optimizer.state[params[0]].items()} == {
        "step": (),
        "exp_avg_sq_row": (6,),
        "exp_avg_sq_col": (5,),
        "RMS": (),
    }


def test_adafactor_relative_step_ignores_the_schedule():
    optimizer = Adafactor(parameters(), AdafactorConfig(relative_step=True), lr=5.0)
    optimizer.set_lr(3.0)
    assert optimizer.get_lr() == 0.01


def test_lamb():
    lr, eps = 0.01, 1e-8
    params = parameters()
    run(BUILD["lamb"](params), params, gradients(4))
    expected = [p.detach().double() for p in parameters()]
    m, v = [0, 0], [0, 0]
    for t, step in enumerate(gradients(4), start=1):
        grads = [g.double() for g in step]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        for i, g in enumerate(grads):
            g = g / max(1.0, norm)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            u = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + eps) + 0.1 * expected[i]
            expected[i] = expected[i] - lr * float(expected[i].norm() / u.norm()) * u
    assert distance(params, [e.numpy() for e in expected]) < 2e-6


def test_what_is_not_here_says_so():
    with pytest.raises(ConfigError, match="--optimizer composite"):
        OPTIMIZERS.get("composite").factory(parameters(), None, lr=1.0)


def test_cpu_adam_is_adam_in_host_memory():
    build = OPTIMIZERS.get("cpu_adam").factory
    one, other = parameters(), parameters()
    run(build(one, AdamConfig(weight_decay=0.1), lr=0.01), one, gradients(3))
    run(Adam(other, AdamConfig(weight_decay=0.1), lr=0.01), other, gradients(3))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    elsewhere = [torch.nn.Parameter(torch.empty(2, device="meta"))]
    with pytest.raises(ConfigError, match="in host memory: add --ddp-backend fully_sharded --cpu"):
        build(elsewhere, AdamConfig(), lr=1.0)


class Spread(torch.nn.Parameter):
    """As a parameter that two ranks hold in parts looks to an optimizer."""

    device_mesh = SimpleNamespace(size=lambda: 2)

    def to_local(self):
        return self.data[:1]


@pytest.mark.parametrize("name", ["adafactor", "lamb"])
def test_rules_for_whole_parameters_refuse_parts(name):
    entry = OPTIMIZERS.get(name)
    with pytest.raises(ConfigError, match="looks at whole parameters"):
        entry.factory([Spread(torch.ones(2, 2))], entry.config(), lr=1.0)


def test_class_names_are_fairseqs():
    names = {n: OPTIMIZERS.get(n).factory for n in OPTIMIZERS.names()}
    assert {n: f.fairseq_name for n, f in names.items() if hasattr(f, "fairseq_name")} == {
        "adadelta": "Adadelta",
        "adafactor": "FairseqAdafactor",
        "adagrad": "Adagrad",
        "adam": "FairseqAdam",
        "adamax": "FairseqAdamax",
        "cpu_adam": "FairseqCPUAdam",
        "lamb": "FairseqLAMB",
        "nag": "FairseqNAG",
        "sgd": "SGD",
    }


def test_bad_values_are_named():
    with pytest.raises(ConfigError, match=r"--adam-betas 0.9: .*0.9,0.98"):
        AdamConfig(adam_betas=(0.9,))
    with pytest.raises(ConfigError, match="--adam-betas 0.9,1"):
        AdamConfig(adam_betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="--warmup-init needs --relative-step"):
        AdafactorConfig(warmup_init=True)
    with pytest.raises(ConfigError, match="no parameter"):
        Adam([torch.zeros(2)], AdamConfig(), lr=1)


def test_an_optimizer_does_not_start_torchs_compiler():
    """torch.optim.Optimizer would, and cost a second or more at every start."""
    code = (
        "import sys, torch\n"
        "from fairseq_lite.optim.optimizers import Adam\n"
        "from fairseq_lite.optim.adam import AdamConfig\n"
        "p = [torch.nn.Parameter(torch.ones(2))]; p[0].grad = torch.ones(2)\n"
        "o = Adam(p, AdamConfig(), lr=1.0); o.step(); o.zero_grad()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_optimization_config_default_lr_is_fairseqs():
    assert OptimizationConfig().lr == (0.25,)
