"""Metrics of MultiRC, whose questions have several answers, each right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from examples.few_shot.metrics.api import METRICS, Metric, group, mean, percentage
from examples.few_shot.metrics.classification import f1, ratio
from examples.few_shot.predictors.api import Prediction


@METRICS.register("multirc")
class MultiRC(Metric):
    """How the answers of questions are told right from wrong (Khashabi et al. 2018, section 5).

    accuracy: percentage of questions all of whose answers are judged as they should be.
    question_P, question_R: precision and recall of a question's right answers, averaged over
    questions; 1 where none is called right (precision) or none is right (recall). question_F1: the
    harmonic mean of the two averages. dataset_P, dataset_R, dataset_F1: of all answers together.
    From 0 to 1 but for accuracy.
    """

    right = "true"

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        known = [each for each in predictions if each.sample.correct]
        questions = [
            [(self.right in p.sample.correct, p.best.candidate == self.right) for p in members]
            for members in group(known, "question_id").values()
        ]
        each = [_precision_recall(question) for question in questions]
        precision, recall = mean([p for p, _ in each]), mean([r for _, r in each])
        overall = _precision_recall([pair for question in questions for pair in question])
        return {
            "accuracy": percentage([all(a == b for a, b in question) for question in questions]),
            "question_P": precision,
            "question_R": recall,
            "question_F1": f1(precision, recall),
            "dataset_P": overall[0],
            "dataset_R": overall[1],
            "dataset_F1": f1(*overall),
        }


def _precision_recall(pairs: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    """Of pairs that say whether an answer is right, and whether it is called right."""
    hits = sum(right and called for right, called in pairs)
    called = sum(called for _, called in pairs)
    return ratio(hits, called, 1.0), ratio(hits, sum(right for right, _ in pairs), 1.0)
