"""Metrics of facts: LAMA's ranks, mLAMA's choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from examples.few_shot.metrics.api import METRICS, Metric, accuracy, group, mean, percentage
from examples.few_shot.predictors.api import Prediction


def _ranks(predictions: Sequence[Prediction]) -> list[int]:
    return [each.candidates[0].meta["rank"] for each in predictions]


@METRICS.register("precision@1")
class PrecisionAt1(Metric):
    """Percentage of facts whose answer, its first token, is the likeliest of the vocabulary."""

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        return {"precision@1": percentage([rank <= 1 for rank in _ranks(predictions)])}


@METRICS.register("precision@10")
class PrecisionAt10(Metric):
    """Percentage of facts whose answer, its first token, is among the ten likeliest."""

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        return {"precision@10": percentage([rank <= 10 for rank in _ranks(predictions)])}


@METRICS.register("mrr")
class MeanReciprocalRank(Metric):
    """The mean of 1 / rank of answers, their first tokens, in the vocabulary: from 0 to 1."""

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        return {"mrr": mean([1 / rank for rank in _ranks(predictions)])}


@METRICS.register("mlama")
class PrecisionByRelation(Metric):
    """precision@1: percentage of facts whose best candidate is right, averaged over relations.

    precision@1_RELATION: of one relation.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        by_relation = {
            name: accuracy(members) for name, members in group(predictions, "relation").items()
        }
        return {"precision@1": mean(list(by_relation.values()))} | {
            f"precision@1_{name}": value for name, value in by_relation.items()
        }
