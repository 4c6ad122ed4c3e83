"""Metrics of facts: LAMA's ranks, mLAMA's choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from examples.few_shot.metrics.api import METRICS, Metric, accuracy, group, mean, percentage
from examples.few_shot.predictors.api import Prediction


def _both(
    name: str, predictions: Sequence[Prediction], count: Callable[[list[int]], float]
) -> dict[str, float]:
    """A number of all facts, and of those whose answer is a single token."""
    metas = [each.candidates[0].meta for each in predictions]
    single = [meta["rank"] for meta in metas if meta["answer_tokens"] == 1]
    return {name: count([meta["rank"] for meta in metas]), f"{name}_single_token": count(single)}


@METRICS.register("precision@1")
class PrecisionAt1(Metric):
    """Percentage of facts whose answer is the likeliest token of the vocabulary.

    Of an answer of several tokens the first alone counts, though other words may begin with it.
    precision@1_single_token: of the facts whose answer is one token, as published LAMA's all are
    for the models it compares. single_token_answers: percentage of such facts.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        single = [each.candidates[0].meta["answer_tokens"] == 1 for each in predictions]
        found = _both("precision@1", predictions, lambda ranks: percentage([r <= 1 for r in ranks]))
        return found | {"single_token_answers": percentage(single)}


@METRICS.register("precision@10")
class PrecisionAt10(Metric):
    """Percentage of facts whose answer is among the ten likeliest tokens of the vocabulary.

    Of an answer of several tokens the first alone counts. precision@10_single_token: of the facts
    whose answer is one token.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        return _both(
            "precision@10", predictions, lambda ranks: percentage([r <= 10 for r in ranks])
        )


@METRICS.register("mrr")
class MeanReciprocalRank(Metric):
    """The mean of 1 / rank of the answer in the vocabulary: from 0 to 1.

    Of an answer of several tokens the first alone counts. mrr_single_token: of the facts whose
    answer is one token.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        return _both("mrr", predictions, lambda ranks: mean([1 / rank for rank in ranks]))


@METRICS.register("mlama")
class PrecisionByRelation(Metric):
    """precision@1: percentage of facts whose best candidate is right, averaged over relations.

    Candidates are whole answers, compared by the scores of all their tokens (`--scoring`).
    precision@1_RELATION: of one relation.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        by_relation = {
            name: accuracy(members) for name, members in group(predictions, "relation").items()
        }
        return {"precision@1": mean(list(by_relation.values()))} | {
            f"precision@1_{name}": value for name, value in by_relation.items()
        }
