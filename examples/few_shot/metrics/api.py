"""What a metric is: predictions of one trial to named numbers.

    @METRICS.register("accuracy")
    class Accuracy(Metric):
        "Percentage of questions whose best candidate is right."
        def score(self, predictions): ...

A metric's docstring is its definition and goes into results files.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from examples.few_shot.predictors.api import Prediction
from fairseq_lite.registry import Registry

METRICS = Registry("metric", "metrics")


class Metric(ABC):
    """Numbers that say how good predictions are.

    Attributes:
        name: as registered; that of its number, where it gives one.
        packages: those that compute it, whose versions go into results.
    """

    name: str = ""
    packages: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        """The numbers, by name; NaN where there is nothing to count."""

    @classmethod
    def definition(cls) -> str:
        """What it says, in words."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").split())


def build_metric(name: str) -> Metric:
    """A metric that is registered.

    Raises:
        ConfigError: unknown.
    """
    metric: Metric = METRICS.get(name).factory()
    metric.name = name
    return metric


def mean(values: Sequence[float]) -> float:
    """NaN where there is none."""
    return math.fsum(values) / len(values) if values else math.nan


def percentage(hits: Sequence[bool]) -> float:
    """NaN where there is none."""
    return 100.0 * sum(hits) / len(hits) if hits else math.nan


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Percentage of questions whose best candidate is right, of those with a known answer."""
    known = [each for each in predictions if each.sample.correct]
    return percentage([each.best.candidate in each.sample.correct for each in known])


def group(predictions: Sequence[Prediction], field: str) -> dict[str, list[Prediction]]:
    """Predictions by a field of their samples, in the order in which values appear."""
    found: dict[str, list[Prediction]] = {}
    for each in predictions:
        found.setdefault(str(each.sample[field]), []).append(each)
    return found
