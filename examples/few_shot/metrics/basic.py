"""Accuracy, and perplexities of right and wrong answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from examples.few_shot.metrics.api import METRICS, Metric, accuracy, mean, percentage
from examples.few_shot.predictors.api import Prediction


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Percentage of questions whose best candidate is a right one; of those with a known answer."""

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        return {"accuracy": accuracy(predictions)}


@METRICS.register("gold_answer_ppl")
class GoldAnswerPerplexity(Metric):
    """Perplexities of right and wrong candidates, averaged over questions.

    ppl_answer_* is of the tokens from where candidates differ, ppl_full_* of the whole prompt with
    the candidate. correct_gold: of the right ones; incorrect_gold, incorrect_std_gold,
    incorrect_min_gold: mean, standard deviation and minimum over the wrong ones;
    correct_lt_incorrect_gold: percentage of questions where the right one's is lower than that of
    every wrong one.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for name, key in (("ppl_answer", "ppl"), ("ppl_full", "ppl_full")):
            rows = [self._row(p, key) for p in predictions if _known(p, key)]
            if not rows:
                continue
            for column in ("correct", "incorrect", "incorrect_std", "incorrect_min"):
                values = [row[column] for row in rows if column in row]
                found[f"{name}_{column}_gold"] = mean(values)
            found[f"{name}_correct_lt_incorrect_gold"] = percentage(
                [row["correct"] < row["incorrect_min"] for row in rows if "incorrect_min" in row]
            )
        return found

    @staticmethod
    def _row(prediction: Prediction, key: str) -> dict[str, float]:
        right = [c.meta[key] for c in prediction.candidates if c.candidate in _gold(prediction)]
        wrong = [c.meta[key] for c in prediction.candidates if c.candidate not in _gold(prediction)]
        row = {"correct": mean(right)}
        if wrong:
            row |= {
                "incorrect": mean(wrong),
                "incorrect_std": statistics.pstdev(wrong)
                if all(map(math.isfinite, wrong))
                else math.nan,
                "incorrect_min": min(wrong),
            }
        return row


@METRICS.register("candidate_ppl")
class CandidatePerplexity(Metric):
    """Perplexities, averaged over questions.

    ppl_common_prefix: of the tokens that candidates have in common at their beginning, the prompt
    included; ppl_selected_candidate: of the best one from where candidates differ;
    ppl_full_selected_candidate: of the best one with its prompt; ppl_candidates,
    ppl_candidates_full_prompt: as these two, averaged over all candidates, and with __NAME of one
    of them, where all questions have the same;
    nb_few_shot_samples_fitted: how many shots stood in prompts; nb_trunc_few_shot_samples: how many
    had to be left out.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        asked = [
            _Asked(p.meta.get("ppl"), p.candidates.index(p.best), [c.meta for c in p.candidates])
            for p in predictions
        ]
        found = _perplexities("ppl", asked, _common_names(predictions))
        for name, key in (
            ("nb_few_shot_samples_fitted", "nb_few_shot_samples"),
            ("nb_trunc_few_shot_samples", "nb_trunc_few_shot_samples"),
        ):
            if all(key in p.meta for p in predictions):
                found[name] = mean([p.meta[key] for p in predictions])
        return found


@METRICS.register("calibration_ppl")
class CalibrationPerplexity(Metric):
    """Perplexities of the copies that calibrate, averaged over questions and options.

    ppl_calib_common_prefix, ppl_calib_selected_candidate, ppl_calib_full_selected_candidate,
    ppl_calib_candidates, ppl_calib_candidates_full_prompt and with __NAME behind it: what
    candidate_ppl says without `calib`, with the fields that an option replaces. The best candidate
    is that with the highest score in the copy itself.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        if not all("calib_ppls" in p.meta for p in predictions):
            return {}
        asked = [
            _Asked(copy["ppl"], copy["best"], [c.meta["calib_ppls"][i] for c in p.candidates])
            for p in predictions
            for i, copy in enumerate(p.meta["calib_ppls"])
        ]
        return _perplexities("ppl_calib", asked, _common_names(predictions))


class _Asked(NamedTuple):
    """Perplexities of one prompt.

    Attributes:
        prefix: of what candidates begin with; None where there is no such thing.
        best: the number of the best candidate.
        candidates: `ppl` and, where the prompt was scored, `ppl_full` of each.
    """

    prefix: float | None
    best: int
    candidates: Sequence[Mapping[str, float]]


def _perplexities(
    name: str, asked: Sequence[_Asked], candidates: Sequence[str]
) -> dict[str, float]:
    """What candidate_ppl says, as far as it is known.

    Args:
        name: what names of numbers begin with.
        asked: prompts.
        candidates: those of all prompts; none where prompts differ in them.
    """
    found: dict[str, float] = {}
    prefixes = [each.prefix for each in asked if each.prefix is not None]
    if len(prefixes) == len(asked):
        found[f"{name}_common_prefix"] = mean([v for v in prefixes if not math.isnan(v)])
    for full, key in (("", "ppl"), ("_full", "ppl_full")):
        if not all(key in c for each in asked for c in each.candidates):
            continue
        best = [each.candidates[each.best][key] for each in asked]
        found[f"{name}{full}_selected_candidate"] = mean(best)
        every = [c[key] for each in asked for c in each.candidates]
        of_all = f"{name}_candidates" + ("_full_prompt" if full else "")
        found[of_all] = mean(every)
        for j, candidate in enumerate(candidates if full else ()):
            its = [each.candidates[j][key] for each in asked]
            found[f"{of_all}__{candidate}"] = mean(its)
    return found


def _common_names(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """The candidates that all questions have; none where they differ."""
    distinct = {p.sample.candidates for p in predictions}
    return next(iter(distinct)) if len(distinct) == 1 else ()


def _gold(prediction: Prediction) -> tuple[str, ...]:
    return prediction.sample.correct


def _known(prediction: Prediction, key: str) -> bool:
    return bool(prediction.sample.correct) and all(key in c.meta for c in prediction.candidates)
