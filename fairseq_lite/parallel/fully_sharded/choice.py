"""`--ddp-backend fully_sharded`: its flags, and the choice of the engine that does it.

An engine is imported when it is chosen: torch's takes more than half a second, fairscale may not be
installed.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Literal

from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import BACKENDS, Backend, Machine
from fairseq_lite.parallel.plan import plan
from fairseq_lite.parallel.world import World

logger = logging.getLogger(__name__)

Engine = Literal["torch", "fairscale"]

_ENGINES: dict[str, tuple[str, str]] = {
    "torch": ("fairseq_lite.parallel.fully_sharded.torch_engine", "TorchSharded"),
    "fairscale": ("fairseq_lite.parallel.fully_sharded.fairscale_engine", "FairscaleSharded"),
}

WHOLE_TENSOR_OPTIMIZERS = ("adafactor", "lamb")


@dataclass(frozen=True)
class FullyShardedConfig:
    """Parameters, gradients and optimizer state spread over the ranks."""

    fsdp_engine: Engine = flag(
        "torch", "what shards: torch (everywhere) or fairscale (CUDA, unmaintained)"
    )
    cpu_offload: bool = flag(
        False, "keep parameters, gradients and optimizer state in host memory, update them there"
    )
    no_reshard_after_forward: bool = flag(
        False, "keep gathered layers until the backward pass: faster, and takes more memory"
    )
    fp32_reduce_scatter: bool = flag(
        False, "with --bf16, --fp16 or --amp, add up gradients over ranks in float32"
    )
    use_sharded_state: bool = flag(
        False, "each rank writes its own part of a checkpoint (checkpoint_last-shardN.pt)"
    )


class FullySharded:
    """What `BACKENDS` holds under "fully_sharded": it stands for the engine that was chosen."""

    def __call__(self, cfg: FullyShardedConfig, world: World, **options: Any) -> Backend:
        backend: Backend = self.engine(cfg)(cfg, world, **options)
        return backend

    def reasons(self, run: RunConfig, machine: Machine | None = None) -> list[str]:
        """See `Backend.reasons`."""
        try:
            engine = self.engine(run.ddp_backend.config)
        except ConfigError as e:
            return [str(e)]
        reasons: list[str] = engine.reasons(run, machine)
        return reasons

    def check(self, run: RunConfig, machine: Machine | None = None) -> None:
        """See `Backend.check`."""
        for reason in self.reasons(run, machine):
            raise ConfigError(reason)

    @staticmethod
    def engine(cfg: FullyShardedConfig) -> Any:
        """The backend class of the engine.

        Raises:
            ConfigError: its package is not installed.
        """
        module, name = _ENGINES[cfg.fsdp_engine]
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as e:
            if cfg.fsdp_engine == "torch":
                raise
            raise ConfigError(
                f"--fsdp-engine fairscale: {e}; pip install 'fairseq-lite[fairscale]', or use "
                "--fsdp-engine torch"
            ) from e


def sharding_reasons(run: RunConfig, machine: Machine) -> list[str]:
    """Why no engine could shard `run` over its ranks: one line each.

    An optimizer sees parts of parameters, so its rule must go element by element.
    """
    try:
        found = plan(run.distributed_training, cpu=run.common.cpu, machine=machine)
    except ConfigError:
        return []  # said elsewhere
    reasons = []
    if found.cuda and found.backend == "gloo":
        reasons.append(
            "--ddp-backend fully_sharded on GPUs needs NCCL: leave out --distributed-backend gloo"
        )
    if found.cuda and run.optimizer.name == "cpu_adam" and not run.ddp_backend.config.cpu_offload:
        reasons.append(
            "--optimizer cpu_adam updates parameters in host memory: add --cpu-offload, or use "
            "--optimizer adam"
        )
    if found.size == 1:
        return reasons
    if run.optimizer.name in WHOLE_TENSOR_OPTIMIZERS:
        reasons.append(
            f"--optimizer {run.optimizer.name} looks at whole parameters, and --ddp-backend "
            f"fully_sharded spreads them over {found.size} ranks: use --optimizer adam, or "
            "--ddp-backend legacy_ddp"
        )
    if getattr(run.optimizer.config, "fp16_adam_stats", False):
        reasons.append(
            "--fp16-adam-stats scales whole tensors, and --ddp-backend fully_sharded spreads them "
            f"over {found.size} ranks: leave it out, or use --ddp-backend legacy_ddp"
        )
    return reasons


def log_units(world: World, layers: int) -> None:
    """Say how a model was sharded, and that nothing is gained where no layer is one unit."""
    logger.info(
        "sharded over %d ranks: %d layers, and what is left of the model", world.size, layers
    )
    if not layers and world.size > 1:
        logger.info(
            "no layer by itself, so every step gathers the whole model: lower "
            "--min-params-to-wrap (a model of your own names its layers in layers_to_shard)"
        )


BACKENDS.register("fully_sharded", config=FullyShardedConfig)(FullySharded())
