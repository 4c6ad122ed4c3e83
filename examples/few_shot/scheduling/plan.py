"""Which jobs a script of experiments means: pure, from settings and values alone.

Neither data nor models nor torch are needed, and nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.few_shot.builtins import load_builtins
from examples.few_shot.options import DEFAULT_SHOTS, EvaluationOptions, flag_owner
from examples.few_shot.scheduling.precedence import (
    COMMAND_LINE,
    DEFAULT,
    TASK,
    Merged,
    Values,
    canonical,
    gave_way,
    merge_run_args,
)
from examples.few_shot.scheduling.settings import (
    ModelSettings,
    TaskSettings,
    as_model_settings,
    as_task_settings,
)
from examples.few_shot.settings import (
    PlannedEvaluation,
    as_names,
    plan,
    safe,
    template_entry,
)
from examples.few_shot.tasks.api import TASKS, task_names, task_type
from examples.few_shot.templates.api import TEMPLATES
from fairseq_lite.errors import ConfigError

SHOTS, TRIALS, SAMPLES = "nb_few_shot_samples_values", "num_trials", "n_eval_samples"


@dataclass(frozen=True)
class Call:
    """Arguments of `run_evaluations_from_model_name`.

    Attributes:
        task_key: the task setting they belong to.
        model_name: the first argument.
        run_args: the others, by name.
        sources: of each where its value comes from; see `precedence.LEVELS`.
    """

    task_key: str
    model_name: str
    run_args: Values
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """Evaluations of one model that one process, or several together, carry out.

    Attributes:
        name: tells it from the other jobs.
        model_key: the key of its model setting.
        model: the model setting.
        calls: what is evaluated and how; several where task settings are combined.
        evaluations: those it carries out: a part of what its calls mean where jobs are split; of
            each one trial, where that is.
        elsewhere: those of its calls that an earlier job carries out: settings with the same
            prefix share results.
    """

    name: str
    model_key: str
    model: ModelSettings
    calls: tuple[Call, ...]
    evaluations: tuple[PlannedEvaluation, ...]
    elsewhere: tuple[PlannedEvaluation, ...] = ()

    @property
    def task_keys(self) -> tuple[str, ...]:
        """The keys of its task settings."""
        return tuple(call.task_key for call in self.calls)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its results go."""
        found = (each.results_file.parent for each in (*self.evaluations, *self.elsewhere))
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Plan:
    """All jobs, in the order of models and then of tasks.

    Attributes:
        jobs: the jobs.
        remarks: what the user should know of how values were merged.
    """

    jobs: tuple[Job, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Levels:
    """The levels of `merge_run_args` that are the same for all jobs.

    Attributes:
        base: built-in values and those of the command line.
        typed: names of those that somebody typed.
        custom_base, custom_override: of the script.
    """

    base: Values
    typed: frozenset[str] = frozenset()
    custom_base: Values = dataclasses.field(default_factory=dict)
    custom_override: Values = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """What is taken apart into jobs of their own.

    Attributes:
        shots: each number of shots.
        languages: each language.
        trials: each trial.
    """

    shots: bool = False
    languages: bool = False
    trials: bool = False


def plan_jobs(
    models: Mapping[str, ModelSettings],
    tasks: Mapping[str, TaskSettings],
    levels: Levels,
    output: Path,
    split: Split = Split(),
) -> Plan:
    """The jobs for every model setting and every task setting.

    Args:
        models: the settings of models, by key.
        tasks: the settings of tasks, by key.
        levels: the other values.
        output: the folder under which results go.
        split: what is taken apart.

    Raises:
        ConfigError: an unknown task or option, or values that contradict each other; the message
            names the two settings.
    """
    load_builtins()
    models = {key: as_model_settings(key, each) for key, each in models.items()}
    tasks = {key: as_task_settings(key, each) for key, each in tasks.items()}
    options = _every_option()
    jobs: list[Job] = []
    remarks: dict[str, None] = {}
    taken: set[Path] = set()
    for model_key, model in models.items():
        calls: dict[str, tuple[Call, list[PlannedEvaluation]]] = {}
        for task_key, task in tasks.items():
            call, merged = _call(model_key, model, task_key, task, levels, output, options)
            for name, value, source in gave_way(levels.base, sorted(levels.typed), merged):
                key = {TASK: f" {task_key}"}.get(source, f" {model_key}")
                key = key if source.endswith("setting") else ""
                flag = name.replace("_", "-")
                remarks[f"--{flag} gives way to {source}{key}: {value!r}"] = None
            try:
                planned = plan(call.model_name, **call.run_args)
            except ConfigError as e:
                raise ConfigError(f"model {model_key}, task {task_key}: {e}") from None
            calls[task_key] = (call, planned)
        for keys in [list(calls)] if model.combine_tasks else [[key] for key in calls]:
            for job in _split(model_key, model, [calls[key] for key in keys], split):
                mine = tuple(e for e in job.evaluations if e.product not in taken)
                rest = tuple(e for e in job.evaluations if e.product in taken)
                taken.update(each.product for each in mine)
                jobs.append(dataclasses.replace(job, evaluations=mine, elsewhere=rest))
    return Plan(tuple(jobs), tuple(remarks))


def _call(
    model_key: str,
    model: ModelSettings,
    task_key: str,
    task: TaskSettings,
    levels: Levels,
    output: Path,
    options: frozenset[str],
) -> tuple[Call, Merged]:
    merged = merge_run_args(
        levels.base,
        canonical(levels.custom_base),
        canonical(model.eval_params),
        canonical(task.eval_params),
        canonical(levels.custom_override),
    )
    try:
        values = _applicable(merged, task.tasks, options)
    except ConfigError as e:
        raise ConfigError(f"task {task_key}: {e}") from None
    folder = output / folder_name(task.prefix, model_key, values)
    values = {**values, "tasks": list(task.tasks), "results_dir": str(folder)}
    sources = {
        name: DEFAULT if source == COMMAND_LINE and name not in levels.typed else source
        for name, source in merged.sources.items()
        if name in values
    }
    return Call(task_key, model.model_name, values, sources), merged


def _every_option() -> frozenset[str]:
    """The options of all tasks and templates."""
    return frozenset(
        each.name
        for registry in (TASKS, TEMPLATES)
        for name in registry.names()
        for each in dataclasses.fields(registry.get(name).config)
    )


def _applicable(merged: Merged, tasks: Iterable[str], options: frozenset[str]) -> dict[str, Any]:
    """Without what models and scripts say of tasks and templates that are not evaluated here.

    A task setting that says something of others is mistaken; a model's may speak of many.
    """
    names = task_names(tasks)
    general = {each.name for each in dataclasses.fields(EvaluationOptions)}
    entries = [TASKS.get(name) for name in names]
    for name in names:
        chosen = merged.values.get(f"{name}_template") or task_type(name).template
        entries += [template_entry(name, each) for each in as_names(chosen, f"{name}_template")]
    own = {each.name for entry in entries for each in dataclasses.fields(entry.config)}
    others = options - own - general
    found = {}
    for name, value in merged.values.items():
        owner = flag_owner(name)
        strange = owner[0] not in names if owner is not None else name in others
        if merged.sources[name] == TASK or not strange:
            found[name] = value
    return found


def folder_name(prefix: str, model_key: str, values: Values) -> str:
    """The folder of a task setting's results: PREFIX_MODEL_fs.K_K_tTRIALS_smpl.N_current."""
    shots = values.get(SHOTS)
    shots = DEFAULT_SHOTS if shots is None else shots
    many = [shots] if isinstance(shots, int) else list(shots)
    trials = values.get(TRIALS)
    trials = EvaluationOptions.num_trials if trials is None else trials
    samples = values.get(SAMPLES) or "All"
    shown = "_".join(str(k) for k in dict.fromkeys(many))
    return f"{prefix}_{safe(model_key)}_fs.{shown}_t{trials}_smpl.{samples}_current"


def _split(
    model_key: str,
    model: ModelSettings,
    calls: Sequence[tuple[Call, list[PlannedEvaluation]]],
    split: Split,
) -> list[Job]:
    """The calls as one job, or as several that share its folders."""
    own = calls[0][0].task_key if len(calls) == 1 else f"{len(calls)}_tasks"
    parts: dict[str, list[PlannedEvaluation]] = {}
    whole = [each for _, planned in calls for each in planned]
    for each in [one for e in whole for one in e.by_trial()] if split.trials else whole:
        part = [f"fs{each.k}"] if split.shots else []
        part += [each.language] if split.languages and each.language is not None else []
        part += [] if each.trial is None else [f"seed{each.seeds[each.trial]}"]
        parts.setdefault(".".join([own, model_key, *part]), []).append(each)
    return [
        Job(
            name,
            model_key,
            model,
            tuple(call for call, planned in calls if _share(planned, evaluations)),
            tuple(evaluations),
        )
        for name, evaluations in parts.items()
    ]


def _share(planned: Sequence[PlannedEvaluation], evaluations: Sequence[PlannedEvaluation]) -> bool:
    files = {each.results_file for each in evaluations}
    return any(each.results_file in files for each in planned)
