"""From `--path a.pt:b.pt` to models: what generation, validation and the Python API load."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.data.text.recorded import carried, completed
from fairseq_lite.data.text.segment import Segmentation
from fairseq_lite.errors import CheckpointError, ConfigError, DataError
from fairseq_lite.models.api import Model
from fairseq_lite.parallel.experts import has_experts, spread_over
from fairseq_lite.parallel.shards import parted, pieces
from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.registry import Registry
from fairseq_lite.tasks.api import Task, build_task
from fairseq_lite.training.checkpoint import bundle, convert, naming, parts
from fairseq_lite.training.checkpoint.convert import SavedConfig

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a checkpoint says of its run, and the files it carries.

    Attributes:
        config: fields of `bpe` and `tokenizer` that named a file point to the copy in `folder`.
        folder: where the files are unpacked, or None; it lives as long as this object.
    """

    config: SavedConfig
    folder: tempfile.TemporaryDirectory[str] | None

    @property
    def segmentation(self) -> Segmentation:
        """How text becomes what the model reads; nothing where its files are not here."""
        if self.folder is None:
            return Segmentation()
        return Segmentation(self.config.tokenizer, self.config.bpe)


@dataclasses.dataclass
class Ensemble:
    """Models that were loaded together.

    Attributes:
        models: in evaluation mode, on the CPU; of each layer the experts that this rank owns.
        task: the task they were built for.
        configs: what each checkpoint says about its run; `bpe` and `tokenizer` fields that named a
            file point to the copy the checkpoint carries.
        criterion_states: the criterion's parameters of each, where it has any.
        folder: where the files of the first checkpoint are unpacked, or None; it lives as long as
            this object.
    """

    models: list[Model]
    task: Task
    configs: list[SavedConfig]
    criterion_states: list[Mapping[str, Any] | None] = dataclasses.field(default_factory=list)
    folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def trained(self) -> Trained:
        """The first checkpoint's run, and what it carries."""
        return Trained(self.configs[0], self.folder)


def split_paths(paths: str) -> list[str]:
    """`a.pt:b.pt` as a list."""
    return [path for path in paths.split(":") if path]


def load_models(
    paths: str | Sequence[str],
    registries: Mapping[str, Registry],
    *,
    task: Task | None = None,
    overrides: Mapping[str, Any] | None = None,
    suffix: str = "",
    shard_count: int = 1,
    world: World | None = None,
) -> Ensemble:
    """Load the models of `--path`.

    Args:
        paths: files, as a list or separated by colons.
        registries: section -> registry.
        task: the task with its dictionaries; None: taken from the first checkpoint, dictionaries
            included.
        overrides: `--model-overrides`.
        suffix: `--checkpoint-suffix`.
        shard_count: `--checkpoint-shard-count`.
        world: the ranks that load them together, each all but other ranks' experts; None: this
            process alone.

    Raises:
        CheckpointError: one line that names the file and what does not fit.
        ConfigError: no path, or an override that names no field.
    """
    world = SingleWorld() if world is None else world
    names = split_paths(paths) if isinstance(paths, str) else [str(path) for path in paths]
    if not names:
        raise ConfigError(
            "--path is needed: the checkpoint to load, for example checkpoint_best.pt"
        )
    ensemble: Ensemble | None = None
    for name in names:
        path = _existing(name, suffix)
        files = parts.CheckpointFiles(path, shard_count)
        # What is in parts several ranks share out: each reads its own experts.
        shared = world.size > 1 and pieces.is_in_parts(files)
        state = files.header() if shared else parts.whole_state(path, shard_count, optimizer=False)
        state = convert.upgraded_state(state, path)
        config = convert.saved_config(state, path, registries, overrides)
        if ensemble is None:
            config, folder = _with_files(config, state)
            task = task if task is not None else _task_of(config, folder)
            task.load_state_dict(state.get("task_state") or {})
            ensemble = Ensemble([], task, [], folder=folder)
        _compare_languages(config, ensemble.task)
        model = _build(config, ensemble.task, _shapes(state, path), world)
        if shared:
            parted.load_weights(world, model, files)
        else:
            _load(model, parts.model_of(state, path), path)
        ensemble.models.append(model.eval())
        ensemble.configs.append(config)
        ensemble.criterion_states.append(state.get("criterion"))
    assert ensemble is not None
    return ensemble


