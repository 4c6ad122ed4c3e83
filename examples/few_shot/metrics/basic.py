"""Accuracy, and perplexities of right and wrong answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

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
        found: dict[str, float] = {}
        if all("ppl" in p.meta for p in predictions):
            found["ppl_common_prefix"] = _finite_mean([p.meta["ppl"] for p in predictions])
        for name, key in (("", "ppl"), ("_full", "ppl_full")):
            if not all(key in c.meta for p in predictions for c in p.candidates):
                continue
            every = [c.meta[key] for p in predictions for c in p.candidates]
            found[f"ppl{name}_selected_candidate"] = mean([p.best.meta[key] for p in predictions])
            found["ppl_candidates" + ("_full_prompt" if name else "")] = mean(every)
            if name and len({p.sample.candidates for p in predictions}) == 1:
                for j, candidate in enumerate(predictions[0].sample.candidates):
                    its = [p.candidates[j].meta[key] for p in predictions]
                    found[f"ppl_candidates_full_prompt__{candidate}"] = mean(its)
        for name, key in (
            ("nb_few_shot_samples_fitted", "nb_few_shot_samples"),
            ("nb_trunc_few_shot_samples", "nb_trunc_few_shot_samples"),
        ):
            if all(key in p.meta for p in predictions):
                found[name] = mean([p.meta[key] for p in predictions])
        return found


def _gold(prediction: Prediction) -> tuple[str, ...]:
    return prediction.sample.correct


def _known(prediction: Prediction, key: str) -> bool:
    return bool(prediction.sample.correct) and all(key in c.meta for c in prediction.candidates)


def _finite_mean(values: Sequence[float]) -> float:
    return mean([v for v in values if not math.isnan(v)])
