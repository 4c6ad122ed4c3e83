"""Metrics of classification: precision, recall, F1, and Matthews' correlation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from examples.few_shot.metrics.api import METRICS, Metric, mean
from examples.few_shot.predictors.api import Prediction


def ratio(part: float, whole: float, otherwise: float = 0.0) -> float:
    """A quotient, or what stands for it where there is nothing to divide by."""
    return part / whole if whole else otherwise


def f1(precision: float, recall: float) -> float:
    """The harmonic mean; 0 where both are 0."""
    return ratio(2 * precision * recall, precision + recall)


def answers(predictions: Sequence[Prediction]) -> list[tuple[str, str]]:
    """Right and given answer of each question whose right answer is known; of several the first."""
    return [(p.sample.correct[0], p.best.candidate) for p in predictions if p.sample.correct]


def classes(predictions: Sequence[Prediction]) -> list[str]:
    """All candidates, in the order in which they appear."""
    return list(dict.fromkeys(c for p in predictions for c in p.sample.candidates))


@METRICS.register("prf1_macro")
class MacroPRF1(Metric):
    """Precision, recall and F1 of each class, averaged over the classes.

    From 0 to 1; 0 for a class that is never given (precision) or never right (recall).
    macro_Support: how many questions count.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        pairs = answers(predictions)
        if not pairs:
            return dict.fromkeys(("macro_P", "macro_R", "macro_F1"), math.nan) | {
                "macro_Support": 0.0
            }
        right = Counter(gold for gold, given in pairs if gold == given)
        golds, givens = Counter(g for g, _ in pairs), Counter(g for _, g in pairs)
        names = classes(predictions)
        precision = {name: ratio(right[name], givens[name]) for name in names}
        recall = {name: ratio(right[name], golds[name]) for name in names}
        return {
            "macro_P": mean(list(precision.values())),
            "macro_R": mean(list(recall.values())),
            "macro_F1": mean([f1(precision[name], recall[name]) for name in names]),
            "macro_Support": float(len(pairs)),
        }


@METRICS.register("prf1_micro")
class MicroPRF1(Metric):
    """Precision, recall and F1 of all answers together, whatever their class.

    From 0 to 1; equal to each other and to accuracy where every question has one right answer and
    is given one. micro_Support: how many questions count.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        pairs = answers(predictions)
        hits = ratio(sum(gold == given for gold, given in pairs), len(pairs), math.nan)
        found = dict.fromkeys(("micro_P", "micro_R", "micro_F1"), hits)
        return found | {"micro_Support": float(len(pairs))}


def matthews(pairs: Sequence[tuple[str, str]]) -> float:
    """Matthews' correlation for any number of classes (R_K, Gorodkin 2004), from -1 to 1.

    Args:
        pairs: right and given answer.

    Returns:
        0 where all right or all given answers are of one class; NaN where there is none.
    """
    if not pairs:
        return math.nan
    total, hits = len(pairs), sum(gold == given for gold, given in pairs)
    golds, givens = Counter(g for g, _ in pairs), Counter(g for _, g in pairs)
    both = sum(golds[name] * givens[name] for name in golds)
    spread = [total**2 - sum(n**2 for n in counts.values()) for counts in (golds, givens)]
    return ratio(hits * total - both, math.sqrt(spread[0] * spread[1]))


@METRICS.register("r3")
class R3(Metric):
    """Matthews' correlation over three classes, times 100, as GLUE's diagnostic set is reported.

    r3: of all questions. r3__CATEGORY: of those that have a value in the category (Lexical
    Semantics, Predicate-Argument Structure, Logic, Knowledge). r3__CATEGORY__VALUE: of those with
    this value; a question may have several, between semicolons. 0 where all right, or all given,
    answers are of one class.
    """

    categories = ("Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge")

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        found: dict[str, list[Prediction]] = {"r3": list(predictions)}
        for category in self.categories:
            key = f"r3__{_key(category)}"
            found[key] = []
            for each in predictions:
                values = [v.strip() for v in str(each.sample[category]).split(";") if v.strip()]
                if values:
                    found[key].append(each)
                for value in dict.fromkeys(values):
                    found.setdefault(f"{key}__{_key(value)}", []).append(each)
        return {name: 100 * matthews(answers(each)) for name, each in found.items()}


def _key(name: str) -> str:
    return "_".join(name.lower().split())
