"""`flite-validate` from its configuration on: load a checkpoint, go through splits, report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping

import torch

from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.config.flags import default_of
from fairseq_lite.config.serial import to_plain
from fairseq_lite.data.iterators import EpochBatchIterator
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.models.api import Model
from fairseq_lite.optim.precision import make_precision
from fairseq_lite.parallel.world import SingleWorld
from fairseq_lite.registry import Registry
from fairseq_lite.tasks.api import BatchLimits, Task, build_task, resolve_max_positions
from fairseq_lite.training.checkpoint import inference
from fairseq_lite.training.checkpoint.convert import SavedConfig
from fairseq_lite.training.loggers import ProgressLogs, setup_logging
from fairseq_lite.training.metrics import rounded
from fairseq_lite.training.validation import Validator

logger = logging.getLogger(__name__)


def evaluate(run: RunConfig, registries: Mapping[str, Registry]) -> dict[str, dict[str, float]]:
    """Validate the model of --path on every split of --valid-subset.

    Args:
        run: the configuration of `flite-validate`.
        registries: section -> registry.

    Returns:
        The metrics of each split, as they are logged.

    Raises:
        ConfigError: no model or several, or no batch size.
        FliteError: the checkpoint or the data cannot be read, or do not fit each other.
    """
    setup_logging(run.common)
    logger.info("%s", json.dumps(to_plain(run), ensure_ascii=False))
    paths = inference.split_paths(run.common_eval.path or "")
    if len(paths) != 1:
        raise ConfigError(
            f"--path {run.common_eval.path or ''}: expected one checkpoint, for example "
            "checkpoints/checkpoint_best.pt"
        )
    if run.dataset.max_tokens is None and run.dataset.batch_size is None:
        raise ConfigError("the size of a batch is missing: give --max-tokens or --batch-size")
    saved = inference.config_for(run, registries)
    run = dataclasses.replace(run, task=task_choice(run.task, saved))
    task = build_task(run)
    loaded = inference.load_for(run, registries, task)
    device = torch.device("cuda" if torch.cuda.is_available() and not run.common.cpu else "cpu")
    model = loaded.models[0].to(device)
    if saved.criterion.name is None:
        stored = (saved.cfg.get("criterion") or {}).get("_name")
        raise CheckpointError(
            f"{paths[0]}: was trained with --criterion {stored}, which is not known here: give the "
            "--user-dir it comes from"
        )
    criterion = task.build_criterion(saved.criterion, saved.sentence_avg).to(device)
    if loaded.criterion_states[0]:
        criterion.load_state_dict(dict(loaded.criterion_states[0]))
    validator = Validator(
        world=SingleWorld(device),
        task=task,
        model=model,
        criterion=criterion,
        precision=make_precision(run.common, device),
    )
    logs = ProgressLogs(run.common)
    return {
        subset: _validate(run, task, model, validator, logs, subset)
        for subset in _subsets(run, task)
    }


def task_choice(typed: Choice, saved: SavedConfig) -> Choice:
    """The task the checkpoint was trained for, with what was typed on this command line.

    The languages and lengths of the checkpoint count unless the command line says otherwise: the
    names of data files alone do not tell en-de from de-en.
    """
    if saved.task.name is None or saved.task.name != typed.name:
        return typed
    changed = {
        field.name: value
        for field in dataclasses.fields(typed.config)
        for value in [getattr(typed.config, field.name)]
        if value != default_of(field)
    }
    return Choice(typed.name, dataclasses.replace(saved.task.config, **changed))


# What the weights of a language model were made for. Where blocks end is another matter: that is
# a question of evaluation.
_OF_THE_WEIGHTS = {"tokens_per_sample", "output_dictionary_size", "add_bos_token"}


def as_trained(run: RunConfig, registries: Mapping[str, Registry]) -> RunConfig:
    """The run with what the model of --path was trained with, where nothing else was typed.

    A language model's vocabulary, longest input and start symbol are not a matter of choice;
    fairseq expects them to be typed again. Other tasks stay as they are.
    """
    own = {field.name for field in dataclasses.fields(run.task.config)}
    if not run.common_eval.path or not own.issuperset(_OF_THE_WEIGHTS):
        return run
    trained = inference.config_for(run, registries).task
    fields = dataclasses.fields(trained.config)
    if not {field.name for field in fields}.issuperset(_OF_THE_WEIGHTS):
        return run
    # A start symbol for each language belongs to the vocabulary.
    wanted = _OF_THE_WEIGHTS | ({"langs"} if trained.config.add_bos_token else set())
    changed = {
        field.name: getattr(trained.config, field.name)
        for field in fields
        if field.name in wanted & own
        and getattr(run.task.config, field.name) == default_of(field)
        and getattr(trained.config, field.name) != default_of(field)
    }
    # Longer blocks than fairseq's default would be another measurement than fairseq's.
    if changed.get("tokens_per_sample", 0) > run.task.config.tokens_per_sample:
        del changed["tokens_per_sample"]
    for name, value in changed.items():
        logger.info("--%s: %s, as in training", name.replace("_", "-"), value)
    task = dataclasses.replace(run.task, config=dataclasses.replace(run.task.config, **changed))
    return dataclasses.replace(run, task=task)


def _subsets(run: RunConfig, task: Task) -> list[str]:
    if run.dataset.combine_valid_subsets:
        task.load_dataset("valid", combine=True)
        return task.validated_splits(["valid"])
    names = [name.strip() for name in run.dataset.valid_subset.split(",") if name.strip()]
    for name in names:
        task.load_dataset(name)
    return task.validated_splits(names)


def _validate(
    run: RunConfig,
    task: Task,
    model: Model,
    validator: Validator,
    logs: ProgressLogs,
    subset: str,
) -> dict[str, float]:
    cfg = run.dataset
    if cfg.fixed_validation_seed is not None:
        torch.manual_seed(cfg.fixed_validation_seed)
    data: EpochBatchIterator = task.batch_iterator(
        subset,
        BatchLimits(
            max_tokens=cfg.max_tokens,
            max_sentences=cfg.batch_size,
            required_multiple=cfg.required_batch_size_multiple,
            max_positions=resolve_max_positions(task.max_positions(), model.max_positions()),
            skip_invalid=cfg.skip_invalid_size_inputs_valid_test,
        ),
        seed=run.common.seed,
        world_size=cfg.num_shards,
        rank=cfg.shard_id,
        num_workers=cfg.num_workers,
    )
    batches = data.next_epoch_itr(shuffle=False)
    with logs.begin_validation(subset, epoch=None, size=len(batches)) as progress:
        meters = validator.run(
            subset,
            batches,
            data.first_batch(),
            progress,
            max_steps=cfg.max_valid_steps,
            log_interval=run.common.log_interval,
        )
        values = rounded(meters.values())
        progress.summary(values, tag=subset, num_updates=len(batches))
    return values
