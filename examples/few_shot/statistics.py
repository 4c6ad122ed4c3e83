"""Means over trials, with their spread."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np


def over_trials(scores: Sequence[float]) -> dict[str, Any]:
    """What is said of a metric.

    Returns:
        scores: one a trial; mean; std, the population's, 0 for one trial;
        mean_confidence_interval, half the width of the 95% interval of the mean (Student's t with
        the sample's standard error), NaN for one trial.
    """
    values = [float(each) for each in scores]
    finite = all(map(math.isfinite, values))
    n = len(values)
    return {
        "scores": values,
        "mean": math.fsum(values) / n if finite else math.nan,
        "std": statistics.pstdev(values) if finite else math.nan,
        "mean_confidence_interval": (
            t_quantile(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
            if finite and n > 1
            else math.nan
        ),
    }


@functools.lru_cache(maxsize=256)
def t_quantile(p: float, freedom: int) -> float:
    """The value that Student's t with so many degrees of freedom is below with probability p.

    Args:
        p: from 0.5 up to, not including, 1.
        freedom: 1 or more.
    """
    nodes = np.polynomial.legendre.leggauss(64)
    low, high = 0.0, 1.0
    while _t_probability(high, freedom, nodes) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, freedom, nodes) < p else (low, middle)
    return (low + high) / 2


def _t_probability(x: float, freedom: int, quadrature: tuple[Any, Any]) -> float:
    """P(T < x) for x >= 0: with x = sqrt(n) tan(u), the density is a power of a cosine."""
    nodes, weights = quadrature
    angle = math.atan(x / math.sqrt(freedom))
    values = np.cos(angle / 2 * (nodes + 1)) ** (freedom - 1)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return 0.5 + constant / math.sqrt(math.pi) * angle / 2 * float((weights * values).sum())