def load_for(
    run: RunConfig,
    registries: Mapping[str, Registry],
    task: Task | None = None,
    world: World | None = None,
) -> Ensemble:
    """`load_models` with what a command line says of them."""
    cfg = run.common_eval
    ensemble = load_models(
        cfg.path or "",
        registries,
        task=task,
        overrides=cfg.model_overrides,
        suffix=cfg.checkpoint_suffix,
        shard_count=cfg.checkpoint_shard_count,
        world=world,
    )
    if cfg.is_moe and not any(has_experts(model) for model in ensemble.models):
        raise ConfigError(
            f"--is-moe: {cfg.path} has no experts: leave the flag out, checkpoints say by "
            "themselves what they hold"
        )
    return ensemble


def config_for(run: RunConfig, registries: Mapping[str, Registry]) -> SavedConfig:
    """The configuration alone of the first checkpoint that a command line names.

    Raises:
        CheckpointError: it cannot be read.
    """
    state, path = _header(run)
    return convert.saved_config(state, path, registries, run.common_eval.model_overrides)


def trained_for(run: RunConfig, registries: Mapping[str, Registry]) -> Trained:
    """As `config_for`, with the files that the checkpoint carries.

    Raises:
        CheckpointError: it cannot be read.
    """
    state, path = _header(run)
    config = convert.saved_config(state, path, registries, run.common_eval.model_overrides)
    return Trained(*_with_files(config, state))


def _header(run: RunConfig) -> tuple[Mapping[str, Any], Path]:
    cfg = run.common_eval
    path = _existing(split_paths(cfg.path or "")[0], cfg.checkpoint_suffix)
    return parts.CheckpointFiles(path, cfg.checkpoint_shard_count).header(), path


def _existing(name: str, suffix: str) -> Path:
    path = Path(naming.with_suffix(name, suffix))
    if path.is_dir():
        known = (naming.BEST, naming.LAST, "model.pt")
        inside = [each for each in known if parts.readable_files(path / each)]
        hint = f"; did you mean {path / inside[0]}?" if inside else ""
        raise CheckpointError(f"--path {path}: is a folder{hint}")
    if not parts.readable_files(path):
        raise CheckpointError(f"--path {path}: no such checkpoint")
    return path


def _with_files(
    config: SavedConfig, state: Mapping[str, Any]
) -> tuple[SavedConfig, tempfile.TemporaryDirectory[str] | None]:
    """Unpack what travels in the checkpoint, and point the entries to it."""
    files = bundle.read(state, config.path)
    if not files.files:
        return config, None
    folder = bundle.unpack(files)
    bpe, tokenizer = (
        bundle.repoint(choice, section, files, Path(folder.name))
        for section, choice in (("bpe", config.bpe), ("tokenizer", config.tokenizer))
    )
    return dataclasses.replace(config, bpe=bpe, tokenizer=tokenizer), folder


def with_segmentation(run: RunConfig, trained: Trained) -> RunConfig:
    """The run with the segmentation that the model carries, where nothing else says one.

    Args:
        run: with what was typed and what its data folder records.
        trained: what its first checkpoint says. A file of fairseq's own carries no segmentation: it
            only names files of the machine it was trained on.
    """
    if run.bpe.name or run.tokenizer.name:
        return with_its_files(run, trained)
    found = trained.segmentation
    if not found:
        return run
    logger.info("%s, as in training", found)
    return dataclasses.replace(run, bpe=found.bpe, tokenizer=found.tokenizer)


def with_its_files(run: RunConfig, trained: Trained) -> RunConfig:
    """The run with the model's own files and settings for an entry that was typed by name alone."""
    return dataclasses.replace(
        run,
        bpe=_with_files_of("bpe", run.bpe, trained.segmentation.bpe),
        tokenizer=_with_files_of("tokenizer", run.tokenizer, trained.segmentation.tokenizer),
    )


