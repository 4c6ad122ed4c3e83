"""A criterion made of another one and of the losses that a model adds to its output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.flags import flag
from fairseq_lite.config.serial import section_from_plain
from fairseq_lite.criteria.api import CRITERIA, Criterion, Sums
from fairseq_lite.criteria.cross_entropy import base2
from fairseq_lite.errors import ConfigError
from fairseq_lite.models.api import ARCHITECTURES
from fairseq_lite.moe.watch import layers_of, metadata, report_sums
from fairseq_lite.parallel.experts import NamesExperts, has_experts
from fairseq_lite.registry import near

ALIAS = "base_crit"
GATE_LOSS = "experts_gate_loss"
_PREFIX = "loss_"
_BATCHES = "batches_of_losses"


@dataclasses.dataclass(frozen=True)
class ModelAndBaseConfig:
    """Flags of model_and_base."""

    base_criterion: str = flag("cross_entropy", "the criterion of the main objective")
    base_criterion_config: dict[str, Any] = flag(
        {}, 'JSON of its settings, e.g. {"label_smoothing": 0.1}'
    )
    loss_weights: dict[str, Any] = flag(
        {},
        'JSON of weights, e.g. {"base_crit": 1, "experts_gate_loss": 10}: a loss that is not named'
        " weighs 1, null leaves one out",
    )

    def __post_init__(self) -> None:
        name = self.base_criterion
        if name == "model_and_base":
            raise ConfigError("--base-criterion model_and_base: expected another criterion")
        if name not in CRITERIA:
            known = near(name, CRITERIA.names()) or f"; known: {', '.join(CRITERIA.names())}"
            raise ConfigError(f"--base-criterion {name}: unknown criterion{known}")
        self.base_config()
        self._check_balance()
        for loss, weight in self.loss_weights.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if weight is not None and not (number and math.isfinite(weight)):
                raise ConfigError(
                    f"--loss-weights: {loss}: {weight!r}: expected a number, or null for none"
                )
        twice = [loss for loss in self.base_names() if loss in self.loss_weights]
        if len(twice) > 1:
            raise ConfigError(f"--loss-weights: {' and '.join(twice)} are the same loss")

    def base_config(self) -> Any:
        """The settings of the base criterion.

        Raises:
            ConfigError: a name or a value that it does not have.
        """
        where = "--base-criterion-config"
        if "sentence_avg" in self.base_criterion_config:
            raise ConfigError(f"{where}: sentence_avg: type --sentence-avg for that")
        entry = CRITERIA.get(self.base_criterion)
        try:
            return section_from_plain(entry.config, self.base_criterion_config, where)
        except ConfigError as e:
            told = str(e)
            raise ConfigError(told if told.startswith(where) else f"{where}: {told}") from None

    def _check_balance(self) -> None:
        balances = getattr(CRITERIA.get(self.base_criterion).factory, "balances_experts", False)
        if balances and self.loss_weights.get(GATE_LOSS, 1) is not None:
            raise ConfigError(
                f"--base-criterion {self.base_criterion} has a balance loss of its own: type"
                f" --base-criterion {self.base_criterion.removeprefix('moe_')}, or leave out this"
                f" one: --loss-weights '{{\"{GATE_LOSS}\": null}}'"
            )

    def base_names(self) -> tuple[str, ...]:
        """What --loss-weights may call the base criterion's loss."""
        factory = CRITERIA.get(self.base_criterion).factory
        names = (ALIAS, self.base_criterion, getattr(factory, "fairseq_name", ALIAS))
        return tuple(dict.fromkeys(names))

    def base_weight(self) -> float | None:
        """The weight of the base criterion's loss; None: it is left out."""
        given = [self.loss_weights[name] for name in self.base_names() if name in self.loss_weights]
        return given[0] if given else 1.0

    def check_names(self, offered: Sequence[str], model: str) -> None:
        """Refuse weights of losses that there are not.

        Args:
            offered: the losses of the model.
            model: what to call it.

        Raises:
            ConfigError: with the first of them.
        """
        known = [*self.base_names(), *offered]
        for name in self.loss_weights:
            if name not in known:
                raise ConfigError(
                    f"--loss-weights: {name}: {model} has no such loss; expected"
                    f" {', '.join(known)}" + near(name, known)
                )
        if self.base_weight() is None and all(self.loss_weights.get(n, 1) is None for n in offered):
            raise ConfigError("--loss-weights leaves out every loss")


