"""Losses of models with mixtures of experts: a base loss, and what keeps all experts in use."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.flags import flag
from fairseq_lite.criteria.api import CRITERIA, Criterion, Sums
from fairseq_lite.criteria.cross_entropy import (
    CrossEntropy,
    LabelSmoothedCrossEntropy,
    LabelSmoothedCrossEntropyConfig,
    base2,
)
from fairseq_lite.errors import ConfigError
from fairseq_lite.moe import watch
from fairseq_lite.parallel.experts import NamesExperts, has_experts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """Flags of every criterion that balances experts."""

    moe_gate_loss_wt: float = flag(1.0, "weight of the balance loss of the gates")
    moe_gate_loss_combine_method: Literal["average", "sum"] = flag(
        "average", "how the balance losses of the layers become one"
    )
    moe_gate_loss_transform: Literal["none", "neg_log"] = flag(
        "none", "what is done to that; neg_log, minus its logarithm, wants a negative weight"
    )
    moe_z_loss_wt: float = flag(
        0.0, "weight of the z-loss, which keeps the gates' logits small (Zoph et al. 2022)"
    )

    def check_weights(self) -> None:
        """Refuse what no loss can be made of.

        Raises:
            ConfigError: a weight that is not a number, or a negative one of the z-loss.
        """
        if not math.isfinite(self.moe_gate_loss_wt):
            raise ConfigError(f"--moe-gate-loss-wt {self.moe_gate_loss_wt}: expected a number")
        if not (math.isfinite(self.moe_z_loss_wt) and self.moe_z_loss_wt >= 0):
            raise ConfigError(f"--moe-z-loss-wt {self.moe_z_loss_wt}: expected 0 or more")


@dataclasses.dataclass(frozen=True)
class MoECrossEntropyConfig(BalanceConfig):
    """Flags of moe_cross_entropy."""

    def __post_init__(self) -> None:
        self.check_weights()


@dataclasses.dataclass(frozen=True)
class MoELabelSmoothedCrossEntropyConfig(BalanceConfig, LabelSmoothedCrossEntropyConfig):
    """Flags of moe_label_smoothed_cross_entropy."""

    def __post_init__(self) -> None:
        self.check_weights()
        LabelSmoothedCrossEntropyConfig.__post_init__(self)


class _Balancing(Criterion):
    """A base loss B of sample size N, with losses of the gates: B + N (w combined + v z).

    `combined` is the average or the sum over layers of their balance losses, z likewise. In
    training these are of each batch; in evaluation all figures are made of the sums over a whole
    split, so that none of them depends on how it is cut into batches.
    """

    cfg: BalanceConfig
    balances_experts = True
    dense_criterion: ClassVar[str]
    """What to use instead for a model without experts."""

    def __init__(self, cfg: Any, task: Any, sentence_avg: bool = False) -> None:
        super().__init__(cfg, task, sentence_avg)
        if self.cfg.moe_gate_loss_transform == "neg_log" and self.cfg.moe_gate_loss_wt > 0:
            logger.warning(
                "--moe-gate-loss-transform neg_log with a positive --moe-gate-loss-wt rewards gates"
                " that use few experts: give the weight a minus, or leave the transform out"
            )

    @classmethod
    def check_run(cls, run: RunConfig, world_size: int) -> None:
        """Refuse a model whose flags ask for no experts, before a process is started."""
        flags = run.model.config
        if isinstance(flags, NamesExperts) and flags.experts_to_spread() is None:
            raise cls._no_experts()

    def check(self, model: nn.Module) -> None:
        if not has_experts(model):
            raise self._no_experts()

    def judge(
        self, model: Any, sample: Mapping[str, Any]
    ) -> tuple[Tensor, int, Sums, Mapping[str, Any]]:
        base, sample_size, sums, extra = super().judge(model, sample)
        reports = extra.get("experts")
        if not reports:
            raise self._no_experts()
        sums |= {"inner_loss": sums["loss"], **watch.report_sums(reports, training=self.training)}
        if not self.training:
            return base, sample_size, sums, extra
        gate = sample_size * self._combined([report.balance for report in reports.values()])
        loss = base + self.cfg.moe_gate_loss_wt * gate
        sums["moe_gate_loss"] = gate.detach()
        if self.cfg.moe_z_loss_wt:
            z = sample_size * self._over_layers([report.z for report in reports.values()])
            loss = loss + self.cfg.moe_z_loss_wt * z
            sums["moe_z_loss"] = z.detach()
        sums["loss"] = loss.detach()
        return loss, sample_size, sums, extra

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        shown = super().metrics({**sums, "loss": sums["inner_loss"]})
        inner = shown.pop("loss")
        size = sums["sample_size"] or 1.0
        if "moe_gate_loss" in sums:
            loss = base2(sums["loss"], sums["sample_size"])
            gate, z = sums["moe_gate_loss"] / size, sums.get("moe_z_loss", 0.0) / size
        else:
            layers = watch.layers_of(sums).values()
            gate = float(self._combined([torch.tensor(layer.balance) for layer in layers]))
            z = float(self._over_layers([torch.tensor(layer.mean_z) for layer in layers]))
            added = self.cfg.moe_gate_loss_wt * gate + self.cfg.moe_z_loss_wt * z
            loss = inner + added / math.log(2)
        shown = {"loss": loss, "inner_loss": inner, **shown, "moe_gate_loss": gate}
        if self.cfg.moe_z_loss_wt:
            shown["moe_z_loss"] = z
        return shown | watch.metadata(sums)

    def _combined(self, balances: Sequence[Tensor]) -> Tensor:
        combined = self._over_layers(balances)
        return -combined.log() if self.cfg.moe_gate_loss_transform == "neg_log" else combined

    def _over_layers(self, losses: Sequence[Tensor]) -> Tensor:
        total = torch.stack([loss.float() for loss in losses]).sum()
        if self.cfg.moe_gate_loss_combine_method == "sum":
            return total
        return total / len(losses)

    @classmethod
    def _no_experts(cls) -> ConfigError:
        return ConfigError(
            f"--criterion moe_{cls.dense_criterion}: the model has no experts: give it some "
            f"(--moe-freq 2 --moe-expert-count 8), or use --criterion {cls.dense_criterion}"
        )


@CRITERIA.register("moe_cross_entropy", config=MoECrossEntropyConfig)
class MoECrossEntropy(_Balancing, CrossEntropy):
    """Cross-entropy, and the balance of the experts."""

    fairseq_name = "MoECrossEntropyCriterion"
    dense_criterion = "cross_entropy"


@CRITERIA.register("moe_label_smoothed_cross_entropy", config=MoELabelSmoothedCrossEntropyConfig)
class MoELabelSmoothedCrossEntropy(_Balancing, LabelSmoothedCrossEntropy):
    """Label-smoothed cross-entropy, and the balance of the experts."""

    fairseq_name = "MoELabelSmoothedCrossEntropyCriterion"
    dense_criterion = "label_smoothed_cross_entropy"
    cfg: MoELabelSmoothedCrossEntropyConfig
