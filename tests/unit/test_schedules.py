"""Schedules: their formulas at hand-computed points, their shape everywhere, fairseq's logs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.config.core import OptimizationConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.optim import schedules as s
from fairseq_lite.optim.api import SCHEDULES
from fairseq_lite.optim.optimizers import SGD, SGDConfig
from tests.helpers.shared import shared_dir


def build(name, *, lr=(0.1,), max_update=0, maximize=False, **fields):
    entry = SCHEDULES.get(name)
    optimization = OptimizationConfig(lr=lr, max_update=max_update)
    return entry.factory(entry.config(**fields), optimization, maximize=maximize)


def rates(schedule, updates, epoch=1):
    return [schedule.lr(u, epoch) for u in updates]


@pytest.mark.parametrize(
    ("log", "name", "settings"),
    [
        ("mt/logs/uf1.jsonl", "inverse_sqrt", {"warmup_updates": 100}),
        (
            "lm/logs/none.jsonl",
            "polynomial_decay",
            {"warmup_updates": 5, "total_num_update": 40.0},
        ),
    ],
)
def test_fairseqs_logged_rates(log, name, settings):
    schedule = build(name, lr=(1e-3,), **settings)
    lines = shared_dir("reference", *log.split("/")).read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if "num_updates" in r]
    assert len(records) == 20
    for record in records:
        assert f"{schedule.lr(int(record['num_updates']), 1):g}" == record["lr"]


def test_fixed():
    assert rates(build("fixed"), [0, 1, 1000]) == [0.1] * 3
    assert rates(build("fixed", warmup_updates=4), range(6)) == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    )
    by_epoch = build("fixed", lr=(1e-3, 5e-4), force_anneal=4, lr_shrink=0.5)
    assert [by_epoch.lr(0, e) for e in range(1, 7)] == pytest.approx(
        [1e-3, 5e-4, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5]
    )


def test_inverse_sqrt():
    schedule = build("inverse_sqrt", warmup_updates=100)
    assert rates(schedule, [0, 1, 50, 99, 100, 400, 10_000]) == pytest.approx(
        [0, 1e-3, 0.05, 0.099, 0.1, 0.05, 0.01]
    )
    started = build("inverse_sqrt", warmup_updates=10, warmup_init_lr=0.05)
    assert rates(started, [0, 5, 10]) == pytest.approx([0.05, 0.075, 0.1])
    assert s.InverseSqrtConfig().warmup_updates == 4000
    assert rates(build("inverse_sqrt", warmup_updates=0), [0, 1, 4]) == pytest.approx(
        [0.1, 0.1, 0.05]
    )


def test_polynomial_decay():
    schedule = build(
        "polynomial_decay",
        warmup_updates=10,
        total_num_update=110.0,
        end_learning_rate=0.02,
        power=2.0,
    )
    assert rates(schedule, [0, 5, 10, 60, 110, 999]) == pytest.approx(
        [0, 0.05, 0.1, 0.02 + 0.08 * 0.25, 0.02, 0.02]
    )
    assert build("polynomial_decay", max_update=200).lr(100, 1) == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="--total-num-update"):
        build("polynomial_decay")


def test_polynomial_decay_annealed_by_epoch():
    schedule = build("polynomial_decay", total_num_update=100.0, force_anneal=2)
    schedule.begin_epoch(1, 0.1)
    assert schedule.lr(50, 1) == pytest.approx(0.05)
    schedule.begin_epoch(2, 0.05)
    assert schedule.lr(50, 2) == pytest.approx(0.025)
    resumed = build("polynomial_decay", total_num_update=100.0, force_anneal=2)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.lr(70, 2) == schedule.lr(70, 2)


def test_cosine():
    schedule = build(
        "cosine", warmup_updates=10, lr_period_updates=100.0, min_lr=0.02, lr_shrink=0.5
    )
    assert rates(schedule, [0, 5, 10, 60, 110, 160]) == pytest.approx(
        [0.02, 0.06, 0.1, 0.06, 0.05, 0.03]
    )
    longer = build("cosine", lr_period_updates=100.0, t_mult=2.0, lr_shrink=1.0)
    assert rates(longer, [0, 50, 100, 200, 300]) == pytest.approx([0.1, 0.05, 0.1, 0.05, 0.1])
    assert build("cosine", max_update=100).lr(100, 1) == pytest.approx(0.01)  # the next period
    with pytest.raises(ConfigError, match="--max-update"):
        build("cosine")
    with pytest.raises(ConfigError, match=r"--lr 0.1: expected more than --min-lr 0.2"):
        build("cosine", max_update=10, min_lr=0.2)


def test_tri_stage():
    schedule = build("tri_stage", warmup_steps=10, hold_steps=20, decay_steps=30)
    assert rates(schedule, [0, 5, 10, 29, 30, 45, 60, 61]) == pytest.approx(
        [0.001, 0.0505, 0.1, 0.1, 0.1, 0.01, 0.001, 0.001]
    )
    shares = build("tri_stage", phase_ratio=(0.1, 0.4, 0.5), max_update=100)
    assert (shares.warmup, shares.hold, shares.decay) == (10, 40, 50)
    with pytest.raises(ConfigError, match="--phase-ratio needs --max-update"):
        build("tri_stage", phase_ratio=(0.1, 0.4, 0.5))
    with pytest.raises(ConfigError, match="sum to 1"):
        build("tri_stage", phase_ratio=(0.1, 0.4), max_update=10)
    with pytest.raises(ConfigError, match="--warmup-steps"):
        build("tri_stage")


def test_triangular():
    schedule = build("triangular", max_lr=0.5, lr_period_updates=20.0, lr_shrink=0.5)
    assert rates(schedule, [0, 5, 10, 15, 20, 30]) == pytest.approx([0.1, 0.3, 0.5, 0.3, 0.1, 0.25])
    shrinking = build(
        "triangular", max_lr=0.5, lr_period_updates=20.0, lr_shrink=0.5, shrink_min=True
    )
    assert shrinking.lr(20, 1) == pytest.approx(0.05)
    with pytest.raises(ConfigError, match=r"--max-lr X above --lr 0\.1"):
        build("triangular")


def test_step():
    schedule = build("step", warmup_updates=10, lr_decay_period=100, lr_decay=0.5, min_lr=0.03)
    assert rates(schedule, [0, 5, 10, 109, 110, 210, 999]) == pytest.approx(
        [0.03, 0.065, 0.1, 0.1, 0.05, 0.03, 0.03]
    )
    with pytest.raises(ConfigError, match="--lr-decay "):
        s.StepConfig(lr_decay=2.0)


def test_manual():
    schedule = build(
        "manual", epoch2lr={"2-3": 0.02, "5": 0.01}, update2lr={"100,200": 0.5, "300": 0.25}
    )
    assert [schedule.lr(0, e) for e in (1, 2, 3, 4, 5, 9)] == [0.1, 0.02, 0.02, 0.02, 0.01, 0.01]
    assert rates(schedule, [99, 100, 250, 300]) == [0.1, 0.5, 0.5, 0.25]
    with pytest.raises(ConfigError, match="--epoch2lr: 'x': 1 is not understood"):
        build("manual", epoch2lr={"x": 1})


def test_reduce_on_plateau():
    schedule = build("reduce_lr_on_plateau", lr_patience=1, lr_shrink=0.5, lr_threshold=0.01)
    seen = []
    for value in (5.0, 4.0, 3.99, 4.1, 3.0, 3.0, 3.0, 3.0, 3.0):
        schedule.observe(value, 10)
        seen.append(schedule.lr(10, 1))
    assert seen == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025, 0.0125])
    schedule.observe(None, 10)
    state = schedule.state_dict()
    assert state["best"] == 3.0
    other = build("reduce_lr_on_plateau", lr_patience=1, lr_shrink=0.5, lr_threshold=0.01)
    other.load_state_dict(state)
    assert other.lr(10, 1) == schedule.lr(10, 1)


@given(
    values=st.lists(st.floats(0.1, 100), max_size=30),
    patience=st.integers(0, 3),
    maximize=st.booleans(),
)
def test_reduce_on_plateau_is_torchs(values, patience, maximize):
    mine = build(
        "reduce_lr_on_plateau", lr=(1.0,), lr_patience=patience, lr_shrink=0.9, maximize=maximize
    )
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        inner, mode="max" if maximize else "min", patience=patience, factor=0.9, threshold=1e-4
    )
    for value in values:
        mine.observe(value, 1)
        theirs.step(value)
        assert mine.lr(1, 1) == pytest.approx(inner.param_groups[0]["lr"])


def test_reduce_on_plateau_waits_for_the_warm_up():
    schedule = build("reduce_lr_on_plateau", warmup_updates=10)
    assert rates(schedule, [0, 5, 10, 11]) == pytest.approx([0, 0.05, 0.1, 0.1])
    for _ in range(3):
        schedule.observe(1.0, 10)
    assert schedule.lr(11, 1) == pytest.approx(0.1)


# -- what holds for all ---------------------------------------------------------------------------

EVERY = {
    "fixed": {"warmup_updates": 50},
    "inverse_sqrt": {"warmup_updates": 50},
    "polynomial_decay": {"warmup_updates": 50, "total_num_update": 1000.0},
    "cosine": {"warmup_updates": 50, "lr_period_updates": 300.0, "t_mult": 1.5, "min_lr": 1e-6},
    "tri_stage": {"warmup_steps": 50, "hold_steps": 100, "decay_steps": 500},
    "step": {"warmup_updates": 50, "lr_decay_period": 100},
    "reduce_lr_on_plateau": {"warmup_updates": 50},
}


@given(name=st.sampled_from(sorted(EVERY)), u=st.integers(0, 5000), peak=st.floats(1e-5, 1.0))
def test_rates_lie_between_zero_and_the_peak(name, u, peak):
    schedule = build(name, lr=(peak,), **EVERY[name])
    assert 0 <= schedule.lr(u, 1) <= peak * (1 + 1e-9)
    assert schedule.lr(50, 1) == pytest.approx(peak)  # all reach it at the end of the warm-up


@given(name=st.sampled_from(sorted(EVERY)), u=st.integers(0, 49))
def test_warm_ups_rise(name, u):
    schedule = build(name, **EVERY[name])
    assert schedule.lr(u, 1) <= schedule.lr(u + 1, 1)


@given(u=st.integers(50, 3000), name=st.sampled_from(["inverse_sqrt", "polynomial_decay", "step"]))
def test_these_never_rise_again(name, u):
    schedule = build(name, **EVERY[name])
    assert schedule.lr(u + 1, 1) <= schedule.lr(u, 1)


@given(u=st.integers(0, 20_000), mult=st.floats(1.01, 3.0))
def test_cosine_periods_never_slip(u, mult):
    """A logarithm finds the period; its rounding must not put an update outside it."""
    schedule = build("cosine", lr_period_updates=100.0, t_mult=mult, lr_shrink=1.0)
    index, t, length = schedule._period(u)
    assert -1e-6 <= t <= length + 1e-6
    assert length == pytest.approx(100.0 * mult**index)
    assert math.isfinite(schedule.lr(u, 1))


@pytest.mark.parametrize("name", [n for n in SCHEDULES.names() if n != "pass_through"])
def test_a_list_of_rates_is_for_schedules_by_epoch(name):
    fields = {**EVERY.get(name, {})}
    if name == "triangular":
        fields = {"max_lr": 1.0}
    if name in ("fixed", "polynomial_decay"):
        build(name, lr=(0.1, 0.2), **fields)
        return
    with pytest.raises(ConfigError, match=r"--lr 0\.1,0\.2: .*--lr-scheduler fixed"):
        build(name, lr=(0.1, 0.2), **fields)


def test_apply_sets_the_optimizer_and_best_is_kept():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], SGDConfig(), lr=1.0)
    schedule = build("inverse_sqrt", warmup_updates=10)
    assert schedule.apply(optimizer, 5, 1) == optimizer.get_lr() == pytest.approx(0.05)
    for value in (5.0, 4.0, None, 6.0):
        schedule.observe(value, 5)
    assert schedule.state_dict() == {"best": 4.0}
    schedule.load_state_dict({"best": None})
    assert schedule.best is None


def test_pass_through_says_why_not():
    with pytest.raises(ConfigError, match="--lr-scheduler pass_through belongs to"):
        SCHEDULES.get("pass_through").factory(None, OptimizationConfig())
