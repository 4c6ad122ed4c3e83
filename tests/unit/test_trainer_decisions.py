"""When training stops, validates and saves; what counts as an improvement."""

from __future__ import annotations

from typing import Any

import pytest

from fairseq_lite.config.core import (
    CheckpointConfig,
    DatasetConfig,
    OptimizationConfig,
    RunConfig,
)
from fairseq_lite.training.decisions import Decision, decide
from fairseq_lite.training.state import EarlyStopping, TrainState


def run_with(**values: Any) -> RunConfig:
    sections = {
        "dataset": DatasetConfig,
        "optimization": OptimizationConfig,
        "checkpoint": CheckpointConfig,
    }
    made = {
        name: config(**{k: v for k, v in values.items() if k in config.__dataclass_fields__})
        for name, config in sections.items()
    }
    return RunConfig(command="flite-train", **made)


def now(run: RunConfig, **where: Any) -> Decision:
    defaults = {"epoch": 1, "num_updates": 10, "end_of_epoch": False, "hours": 0.0}
    return decide(run, **{**defaults, **where})


@pytest.mark.parametrize(
    ("flags", "where", "validate", "save"),
    [
        ({}, {}, False, False),
        ({}, {"end_of_epoch": True}, True, True),
        ({"save_interval": 2}, {"end_of_epoch": True}, True, False),
        ({"validate_interval": 2}, {"end_of_epoch": True}, False, True),
        ({"validate_interval": 2}, {"end_of_epoch": True, "epoch": 2}, True, True),
        ({"disable_validation": True}, {"end_of_epoch": True}, False, True),
        ({"save_interval_updates": 5}, {}, True, True),
        ({"save_interval_updates": 5}, {"updated": False}, False, False),
        ({"save_interval_updates": 3}, {}, False, False),
        ({"validate_interval_updates": 5}, {}, True, False),
        ({"validate_after_updates": 11}, {"end_of_epoch": True}, False, True),
        ({"validate_after_updates": 11, "save_interval_updates": 5}, {}, False, False),
        ({"max_update": 10}, {}, True, True),
        ({"stop_time_hours": 1.0}, {"hours": 1.5}, True, True),
        ({}, {"signalled": True}, False, True),
    ],
)
def test_what_is_due(
    flags: dict[str, Any], where: dict[str, Any], validate: bool, save: bool
) -> None:
    decision = now(run_with(**flags), **where)
    assert (decision.validate, decision.save) == (validate, save)


def test_why_it_stops() -> None:
    assert now(run_with()).stop is None
    text = now(run_with(max_update=10)).stop
    assert text == "Stopping training due to num_updates: 10 >= max_update: 10"
    assert now(run_with(max_update=11)).stop is None
    assert "cumulative_training_time" in (now(run_with(stop_time_hours=1), hours=1.1).stop or "")


def test_early_stopping_counts_validations_without_improvement() -> None:
    stopping = EarlyStopping(patience=2, maximize=False)
    assert [stopping.observe(v) for v in (5.0, 4.0, 4.0, 3.5, 3.6, 3.7)] == [
        *(False, False, False, False, False),
        True,
    ]
    resumed = EarlyStopping(patience=2, maximize=False)
    resumed.load_state_dict({"best": 3.5, "runs": 1})
    assert not resumed.observe(None), "without a validation nothing is counted"
    assert resumed.observe(3.5), "a tie is no improvement"


def test_early_stopping_maximizes_and_can_be_off() -> None:
    stopping = EarlyStopping(patience=1, maximize=True)
    assert [stopping.observe(v) for v in (1.0, 2.0, 1.5)] == [False, False, True]
    off = EarlyStopping(patience=-1, maximize=False)
    assert not any(off.observe(v) for v in (1.0, 2.0, 3.0))


def test_a_tie_is_as_good_as_the_best() -> None:
    state = TrainState()
    assert state.observe_best(2.0, maximize=False)
    assert state.observe_best(2.0, maximize=False)
    assert not state.observe_best(2.1, maximize=False)
    assert state.best == 2.0
    assert state.training_time() >= state.previous_training_time
