"""What a mixture-of-experts layer is made of, as values."""

from __future__ import annotations

import dataclasses
from typing import Literal

SecondExpertPolicy = Literal["all", "sampling", "random"]


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    """How tokens choose experts.

    Attributes:
        num_experts: E.
        top_k: experts of a token: 1 or 2.
        gate_fp32: compute the gate in float32 whatever the layer computes in.
        second_policy: in training, the second expert is always taken (`all`), drawn with Gumbel
            noise (`sampling`), or taken with probability min(1, 2 g2) (`random`). In evaluation it
            is always the second best.
        normalize_before_dropping: make the two weights sum to one before, and not after, rows
            beyond the capacity are dropped.
        capacity_factor: in training an expert takes at most `capacity_factor * ceil(S / E)` of a
            rank's S tokens; None: as many as come.
        eval_capacity_fraction: in evaluation `ceil(fraction * S)`; None: as many as come; negative:
            as in training.
        prioritized: queue for places by the probability of the first expert, not by position.
        mask_padding: padding goes to no expert.
        jitter: multiply what the gate reads by numbers from [1 - jitter, 1 + jitter] in training.
    """

    num_experts: int
    top_k: Literal[1, 2] = 2
    gate_fp32: bool = False
    second_policy: SecondExpertPolicy = "sampling"
    normalize_before_dropping: bool = False
    capacity_factor: float | None = None
    eval_capacity_fraction: float | None = None
    prioritized: bool = False
    mask_padding: bool = False
    jitter: float = 0.0


@dataclasses.dataclass(frozen=True)
class MoEOptions:
    """The experts of one stack of layers.

    Attributes:
        every: each `every`-th layer has experts: those with (index + 1) % every == 0.
        router: how tokens choose.
        ffn_dim: inner width of an expert.
        sqrt_gradients: multiply the experts' gradients by the square root of the size of the
            exchange group; see `parallel.experts.ExpertShard`.
    """

    every: int
    router: RouterOptions
    ffn_dim: int
    sqrt_gradients: bool = False

    def has_experts(self, index: int) -> bool:
        """Whether layer `index`, from 0, is one of experts."""
        return (index + 1) % self.every == 0
