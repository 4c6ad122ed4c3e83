"""Cross-entropy with and without label smoothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.config.flags import flag
from fairseq_lite.criteria.api import CRITERIA, Criterion, Sums
from fairseq_lite.criteria.fused import LossSums, fused_smoothed_loss, smoothed_loss
from fairseq_lite.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class LabelSmoothedCrossEntropyConfig:
    """Flags of label_smoothed_cross_entropy."""

    label_smoothing: float = flag(0.0, "share of the probability given to all other tokens")
    report_accuracy: bool = flag(False, "log the share of target tokens predicted right")
    ignore_prefix_size: int = flag(0, "leave out the first N target tokens of every sentence")

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(
                f"--label-smoothing {self.label_smoothing}: expected a number from 0 to below 1"
            )
        if self.ignore_prefix_size < 0:
            raise ConfigError(f"--ignore-prefix-size {self.ignore_prefix_size}: expected 0 or more")


def token_loss(
    model: Any,
    sample: Mapping[str, Any],
    padding_idx: int,
    *,
    epsilon: float = 0.0,
    skip: int = 0,
    count_correct: bool = False,
) -> tuple[LossSums, Mapping[str, Any]]:
    """Run the model on a batch and sum the loss over its target tokens.

    Args:
        model: a `Model`; one with an `output_weight` takes the fused path.
        sample: a batch.
        padding_idx: targets that do not count.
        epsilon: label smoothing.
        skip: leave out the first tokens of every sentence.
        count_correct: also count correct predictions.

    Returns:
        The sums, and the extras of the model's output.
    """
    fused = model.output_weight is not None
    net_output = model(**sample["net_input"], **({"features_only": True} if fused else {}))
    # Taken after the forward pass, which is when a sharded backend has it whole.
    weight = model.output_weight
    (scores, extra), target = net_output, model.get_targets(sample, net_output)
    if weight is not None and _is_fp16(scores):
        # The fused loss makes gradients before the loss scale is known, and small ones would
        # vanish.
        scores, weight = model.output_layer(scores), None
    scores, target = scores[:, skip:].flatten(0, 1), target[:, skip:].flatten()
    if weight is not None:
        sums = fused_smoothed_loss(scores, weight, target, epsilon, padding_idx, count_correct)
    else:
        sums = smoothed_loss(scores, target, epsilon, padding_idx, count_correct)
    return sums, extra


def _is_fp16(x: Tensor) -> bool:
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return cast or x.dtype == torch.float16


def _sums(loss: Tensor, sample: Mapping[str, Any], sample_size: int) -> Sums:
    return {
        "loss": loss.detach(),
        "ntokens": sample["ntokens"],
        "nsentences": sample["target"].size(0),
        "sample_size": sample_size,
    }


def base2(total: float, count: float) -> float:
    """A mean of natural logarithms, in bits."""
    return total / count / math.log(2) if count > 0 else 0.0


def perplexity(bits: float) -> float:
    """2 to the power of a loss in bits; infinite where that overflows."""
    try:
        return float(2.0**bits)
    except OverflowError:
        return math.inf


@CRITERIA.register("cross_entropy")
class CrossEntropy(Criterion):
    """Negative log-likelihood of the targets."""

    fairseq_name = "CrossEntropyCriterion"

    def judge(
        self, model: Any, sample: Mapping[str, Any]
    ) -> tuple[Tensor, int, Sums, Mapping[str, Any]]:
        sample_size = self.sample_size(sample)
        (loss, _, _), extra = token_loss(model, sample, self.padding_idx)
        return loss, sample_size, _sums(loss, sample, sample_size), extra

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        shown = {"loss": base2(sums["loss"], sums["sample_size"])}
        per_token = shown["loss"]
        if sums["sample_size"] != sums["ntokens"]:
            per_token = shown["nll_loss"] = base2(sums["loss"], sums["ntokens"])
        shown["ppl"] = perplexity(per_token)
        return shown


@CRITERIA.register("label_smoothed_cross_entropy", config=LabelSmoothedCrossEntropyConfig)
class LabelSmoothedCrossEntropy(Criterion):
    """Cross-entropy against (1 - eps) on the target and eps/(V-1) on every other token."""

    fairseq_name = "LabelSmoothedCrossEntropyCriterion"
    cfg: LabelSmoothedCrossEntropyConfig

    def judge(
        self, model: Any, sample: Mapping[str, Any]
    ) -> tuple[Tensor, int, Sums, Mapping[str, Any]]:
        sample_size = self.sample_size(sample)
        cfg = self.cfg
        (loss, nll, correct), extra = token_loss(
            model,
            sample,
            self.padding_idx,
            epsilon=cfg.label_smoothing,
            skip=cfg.ignore_prefix_size,
            count_correct=cfg.report_accuracy,
        )
        sums = {**_sums(loss, sample, sample_size), "nll_loss": nll}
        if cfg.report_accuracy:
            target = sample["target"][:, cfg.ignore_prefix_size :]
            sums |= {"n_correct": correct, "total": target.ne(self.padding_idx).sum()}
        return loss, sample_size, sums, extra

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        nll = base2(sums["nll_loss"], sums["ntokens"])
        shown = {
            "loss": base2(sums["loss"], sums["sample_size"]),
            "nll_loss": nll,
            "ppl": perplexity(nll),
        }
        if sums.get("total", 0) > 0:
            shown["accuracy"] = round(sums["n_correct"] * 100.0 / sums["total"], 3)
        return shown
