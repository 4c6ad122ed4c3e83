"""From log-probabilities of tokens to scores, calibrated or not; means over trials."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.few_shot import calibration
from examples.few_shot.samples import FewShotSample
from examples.few_shot.scoring import (
    TokenScores,
    branching,
    common_prefix,
    common_suffix,
    perplexity,
    score,
)
from examples.few_shot.statistics import over_trials, t_quantile
from fairseq_lite.errors import ConfigError


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


KNOWN = TokenScores(
    context=-10.0,
    context_tokens=5,
    tail=(-1.0, -2.0, -4.0),
    start=0,
    suffix=2,
    characters=8,
    unconditional=(-0.5, -0.25),
)


def test_each_scoring_is_what_its_name_says() -> None:
    assert score(KNOWN, "sum") == -17.0
    assert score(KNOWN, "mean") == pytest.approx(-7 / 3)
    assert score(KNOWN, "suffix") == -6.0
    assert score(KNOWN, "unconditional-norm") == -6.25


def test_candidates_without_a_common_suffix_have_no_score_of_it() -> None:
    with pytest.raises(ConfigError, match="no common suffix"):
        score(TokenScores(0, 0, (-1.0,), 0, 0, 1), "suffix")


def test_a_perplexity_of_nothing_is_none_and_of_the_impossible_infinite() -> None:
    assert math.isnan(perplexity(0.0, 0))
    assert perplexity(-1e6, 1) == math.inf
    assert perplexity(-2 * math.log(3), 2) == pytest.approx(3)


def test_common_parts_of_candidates() -> None:
    three = [ids(1, 2, 3, 9), ids(1, 2, 4, 9), ids(1, 2, 3, 5, 9)]
    assert common_prefix(three) == 2
    assert common_suffix(three) == 1
    assert common_prefix([ids(1, 2), ids(1, 2)]) == 2


def test_a_candidate_that_begins_another_keeps_a_token() -> None:
    assert branching([ids(1, 2), ids(1, 2, 3)]) == 1


def test_an_option_takes_the_content_out_of_fields() -> None:
    sample = FewShotSample({"sentence1": "A", "sentence2": "B"}, ("Yes", "No"), ("Yes",))
    one, two = calibration.copies(sample, ["sentence1:: | sentence2::N/A", "sentence2::"])
    assert dict(one.data) == {"sentence1": "", "sentence2": "N/A"}
    assert dict(two.data) == {"sentence1": "A", "sentence2": ""}
    assert one.candidates == sample.candidates


@pytest.mark.parametrize("option", ["premise", "", "::x", "a:b"])
def test_an_option_that_is_none_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="expected field::value"):
        calibration.replacements(option)


def test_an_option_of_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="no field 'question'; they have premise"):
        calibration.copies(FewShotSample({"premise": "A"}), ["question::"])


def test_calibration_averages_over_options() -> None:
    assert calibration.average([[1.0, 4.0], [3.0, 0.0]], 2) == [2.0, 2.0]
    assert calibration.average([], 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("freedom", "value"),
    # Two-sided 95 % points of Student's t, as tables print them.
    [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, value: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=6e-4)


def test_trials_have_a_mean_a_spread_and_an_interval() -> None:
    found = over_trials([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0
    assert found["std"] == pytest.approx(math.sqrt(2))
    # t(4) * sqrt(2.5) / sqrt(5)
    assert found["mean_confidence_interval"] == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-5)


def test_one_trial_has_no_interval() -> None:
    found = over_trials([7.0])
    assert (found["mean"], found["std"]) == (7.0, 0.0)
    assert math.isnan(found["mean_confidence_interval"])


def test_a_number_that_is_none_has_no_mean() -> None:
    assert math.isnan(over_trials([1.0, math.nan])["mean"])


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=5), st.floats(-50, 0))
def test_a_sum_is_the_context_and_the_tail(tail: list[float], context: float) -> None:
    known = TokenScores(context, 3, tuple(tail), 0, 0, 1)
    assert score(known, "sum") == pytest.approx(context + sum(tail))
