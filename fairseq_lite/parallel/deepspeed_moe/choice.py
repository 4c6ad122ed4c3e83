"""`--ddp-backend deepspeed_moe`: its flags, what it cannot do, and the stage that does it.

DeepSpeed is imported when a run is checked: that takes half a second, and it may not be installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import BACKENDS, Backend, Machine
from fairseq_lite.parallel.deepspeed_moe import comm
from fairseq_lite.parallel.deepspeed_moe.settings import ZeroSettings, settings
from fairseq_lite.parallel.experts import planned_layout
from fairseq_lite.parallel.fully_sharded.choice import WHOLE_TENSOR_OPTIMIZERS
from fairseq_lite.parallel.plan import Plan, common_reasons, plan
from fairseq_lite.parallel.world import World

_BACKENDS = "fairseq_lite.parallel.deepspeed_moe.backends"


@dataclass(frozen=True)
class DeepSpeedMoEConfig:
    """Experts over DeepSpeed's groups of ranks, and optimizer state and gradients sharded by it."""

    zero_stage: int | None = flag(
        None,
        "what ZeRO spreads over the ranks: 0 nothing, 1 optimizer state, 2 gradients too; None: as "
        "--deepspeed-config says, else 0",
    )
    deepspeed_config: str | None = flag(
        None, "DeepSpeed's JSON file, of which zero_optimization is read", metavar="FILE"
    )


class DeepSpeedMoE:
    """What `BACKENDS` holds under "deepspeed_moe": it stands for the stage that was chosen."""

    def __call__(self, cfg: DeepSpeedMoEConfig, world: World, **options: Any) -> Backend:
        asked = settings(cfg.zero_stage, cfg.deepspeed_config)
        backends = importlib.import_module(_BACKENDS)
        kind = backends.ZeroSharded if asked.stage else backends.Replicated
        backend: Backend = kind(asked, world, **options)
        return backend

    def reasons(self, run: RunConfig, machine: Machine | None = None) -> list[str]:
        """See `Backend.reasons`."""
        machine = machine or Machine.here()
        cfg = run.ddp_backend.config
        reasons = common_reasons(run, machine)
        if importlib.util.find_spec("deepspeed") is None:
            reasons.append(f"--ddp-backend deepspeed_moe needs DeepSpeed: {comm.INSTALL}")
        try:
            asked = settings(cfg.zero_stage, cfg.deepspeed_config)
        except ConfigError as e:
            return [*reasons, str(e)]
        try:
            found = plan(run.distributed_training, cpu=run.common.cpu, machine=machine)
        except ConfigError:
            return reasons  # said already
        if found.cuda and found.backend == "gloo":
            reasons.append(
                "--ddp-backend deepspeed_moe on GPUs needs NCCL: leave out --distributed-backend "
                "gloo"
            )
        return reasons + _layout_reasons(run, found) + _zero_reasons(run, found, asked)

    def check(self, run: RunConfig, machine: Machine | None = None) -> None:
        """See `Backend.check`; a DeepSpeed that is there and does not work is told as well."""
        machine = machine or Machine.here()
        for reason in self.reasons(run, machine):
            raise ConfigError(reason)
        found = plan(run.distributed_training, cpu=run.common.cpu, machine=machine)
        comm.load("cuda" if found.cuda else "cpu")


def _layout_reasons(run: RunConfig, found: Plan) -> list[str]:
    try:
        layout = planned_layout(run.model.config, found.size)
    except ConfigError as e:
        return [str(e)]
    if layout is None or layout.num_experts % layout.group_size == 0:
        return []
    return [comm.uneven(layout)]


def _zero_reasons(run: RunConfig, found: Plan, asked: ZeroSettings) -> list[str]:
    """Why ZeRO could not cut the parameters of `run`: it does so without regard to their shapes."""
    if asked.stage == 0 or found.size == 1:
        return []
    reasons = []
    for flag_, whole in (
        (f"--optimizer {run.optimizer.name}", run.optimizer.name in WHOLE_TENSOR_OPTIMIZERS),
        ("--fp16-adam-stats", getattr(run.optimizer.config, "fp16_adam_stats", False)),
    ):
        if whole:
            reasons.append(
                f"{flag_} looks at whole parameters, and ZeRO {asked.stage} spreads them over "
                f"{found.size} ranks: leave it out, or use --zero-stage 0"
            )
    return reasons


BACKENDS.register("deepspeed_moe", config=DeepSpeedMoEConfig)(DeepSpeedMoE())
