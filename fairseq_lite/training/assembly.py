"""Putting a trainer together from its configuration."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

from fairseq_lite.config.core import RunConfig
from fairseq_lite.criteria.api import CRITERIA
from fairseq_lite.data.text.api import check_codecs
from fairseq_lite.errors import ConfigError
from fairseq_lite.models.api import ARCHITECTURES
from fairseq_lite.optim.api import OPTIMIZERS, SCHEDULES
from fairseq_lite.optim.precision import make_precision
from fairseq_lite.parallel.api import BACKENDS, Machine
from fairseq_lite.parallel.experts import has_experts
from fairseq_lite.parallel.plan import plan
from fairseq_lite.parallel.shards import sets
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import Task
from fairseq_lite.training import compilation
from fairseq_lite.training.ema import MovingAverage
from fairseq_lite.training.state import TrainState
from fairseq_lite.training.trainer import Trainer

logger = logging.getLogger(__name__)


def check(run: RunConfig) -> None:
    """Refuse what cannot work before any process is started.

    Raises:
        ConfigError: with the first reason.
    """
    if run.dataset.max_tokens is None and run.dataset.batch_size is None:
        raise ConfigError("the size of a batch is missing: give --max-tokens or --batch-size")
    if run.optimizer.name is None:
        raise ConfigError("no optimizer: add --optimizer, for example --optimizer adam")
    if run.dataset.disable_validation and run.checkpoint.patience > 0:
        raise ConfigError("--patience needs validation: leave out --disable-validation")
    suffix = run.checkpoint.checkpoint_suffix
    if re.search(rf"-({sets.PATTERN})$", suffix):
        raise ConfigError(
            f"--checkpoint-suffix {suffix}: is the end of a part's name, and what training writes "
            "would pass for one: leave it out, parts are found without it"
        )
    check_codecs(run.tokenizer, run.bpe)  # a checkpoint would carry nothing that can be used
    _check_entries(run)
    backend: Any = BACKENDS.get(run.ddp_backend.name or "legacy_ddp").factory
    backend.check(run)
    compilation.check(run)


def _check_entries(run: RunConfig) -> None:
    """Ask the architecture and the criterion what cannot work."""
    found = plan(run.distributed_training, cpu=run.common.cpu, machine=Machine.here())
    for registry, choice in ((ARCHITECTURES, run.model), (CRITERIA, run.criterion)):
        if choice.name is not None:
            factory: Any = registry.get(choice.name).factory
            factory.check_run(run, found.size)


def build_trainer(run: RunConfig, world: World, task: Task) -> Trainer:
    """Make backend, model, criterion, optimizer, schedule and precision, and say what they are."""
    precision = make_precision(
        run.common,
        world.device,
        update_freq=run.optimization.update_freq,
        world_size=world.size,
    )
    if world.is_main and precision.dtype == torch.float16 and world.device.type == "cpu":
        logger.warning("--fp16 on a CPU: --bf16 is faster there, and needs no loss scale")
    backend = BACKENDS.get(run.ddp_backend.name or "legacy_ddp").factory(
        run.ddp_backend.config, world, dtype=precision.dtype
    )
    criterion = task.build_criterion(run.criterion, run.optimization.sentence_avg)
    criterion.to(world.device)
    if world.size > 1 and any(p.requires_grad for p in criterion.parameters()):
        # Backends reduce the gradients of the model; these would drift apart between the ranks.
        raise ConfigError(
            f"--criterion {run.criterion.name} has parameters of its own: with several processes "
            "put them into the model"
        )
    model = backend.wrap(lambda: task.build_model(run.model))
    logger.info("%s", model)
    criterion.check(model)
    if has_experts(model) and not criterion.balances_experts:
        logger.warning(
            "--criterion %s does not keep the model's experts in use: moe_cross_entropy and "
            "moe_label_smoothed_cross_entropy do",
            run.criterion.name,
        )
    if run.optimization.compile:
        compilation.compile_layers(model)
    for label, thing in (("task", task), ("model", model), ("criterion", criterion)):
        logger.info("%s: %s", label, type(thing).__name__)
    for kind, (total, trained) in (
        ("shared", backend.num_parameters(model)),
        ("expert", backend.num_expert_parameters(model)),
    ):
        logger.info(
            "num. %s model params: %s (num. trained: %s)", kind, f"{total:,}", f"{trained:,}"
        )
    params = [p for part in (model, criterion) for p in part.parameters() if p.requires_grad]
    optimizer = backend.adapt_optimizer(
        model,
        OPTIMIZERS.get(str(run.optimizer.name)).factory(
            params, run.optimizer.config, lr=run.optimization.lr[0]
        ),
    )
    logger.info("training on %d devices (%s)", world.size, world.device.type)
    logger.info(
        "max tokens per device = %s and max sentences per device = %s",
        run.dataset.max_tokens,
        run.dataset.batch_size,
    )
    return Trainer(
        cfg=run.optimization,
        seed=run.common.seed,
        world=world,
        backend=backend,
        task=task,
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        schedule=SCHEDULES.get(run.lr_scheduler.name or "fixed").factory(
            run.lr_scheduler.config,
            run.optimization,
            maximize=run.checkpoint.maximize_best_checkpoint_metric,
        ),
        precision=precision,
        state=TrainState(),
        average=MovingAverage(run.ema, model) if run.ema.store_ema else None,
    )
