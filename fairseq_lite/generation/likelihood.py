"""How likely given tokens are: log-probabilities of targets, never the whole vocabulary's at once.

Only positions that have a target are projected to the vocabulary, so many at a time; padding and
the context in front of what is scored cost no projection.

Axes: B sequences, T positions, N positions with a target, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.models.api import Model

# Logits held at a time: 32 MB in fp32. Larger slices are no faster, and leave the cache.
SLICE_NUMBERS = 1 << 23


def average(log_probs: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of probabilities given as logarithms."""
    if len(log_probs) == 1:
        return log_probs[0]
    return torch.logsumexp(torch.stack(list(log_probs)), dim=0) - math.log(len(log_probs))


def log_probs_of(
    states: Tensor, targets: Tensor, log_softmax: Callable[[Tensor], Tensor], rows: int
) -> Tensor:
    """Log-probabilities of given tokens.

    Args:
        states: (N, D), or whatever `log_softmax` takes.
        targets: (N,).
        log_softmax: from states (1, n, D) to log-probabilities (1, n, V) in fp32.
        rows: how many are computed at a time.

    Returns:
        (N,), fp32.
    """
    found = [
        log_softmax(part[None])[0].gather(1, wanted[:, None])[:, 0]
        for part, wanted in zip(states.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)


def slice_rows(vocabulary: int, softmax_batch: int | None = None) -> int:
    """How many positions are projected at a time: `--softmax-batch` at most."""
    rows = max(1, SLICE_NUMBERS // vocabulary)
    return rows if softmax_batch is None else min(rows, softmax_batch)


class TargetScorer:
    """Scores the targets of batches with one model, or several whose probabilities are averaged.

    Args:
        models: language models or encoder-decoders, in evaluation mode.
        pad: marks the positions without a target.
        softmax_batch: project at most so many positions at a time.
    """

    def __init__(
        self, models: Sequence[Model], pad: int, *, softmax_batch: int | None = None
    ) -> None:
        self.models = list(models)
        self.pad = pad
        self.softmax_batch = softmax_batch

    @torch.inference_mode()
    def score(self, net_input: Mapping[str, Any], target: Tensor) -> Tensor:
        """Score a batch.

        Args:
            net_input: what the models read.
            target: (B, T), padding where nothing is to be scored.

        Returns:
            (B, T), natural logarithms in fp32; zero where there is no target.
        """
        wanted = target.ne(self.pad)
        found = average([self._score(m, net_input, target[wanted], wanted) for m in self.models])
        return torch.zeros_like(target, dtype=torch.float32).masked_scatter_(wanted, found.float())

    def _score(
        self, model: Model, net_input: Mapping[str, Any], targets: Tensor, wanted: Tensor
    ) -> Tensor:
        weight = model.output_weight
        if weight is None:  # logits are not a plain product: take them as the model gives them
            out = model(**net_input)
            logp = model.get_normalized_probs(out, log_probs=True)
            return logp[wanted].gather(1, targets[:, None])[:, 0]
        features, _ = model(**net_input, features_only=True)

        def log_softmax(states: Tensor) -> Tensor:
            return model.get_normalized_probs((model.output_layer(states), {}), log_probs=True)

        rows = slice_rows(weight.size(0), self.softmax_batch)
        return log_probs_of(features[wanted], targets, log_softmax, rows)