@CRITERIA.register("model_and_base", config=ModelAndBaseConfig)
class ModelAndBaseCriterion(Criterion):
    """sum over losses of weight * loss: those of the model, and that of a base criterion.

    The base criterion's loss is a sum over tokens, a model's loss one number a batch (a balance
    loss is about the number of layers with experts, however large the batch is), and the total is
    divided by the sample size. So a model's loss counts weight / tokens of a batch as much as a
    token: a weight of 10 next to 8,192 tokens is about 0.001. `moe_cross_entropy` multiplies by the
    sample size instead.

    A model offers losses by `get_losses(net_output) -> {name: Tensor}`; without it, one whose
    layers report on experts offers `experts_gate_loss`, the sum of their balance losses.
    """

    fairseq_name = "ModelAndBaseCriterion"
    balances_experts = True
    cfg: ModelAndBaseConfig

    def __init__(self, cfg: ModelAndBaseConfig, task: Any, sentence_avg: bool = False) -> None:
        super().__init__(cfg, task, sentence_avg)
        factory: Any = CRITERIA.get(cfg.base_criterion).factory
        self.base: Criterion = factory(cfg.base_config(), task, sentence_avg=sentence_avg)

    @classmethod
    def check_run(cls, run: RunConfig, world_size: int) -> None:
        """Refuse weights of losses that the architecture does not have, where it says which.

        Raises:
            ConfigError: with the first of them.
        """
        cfg: ModelAndBaseConfig = run.criterion.config
        offered = getattr(ARCHITECTURES.get(str(run.model.name)).factory, "losses", None)
        if offered is not None:
            cfg.check_names(offered, f"--arch {run.model.name}")
            flags = run.model.config
            dense = isinstance(flags, NamesExperts) and flags.experts_to_spread() is None
            if cfg.base_weight() is None and dense and set(offered) == {GATE_LOSS}:
                raise ConfigError(
                    "--loss-weights leaves out the base criterion's loss, and a model without"
                    " experts has no other: leave out its null, or add experts"
                )

    def check(self, model: nn.Module) -> None:
        """Refuse weights of losses that the model does not have, if that can be known now.

        Raises:
            ConfigError: with the first of them.
        """
        offered = getattr(model, "losses", None)
        if offered is None and not hasattr(model, "get_losses"):
            offered = (GATE_LOSS,) if has_experts(model) else ()
        if offered is not None:
            self.cfg.check_names(offered, type(model).__name__)
        self.base.check(model)

    def judge(
        self, model: Any, sample: Mapping[str, Any]
    ) -> tuple[Tensor, int, Sums, Mapping[str, Any]]:
        with _outputs_of(model) as outputs:
            base, sample_size, base_sums = self.base(model, sample)
        losses = _losses(model, outputs)
        self.cfg.check_names(list(losses), type(model).__name__)
        total = self._total(base, losses)
        sums: Sums = {**base_sums, "loss": total.detach(), "base_loss": base_sums["loss"]}
        sums |= {_PREFIX + name: loss.detach() for name, loss in losses.items()}
        sums[_BATCHES] = 1.0
        extra: dict[str, Any] = {}
        for output in outputs:
            extra |= output[1]
            sums |= report_sums(output[1].get("experts", {}), training=self.training)
        return total, sample_size, sums, extra

    def _total(self, base: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        weight = self.cfg.base_weight()
        if weight is not None and not self.training:
            # A model's loss is of a batch: added up, it would make the figure depend on how a split
            # is cut into batches.
            return base * weight
        terms = [] if weight is None else [base * weight]
        for name, loss in losses.items():
            weight = self.cfg.loss_weights.get(name, 1.0)
            if weight is not None:
                terms.append(loss.float() * weight)
        return sum(terms[1:], terms[0])

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """`loss` is the total; everything that the base criterion shows is of its loss alone.

        A model's losses are means over batches, without their weights. In evaluation they are not
        part of `loss`, and the gates' is that of the whole split.
        """
        base = self.base.metrics({**sums, "loss": sums["base_loss"]})
        shown = {"loss": base2(sums["loss"], sums["sample_size"])}
        shown[_PREFIX + self.cfg.base_criterion] = base.pop("loss")
        shown |= base
        count = sums[_BATCHES]
        shown |= {
            name: value / count if count else 0.0
            for name, value in sums.items()
            if name.startswith(_PREFIX)
        }
        layers = layers_of(sums)
        if layers and _PREFIX + GATE_LOSS in shown:
            shown[_PREFIX + GATE_LOSS] = sum(layer.balance for layer in layers.values())
        return shown | metadata(sums)


@contextmanager
def _outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """What the model returns inside, whoever calls it."""
    outputs: list[Any] = []

    def listen(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)

    handle = model.register_forward_hook(listen)
    try:
        yield outputs
    finally:
        handle.remove()


def _losses(model: Any, outputs: list[Any]) -> dict[str, Tensor]:
    """The model's losses, added up where it ran more than once."""
    total: dict[str, Tensor] = {}
    for output in outputs:
        if hasattr(model, "get_losses"):
            found = dict(model.get_losses(output))
        else:
            reports = output[1].get("experts", {})
            balances = [report.balance for report in reports.values()]
            found = {GATE_LOSS: sum(balances[1:], balances[0])} if balances else {}
        for name, loss in found.items():
            total[name] = total[name] + loss if name in total else loss
    return total
