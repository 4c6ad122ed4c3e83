"""`flite-validate` from its configuration on: load a checkpoint, go through splits, report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.config.flags import default_of
from fairseq_lite.config.serial import to_plain
from fairseq_lite.data.folders import data_folders
from fairseq_lite.data.iterators import EpochBatchIterator
from fairseq_lite.data.text.api import check_codecs
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.models.api import Model
from fairseq_lite.moe.watch import shown_layers
from fairseq_lite.optim.precision import make_precision
from fairseq_lite.parallel.world import World
from fairseq_lite.registry import Registry
from fairseq_lite.tasks.api import BatchLimits, Sample, Task, build_task, resolve_max_positions
from fairseq_lite.training.checkpoint import inference
from fairseq_lite.training.checkpoint.convert import SavedConfig
from fairseq_lite.training.loggers import ProgressLogs
from fairseq_lite.training.metrics import rounded
from fairseq_lite.training.validation import Validator

logger = logging.getLogger(__name__)


def evaluate(
    run: RunConfig, world: World, registries: Mapping[str, Registry]
) -> dict[str, dict[str, float]]:
    """Validate the model of --path on every split of --valid-subset.

    Args:
        run: the configuration of `flite-validate`.
        world: the processes that share the splits.
        registries: section -> registry.

    Returns:
        The metrics of each split, as they are logged.

    Raises:
        ConfigError: no model or several, or no batch size.
        FliteError: the checkpoint or the data cannot be read, or do not fit each other.
    """
    logger.info("%s", json.dumps(to_plain(run), ensure_ascii=False))
    paths = inference.split_paths(run.common_eval.path or "")
    if len(paths) != 1:
        raise ConfigError(
            f"--path {run.common_eval.path or ''}: expected one checkpoint, for example "
            "checkpoints/checkpoint_best.pt"
        )
    if run.dataset.max_tokens is None and run.dataset.batch_size is None:
        raise ConfigError("the size of a batch is missing: give --max-tokens or --batch-size")
    trained = inference.trained_for(run, registries)
    saved = trained.config
    run = dataclasses.replace(run, task=task_choice(run.task, saved))
    # --eval-bleu scores what it scored in training.
    run = inference.with_segmentation(run, trained)
    check_codecs(run.tokenizer, run.bpe)
    task = build_task(run)
    loaded = inference.load_for(run, registries, task, world)
    model = loaded.models[0].to(world.device)
    if saved.criterion.name is None:
        stored = (saved.cfg.get("criterion") or {}).get("_name")
        raise CheckpointError(
            f"{paths[0]}: was trained with --criterion {stored}, which is not known here: give the "
            "--user-dir it comes from"
        )
    criterion = task.build_criterion(saved.criterion, saved.sentence_avg).to(world.device)
    if loaded.criterion_states[0]:
        criterion.load_state_dict(dict(loaded.criterion_states[0]))
    validator = Validator(
        world=world,
        task=task,
        model=model,
        criterion=criterion,
        precision=make_precision(run.common, world.device),
    )
    logs = ProgressLogs(run.common, is_main=world.is_main)
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


_DIRECTION = ("source_lang", "target_lang")


def as_trained(run: RunConfig, registries: Mapping[str, Registry]) -> RunConfig:
    """The run with what the model of --path was trained with, where nothing else was typed.

    A language model's vocabulary, longest input and start symbol are not a matter of choice, nor is
    the direction of a translation, which the names of data files do not tell; fairseq expects them
    to be typed again.
    """
    own = {field.name for field in dataclasses.fields(run.task.config)}
    if run.common_eval.path and own.issuperset(_DIRECTION):
        return _in_the_direction_trained(run, registries)
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


def _in_the_direction_trained(run: RunConfig, registries: Mapping[str, Registry]) -> RunConfig:
    """From a folder made from en to de, a model of de to en translates from de."""
    cfg = run.task.config
    if cfg.source_lang is not None or cfg.target_lang is not None or cfg.data is None:
        return run
    trained = inference.config_for(run, registries).task.config
    pair = [getattr(trained, name, None) for name in _DIRECTION]
    folder = Path(data_folders(cfg.data)[0])
    if None in pair or not all((folder / f"dict.{lang}.txt").is_file() for lang in pair):
        return run
    logger.info("-s %s -t %s, as in training", *pair)
    directed = dataclasses.replace(cfg, source_lang=pair[0], target_lang=pair[1])
    return dataclasses.replace(run, task=dataclasses.replace(run.task, config=directed))


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
    cfg, world = run.dataset, validator.world
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
        # This rank's share of this shard: what the shard would be with so many times the shards.
        world_size=cfg.num_shards * world.size,
        rank=cfg.shard_id + cfg.num_shards * world.rank,
        num_workers=cfg.num_workers,
    )
    # What one process would take of this shard, None included.
    total = len(range(0, len(data.batches), cfg.num_shards))
    if cfg.max_valid_steps is not None:
        total = min(total, cfg.max_valid_steps)
    steps = -(-total // world.size)
    batches = _first(data.next_epoch_itr(shuffle=False), len(range(world.rank, total, world.size)))
    with logs.begin_validation(subset, epoch=None, size=steps) as progress:
        meters = validator.run(
            subset,
            batches,
            data.first_batch(),
            progress,
            max_steps=steps,
            log_interval=run.common.log_interval,
            total=total,
        )
        values = rounded(meters.values())
        progress.summary(values, tag=subset, num_updates=total)
        progress.layers(shown_layers(meters.sums), tag=subset, num_updates=total)
    return values


def _first(batches: Iterable[Sample | None], count: int) -> Iterator[Sample | None]:
    """The first batches as they are, and None for every other."""
    for number, batch in enumerate(batches):
        yield batch if number < count else None
