"""Settings of models and of tasks: what a script of experiments names.

Both may be written as tuples, in the order of their fields.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from examples.few_shot import model_configs
from examples.few_shot.settings import safe
from examples.few_shot.tasks.api import GROUPS, TASKS
from fairseq_lite.errors import ConfigError
from fairseq_lite.registry import near

RunArgs = Mapping[str, Any]
Groups = Mapping[str, Sequence[str]]

COMBINE = "combine_tasks"
# What the scheduler itself says to the evaluator.
RESERVED = {
    "model_name": "a model setting's first field is the model",
    "tasks": "a task setting's second field is its tasks",
    "results_dir": "-o says where results go",
    "skip_completed": "that is the default; --override-completed evaluates again",
    "override_completed": "say it on the command line",
    "recalc_metrics_from_predictions": "say it on the command line",
}


@dataclass(frozen=True)
class ModelSettings:
    """A model, how it is evaluated, and what its jobs need.

    Attributes:
        model_name: a name of `model_configs`, or a path.
        job_params: {"combine_tasks": True} evaluates all tasks in one job, which loads the model
            once.
        eval_params: values of the evaluator's flags, by destination.
        nodes, gpus_per_node, ntasks_per_node, cpus_per_task, max_parallel: of its jobs on Slurm;
            None: what the flags say.
        partition, constraint, mem, minutes: likewise.
    """

    model_name: str
    job_params: Mapping[str, Any] = field(default_factory=dict)
    eval_params: RunArgs = field(default_factory=dict)
    nodes: int | None = None
    gpus_per_node: int | None = None
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    max_parallel: int | None = None
    partition: str | None = None
    constraint: str | None = None
    mem: str | None = None
    minutes: int | None = None

    def checked(self) -> ModelSettings:
        """The same in plain values.

        Raises:
            ConfigError: a field is wrong. Not before: here its key can be told, and to whoever runs
                a script rather than where its module is imported.
        """
        what = "the model's name"
        if not isinstance(self.model_name, str) or not self.model_name:
            raise ConfigError(f"{what}: expected a word, found {self.model_name!r}")
        params = _mapping(self.job_params, "job parameters")
        for name, value in params.items():
            if name != COMBINE or not isinstance(value, bool):
                raise ConfigError(
                    f'job parameters {params!r}: expected {{}} or {{"{COMBINE}": True}}'
                )
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or value < least):
                raise ConfigError(
                    f"{name}: expected a whole number from {least} on, found {value!r}"
                )
        for name in ("partition", "constraint", "mem"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}: expected a word, found {value!r}")
        return dataclasses.replace(
            self, job_params=params, eval_params=checked_args(self.eval_params)
        )

    @property
    def combine_tasks(self) -> bool:
        """Whether one job evaluates all tasks."""
        return bool(self.job_params.get(COMBINE, False))


_COUNTS = {
    "nodes": 1,
    "gpus_per_node": 0,
    "ntasks_per_node": 1,
    "cpus_per_task": 1,
    "max_parallel": 1,
    "minutes": 1,
}


@dataclass(frozen=True)
class TaskSettings:
    """Tasks, and how they are evaluated.

    Attributes:
        prefix: begins the name of the folder of results; settings may share it.
        tasks: names of tasks and of groups of them.
        eval_params: values of the evaluator's flags, by destination.
    """

    prefix: str
    tasks: Sequence[str]
    eval_params: RunArgs = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A word alone is one task; taken for a list it would be its letters.
        tasks = (self.tasks,) if isinstance(self.tasks, str) else self.tasks
        object.__setattr__(self, "tasks", tuple(tasks) if _is_list(tasks) else tasks)

    def checked(self) -> TaskSettings:
        """The same in plain values.

        Raises:
            ConfigError: a field is wrong; see `ModelSettings.checked`.
        """
        if not isinstance(self.prefix, str) or safe(self.prefix) != self.prefix:
            raise ConfigError(
                f"the folder's prefix: expected letters and digits, found {self.prefix!r}"
            )
        tasks = self.tasks
        if not _is_list(tasks) or not tasks or not all(isinstance(each, str) for each in tasks):
            raise ConfigError(f"the tasks: expected names, found {self.tasks!r}")
        return dataclasses.replace(self, eval_params=checked_args(self.eval_params))


S = TypeVar("S", ModelSettings, TaskSettings)


def as_model_settings(key: str, value: Any) -> ModelSettings:
    """A model setting, which may be written as a tuple.

    Raises:
        ConfigError: it is none; the message names its key.
    """
    return _settings(ModelSettings, "model setting", key, value)


def as_task_settings(key: str, value: Any) -> TaskSettings:
    """A task setting, which may be written as a tuple.

    Raises:
        ConfigError: it is none; the message names its key.
    """
    return _settings(TaskSettings, "task setting", key, value)


def _settings(kind: type[S], what: str, key: str, value: Any) -> S:
    names = [each.name for each in dataclasses.fields(kind)]
    form = f"{kind.__name__}(…) or a tuple ({', '.join(names)})"
    try:
        if isinstance(value, kind):
            return value.checked()
        if not _is_list(value) or not value:
            raise TypeError(value)
        return kind(*value).checked()
    except ConfigError as e:
        raise ConfigError(f"{what} {key!r}: {e}") from None
    except TypeError:
        raise ConfigError(f"{what} {key!r}: expected {form}, found {value!r}") from None


def checked_args(args: Any) -> dict[str, Any]:
    """Values of the evaluator's flags.

    Raises:
        ConfigError: they have no names, cannot be written down for another process, or say what
            the scheduler decides.
    """
    found = _mapping(args, "parameters of the evaluation")
    for name, value in found.items():
        if name in RESERVED:
            raise ConfigError(f"{name} = {value!r} has no place here: {RESERVED[name]}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    except (TypeError, ValueError) as e:
        raise ConfigError(f"parameters of the evaluation: expected plain values: {e}") from None
    return plain


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{what}: expected {{name: value}}, found {value!r}")
    return dict(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


# -- which settings words mean


def chosen_models(
    words: Iterable[str], groups: Groups, available: Mapping[str, Any]
) -> dict[str, ModelSettings]:
    """The model settings that the words of `-m` mean: groups, keys, or models themselves.

    Raises:
        ConfigError: a word is none of these, or a setting is wrong.
    """
    named = model_configs.get_model_config_groups()

    def other(word: str) -> dict[str, ModelSettings]:
        if word in named:
            return {name: _settings_of(name, available) for name in named[word]}
        known = "/" in word or word.startswith(model_configs.CACHED)
        known = known or word in model_configs.all_configs()
        return {safe(word): ModelSettings(word)} if known else {}

    return _chosen("-m", "model", words, groups, available, as_model_settings, other)


def _settings_of(name: str, available: Mapping[str, Any]) -> ModelSettings:
    return as_model_settings(name, available.get(name, ModelSettings(name)))


def chosen_tasks(
    words: Iterable[str], groups: Groups, available: Mapping[str, Any]
) -> dict[str, TaskSettings]:
    """The task settings that the words of `-t` mean: groups, keys, or tasks of a `--user-dir`.

    Raises:
        ConfigError: a word is none of these, or a setting is wrong.
    """

    def other(word: str) -> dict[str, TaskSettings]:
        return {word: TaskSettings(word, (word,))} if word in TASKS or word in GROUPS else {}

    return _chosen("-t", "task", words, groups, available, as_task_settings, other)


def _chosen(
    flag: str,
    what: str,
    words: Iterable[str],
    groups: Groups,
    available: Mapping[str, Any],
    convert: Callable[[str, Any], S],
    other: Callable[[str], dict[str, S]],
) -> dict[str, S]:
    found: dict[str, S] = {}
    for word in words:
        keys = groups.get(word, (word,))
        if not _is_list(keys):
            raise ConfigError(f"{what} group {word!r}: expected a list of settings, found {keys!r}")
        for key in keys:
            if key in available:
                found[key] = convert(key, available[key])
                continue
            made = other(key)
            if not made:
                of = f" (of the group {word})" if word in groups else ""
                names = f"; groups: {_listed(groups)}; settings: {_listed(available)}"
                hint = near(key, [*available, *groups]) or names
                raise ConfigError(f"{flag} {key}{of}: no {what} setting and no group{hint}")
            for name, setting in made.items():
                if found.setdefault(name, setting) != setting:
                    raise ConfigError(
                        f"{flag} {key}: would be called {name}, as another one is already; give "
                        "them keys of their own in a script, or evaluate one after the other, each "
                        "with its own -o"
                    )
    return found


def _listed(names: Iterable[str], most: int = 40) -> str:
    every = [str(name) for name in names]
    more = f" and {len(every) - most} more (-h lists them)" if len(every) > most else ""
    return ", ".join(every[:most]) + more if every else "none"