def _with_files_of(section: str, typed: Choice, trained: Choice) -> Choice:
    if typed.name is None or typed.name != trained.name:
        return typed
    fields = [each.field for each in carried(section, trained)]
    missing = any(not getattr(typed.config, field) for field in fields)
    return completed(typed, trained) if missing else typed


def _task_of(config: SavedConfig, folder: tempfile.TemporaryDirectory[str] | None) -> Task:
    """The task a checkpoint was trained for, its dictionaries from wherever they can be found.

    In the checkpoint itself, beside it (as fairseq's own archives have them), or in the data
    folder of the run.
    """
    if config.task.name is None:
        stored = (config.cfg.get("task") or {}).get("_name")
        raise CheckpointError(
            f"{config.path}: was trained for --task {stored}, which is not built here"
        )
    run = config.run()
    if any(field.name == "data" for field in dataclasses.fields(config.task.config)):
        beside = config.path.parent if any(config.path.parent.glob("dict*.txt")) else None
        data = folder.name if folder is not None else str(beside) if beside else None
        if data is not None:
            run = with_data(run, data)
    try:
        return build_task(run)
    except DataError as e:
        raise CheckpointError(
            f"{config.path}: carries no dictionaries and they are not beside it: put "
            f"the dict.*.txt of its data folder there ({e})"
        ) from e


def with_data(run: RunConfig, data: str) -> RunConfig:
    """The run with its task's data folder replaced."""
    task = Choice(run.task.name, dataclasses.replace(run.task.config, data=data))
    return dataclasses.replace(run, task=task)


def _build(config: SavedConfig, task: Task, shapes: Mapping[str, Shape], world: World) -> Model:
    _check_vocabulary(config.path, task, shapes)
    # Groups are chosen anew: the model may have been trained on any number of ranks.
    with spread_over(world, regroup=True):
        return task.build_model(config.model)


def _shapes(state: Mapping[str, Any], path: Path) -> dict[str, Shape]:
    """The shapes of a checkpoint's weights, also from a part that holds stretches of them only."""
    table = (parts.own(state).get("manifest") or {}).get("tensors") or {}
    return {
        name: tuple(table.get(f"model.{name}", {}).get("shape", tensor.shape))
        for name, tensor in parts.model_of(state, path).items()
    }


def _load(model: Model, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_weights(weights)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _compare_languages(config: SavedConfig, task: Task) -> None:
    """Say so when a model reads another language: a joined dictionary would hide it."""

    def languages(cfg: Any) -> tuple[Any, ...]:
        names = [f.name for f in dataclasses.fields(cfg)]
        return tuple(getattr(cfg, n) for n in ("source_lang", "target_lang") if n in names)

    trained, asked = languages(config.task.config), languages(task.cfg)
    if None not in (*trained, *asked) and len(trained) == len(asked) and trained != asked:
        logger.warning(
            "%s was trained from %s to %s and is used from %s to %s: give its --source-lang and "
            "--target-lang if that is not what you mean",
            config.path,
            *trained,
            *asked,
        )


def _check_vocabulary(path: Path, task: Task, shapes: Mapping[str, Shape]) -> None:
    """Name a dictionary that is not the one of training, before shapes clash somewhere deep."""
    source, target = task.source_dictionary, task.target_dictionary
    sides = [("encoder", "source", source), ("decoder", "target", target)]
    if not any(name.startswith("encoder.") for name in shapes):
        # A language model's decoder reads what the source dictionary numbers; its targets may be
        # fewer.
        sides = [("decoder", "source", source)]
    for side, what, dictionary in sides:
        shape = shapes.get(f"{side}.embed_tokens.weight")
        if shape is None or dictionary is None or len(shape) != 2:
            continue
        if shape[0] != len(dictionary):
            raise CheckpointError(
                f"{path}: was trained with {shape[0]} {what} symbols, the {what} "
                f"dictionary of this data folder has {len(dictionary)}: use the dict.*.txt it was "
                "trained with"
            )
