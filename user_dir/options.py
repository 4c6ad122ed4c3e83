"""What DeepSpeed's gate and layer are made of, as values, with DeepSpeed's names."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fairseq_lite.moe.options import MoEOptions, RouterOptions

LayerKind = Literal["deepspeed", "native"]
NoisyGatePolicy = Literal["None", "RSample", "Jitter"]

JITTER = 1e-2
"""DeepSpeed's Jitter multiplies what the gate reads by numbers from [1 - 0.01, 1 + 0.01]."""


@dataclasses.dataclass(frozen=True)
class GateOptions(RouterOptions):
    """The rules of DeepSpeed's gate.

    Attributes:
        min_capacity: an expert takes at least this many of a rank's tokens.
        eval_capacity_factor: `capacity_factor` of evaluation; None: as many tokens as come.
        rsample: in training the expert is drawn with Gumbel noise (top-1 only).
        random_tokens: in training, tokens that an expert has no room for are chosen at random, not
            by their position (top-1 only).
    """

    min_capacity: int = 0
    eval_capacity_factor: float | None = None
    rsample: bool = False
    random_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class DeepSpeedOptions(MoEOptions):
    """The experts of one stack.

    Attributes:
        kind: whose layer computes.
        group_size: ranks that share one set of experts.
    """

    kind: LayerKind = "deepspeed"
    group_size: int = 1
