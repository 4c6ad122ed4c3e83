"""Which evaluations a command line means, and what each is told.

`plan` is a pure function of words and values: it reads no data, loads no model and imports no
torch. Scheduling asks it what a job would write before the job exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.few_shot import calibration
from examples.few_shot.builtins import load_builtins
from examples.few_shot.model_configs import options_of
from examples.few_shot.options import (
    DEFAULT_SHOTS,
    LISTS,
    NO_SETTING,
    OF_SHOTS,
    TASK_FLAGS,
    EvaluationOptions,
    flag_of,
    flag_owner,
)
from examples.few_shot.tasks.api import TASKS, task_names, task_type
from examples.few_shot.templates.api import TEMPLATES
from fairseq_lite.config.flags import coerce
from fairseq_lite.errors import ConfigError
from fairseq_lite.registry import Entry, near

Names = tuple[str, ...]


# Kinds of tasks that --beam-size matters to.
_WITH_BEAMS = ("generation", "ranking")


@dataclass(frozen=True)
class PlannedEvaluation:
    """One evaluation, and where it goes.

    Attributes:
        model: name or path, as given.
        task, template, language, eval_set, train_set, train_lang, valid_set, valid_lang: of it.
        k: number of shots.
        seeds: one for each trial.
        calibration_options: see `calibration.py`.
        task_options, template_options: values of their own flags.
        options: the flags for all tasks.
        settings: everything that its numbers depend on, as plain values.
        prefix: how its files begin.
        results_file: its results.
        prediction_files: its predictions, one a trial.
        trial: the number of the only trial that is to be made; None for all, and the results. The
            results are written by whoever makes the last one.
    """

    model: str
    task: str
    template: str
    language: str | None
    eval_set: str
    train_set: str | None
    train_lang: str | None
    valid_set: str | None
    valid_lang: str | None
    k: int
    seeds: tuple[int, ...]
    calibration_options: Names
    task_options: Any
    template_options: Any
    options: EvaluationOptions
    settings: Mapping[str, Any]
    prefix: str
    results_file: Path
    prediction_files: tuple[Path, ...]
    trial: int | None = None

    @property
    def product(self) -> Path:
        """The file that is there when it has been made."""
        return self.results_file if self.trial is None else self.prediction_files[self.trial]

    def by_trial(self) -> list[PlannedEvaluation]:
        """One for each trial; itself, where there is no more than one."""
        if len(self.seeds) == 1:
            return [self]
        return [dataclasses.replace(self, trial=number) for number in range(len(self.seeds))]

    @property
    def settings_hash(self) -> str:
        """A digest of the settings; part of the names of files."""
        return digest(self.settings)


def digest(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that differ where settings do."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def plan(model_name: str, **given: Any) -> list[PlannedEvaluation]:
    """The evaluations that values mean: task, template, language, set, shots, in this order.

    Args:
        model_name: a name of `model_configs`, or a path.
        given: destinations of flags and their values.

    Raises:
        ConfigError: an unknown task, template or option, or values that contradict each other.
    """
    load_builtins()
    said = {name: value for name, value in given.items() if value is not None}
    # What the model's name implies, as `random` its predictor; what is typed wins.
    given = {**options_of(model_name), **said}
    names = task_names(as_names(given.get("tasks", ()), "tasks"))
    if not names:
        raise ConfigError("--tasks is needed: names of tasks or groups; --list-tasks prints them")
    options = _general(given)
    per_task, rest = _split(given, names)
    found = [
        each
        for name in names
        for each in _plan_task(model_name, name, options, per_task.get(name, {}), given, rest)
    ]
    _all_used(rest, names, per_task)
    paths = [each.results_file for each in found]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"{_twice(paths)} would be written twice: leave a value out")
    return found


def as_names(value: Any, what: str) -> Names:
    """A word or several as a tuple; a word is one, where a list of its letters would be another.

    Raises:
        ConfigError: something else.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes)):
        found = tuple(value)
        if all(isinstance(each, str) for each in found):
            return found
    raise ConfigError(f"{what}: expected a name or a list of names, found {value!r}")


def template_entry(task: str, template: str) -> Entry:
    """A template that is registered.

    Raises:
        ConfigError: unknown; the message suggests near ones, and else those of the task.
    """
    if template not in TEMPLATES:
        head = re.sub(r"(__.*|\d+)$", "", task_type(task).template)
        kin = [name for name in TEMPLATES.names() if name.startswith(head)]
        hint = near(template, TEMPLATES.names()) or f"; {task} has {', '.join(kin)}"
        raise ConfigError(f"{flag_of(task, 'template')} {template}: unknown template{hint}")
    return TEMPLATES.get(template)


def _general(given: Mapping[str, Any]) -> EvaluationOptions:
    values = {
        field.name: coerce(EvaluationOptions, field.name, given[field.name], "options")
        for field in dataclasses.fields(EvaluationOptions)
        if field.name in given
    }
    options = EvaluationOptions(**values)
    for field in dataclasses.fields(EvaluationOptions):
        choices = field.metadata["flag"].choices
        value = getattr(options, field.name)
        if choices is not None and value is not None and value not in choices:
            name = field.name.replace("_", "-")
            raise ConfigError(f"--{name} {value}: expected one of {', '.join(choices)}")
    return options


def _split(
    given: Mapping[str, Any], names: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What is said of single tasks, and the options of tasks and templates."""
    general = {field.name for field in dataclasses.fields(EvaluationOptions)} | set(LISTS)
    per_task: dict[str, dict[str, Any]] = {}
    rest: dict[str, Any] = {}
    chosen = set(names)
    for key, value in given.items():
        if key in general:
            continue
        owner = flag_owner(key)
        if owner is None:
            rest[key] = value
        elif owner[0] not in chosen:
            flag_name = key.replace("_", "-")
            raise ConfigError(f"--{flag_name}: {owner[0]} is not among --tasks; leave it out")
        else:
            per_task.setdefault(owner[0], {})[owner[1]] = value
    return per_task, rest


def _plan_task(
    model: str,
    name: str,
    options: EvaluationOptions,
    said: Mapping[str, Any],
    given: Mapping[str, Any],
    rest: dict[str, Any],
) -> list[PlannedEvaluation]:
    entry = TASKS.get(name)
    kind = task_type(name)
    if options.compute_vocab_dist and kind.kind != "ranking":
        raise ConfigError(
            f"--compute-vocab-dist: {name} ranks no word of the vocabulary; only lama_* do: leave"
            " it out"
        )
    templates = as_names(said.get("template", kind.template), f"{name}_template")
    chosen = said.get("eval_set", given.get("any_eval_set", kind.eval_set))
    if chosen is None:
        raise ConfigError(f"{name} has no files of its own: say {flag_of(name, 'eval_set')} FILE")
    sets = as_names(chosen, f"{name}_eval_set")
    for each in sets:
        _check_set(name, each)
    languages: tuple[str | None, ...] = (None,)
    if kind.languages:
        languages = as_names(
            said.get(
                "languages", given.get("any_languages", kind.default_languages or kind.languages)
            ),
            f"{name}_languages",
        )
        for each in languages:
            _check_language(name, kind, each)
    elif "languages" in said:
        raise ConfigError(f"{flag_of(name, 'languages')}: {name} is in one language; leave it out")
    values = given.get("nb_few_shot_samples_values", _default_shots(kind, options, said))
    if isinstance(values, int):
        values = (values,)
    if not values or not all(isinstance(k, int) and k >= 0 for k in values):
        raise ConfigError(f"--nb-few-shot-samples-values {values}: expected numbers from 0 on")
    found = []
    for template in templates:
        entry_t = template_entry(name, template)
        for language in languages:
            for eval_set in sets:
                for k in dict.fromkeys(values):
                    found.append(
                        _evaluation(
                            model,
                            name,
                            template,
                            language,
                            eval_set,
                            k,
                            options,
                            said,
                            _own(entry, rest),
                            _own(entry_t, rest),
                        )
                    )
    return found


def _default_shots(
    kind: Any, options: EvaluationOptions, said: Mapping[str, Any]
) -> tuple[int, ...]:
    """Of the usual numbers of shots those that a task can have."""
    if said.get("train_set", options.any_train_set or kind.train_set) is None:
        return (0,)
    return tuple(k for k in DEFAULT_SHOTS if kind.max_shots is None or k <= kind.max_shots)


def _evaluation(
    model: str,
    name: str,
    template: str,
    language: str | None,
    eval_set: str,
    k: int,
    options: EvaluationOptions,
    said: Mapping[str, Any],
    task_options: Any,
    template_options: Any,
) -> PlannedEvaluation:
    kind = task_type(name)
    if kind.max_shots is not None and k > kind.max_shots:
        raise ConfigError(
            f"--nb-few-shot-samples-values {k}: {name} takes {kind.max_shots or 'no'} shots"
        )
    train_set, train_lang = _shots_from(name, language, k, options, said)
    valid_set, valid_lang = _counted(name, language, options, said)
    calibrations = _calibrations(name, options, said)
    seeds = tuple(options.seed + i for i in range(options.num_trials if k else 1))
    settings = (
        {
            field.name: getattr(options, field.name)
            for field in dataclasses.fields(EvaluationOptions)
            if field.name not in NO_SETTING
        }
        | {
            "model_name": model,
            "task": name,
            "template": template,
            "language": language,
            "eval_set": eval_set,
            "train_set": train_set,
            "train_lang": train_lang,
            "valid_set": valid_set,
            "valid_lang": valid_lang,
            "nb_few_shot_samples": k,
            "seeds": list(seeds),
            "n_eval_samples": options.n_eval_samples or None,
            "max_positions": _max_positions(options),
            # What these tasks do not heed makes no other evaluation of them.
            "scoring": options.scoring if kind.kind == "choice" else None,
            "beam_size": options.beam_size if kind.kind in _WITH_BEAMS else 1,
            **({} if k else dict.fromkeys(OF_SHOTS, False)),
            "train_sep": options.separator,
            "calibration_options": list(calibrations),
            "task_options": _plain(task_options),
            "template_options": _plain(template_options),
        }
        | _batches(options)
    )
    parts = [
        f"task.{name}",
        f"tmp.{template}",
        _part("train", train_set, train_lang),
        _part("val", valid_set, valid_lang),
        _part("eval", eval_set, language),
        f"calib.{options.calibrator_name}" if options.calibrator_name else None,
        f"sco.{settings['scoring']}" if settings["scoring"] else None,
        f"fs{k}",
    ]
    prefix = _shortened("_".join(filter(None, parts)), digest(settings))
    results = Path(options.results_dir or f"few_shot_{safe(model)}_results")
    dump = Path(options.predictions_dump_dir or results)
    return PlannedEvaluation(
        model, name, template, language, eval_set, train_set, train_lang,
        valid_set, valid_lang, k, seeds, calibrations, task_options, template_options, options,
        settings, prefix, results / f"{prefix}_results.json",
        tuple(dump / f"{prefix}_seed{seed}_predictions.jsonl" for seed in seeds),
    )  # fmt: skip


def _batches(options: EvaluationOptions) -> dict[str, Any]:
    """What is computed together, where scores depend on it: full experts drop tokens."""
    if options.moe_eval_capacity_token_fraction is None:
        return {}
    names = ("batch_size", "max_tokens", "distributed_world_size")
    return {name: getattr(options, name) for name in names}


def _shots_from(
    name: str, language: str | None, k: int, options: EvaluationOptions, said: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """The set and the language of shots; None without shots."""
    kind = task_type(name)
    train_set = said.get("train_set", options.any_train_set or kind.train_set)
    if k and train_set is None:
        raise ConfigError(
            f"{name} has no training set: say {flag_of(name, 'train_set')} SET_OR_FILE, or ask for"
            " 0 shots"
        )
    if train_set is not None and (k or "train_set" in said):
        _check_set(name, train_set)
    train_lang = None
    if kind.languages:
        train_lang = said.get("train_lang", options.any_train_lang or language)
        _check_language(name, kind, train_lang)
    else:
        for suffix in ("train_lang", "valid_lang"):
            if suffix in said:
                raise ConfigError(
                    f"{flag_of(name, suffix)}: {name} is in one language; leave it out"
                )
    return (train_set, train_lang) if k else (None, None)


def _counted(
    name: str, language: str | None, options: EvaluationOptions, said: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """The set and the language whose answers the majority is of; None where nobody says."""
    kind = task_type(name)
    valid_set = said.get("valid_set", options.any_valid_set)
    if valid_set is None:
        if "valid_lang" in said:
            raise ConfigError(
                f"{flag_of(name, 'valid_lang')}: say {flag_of(name, 'valid_set')} SET_OR_FILE, too"
            )
        return None, None
    if options.predictor_name not in ("majorityclass", "majority"):
        flag = flag_of(name, "valid_set") if "valid_set" in said else "--any-valid-set"
        raise ConfigError(f"{flag}: only --predictor-name majorityclass reads it; leave it out")
    _check_set(name, valid_set)
    if not kind.languages:
        return valid_set, None
    valid_lang = said.get("valid_lang", options.any_valid_lang or language)
    _check_language(name, kind, valid_lang)
    return valid_set, valid_lang


def _max_positions(options: EvaluationOptions) -> int | None:
    """`--max-positions`; 0 stands for `--max-tokens`."""
    if options.max_positions != 0:
        return options.max_positions
    if options.max_tokens is None:
        raise ConfigError("--max-positions 0 stands for --max-tokens: give that, too")
    return options.max_tokens


def _calibrations(name: str, options: EvaluationOptions, said: Mapping[str, Any]) -> Names:
    found = as_names(said.get("calibration_options", ()), f"{name}_calibration_options")
    if (found or options.calibrator_name) and task_type(name).kind != "choice":
        flag = flag_of(name, "calibration_options") if found else "--calibrator-name"
        raise ConfigError(
            f"{flag}: {name} has no candidates whose scores could be calibrated; leave it out"
        )
    if found and options.calibrator_name is None:
        raise ConfigError(
            f"{flag_of(name, 'calibration_options')}: say --calibrator-name"
            f" {calibration.AVERAGE_OPTION}, too"
        )
    if options.calibrator_name is not None and not found:
        raise ConfigError(
            f"--calibrator-name {options.calibrator_name}: {name} needs"
            f" {flag_of(name, 'calibration_options')}, for example 'question::'"
        )
    for option in found:
        calibration.replacements(option)
    return found


def _check_set(name: str, set_name: str) -> None:
    """Refuse what is neither a set nor looks like a file, which may be on another machine."""
    known = task_type(name).sets
    if set_name not in known and not {"/", "."} & set(set_name) and not Path(set_name).exists():
        raise ConfigError(
            f"{name}: no set and no file {set_name!r}; its sets are {', '.join(known) or 'none'}"
        )


def _check_language(name: str, kind: Any, language: str | None) -> None:
    if language not in kind.languages:
        raise ConfigError(f"{name}: no language {language!r}; it has {', '.join(kind.languages)}")


def _own(entry: Any, rest: Mapping[str, Any]) -> Any:
    """The configuration of a task or a template."""
    fields = {field.name for field in dataclasses.fields(entry.config)}
    values = dict(entry.overrides) | {
        key: coerce(entry.config, key, value, entry.name)
        for key, value in rest.items()
        if key in fields
    }
    for field in dataclasses.fields(entry.config):
        info = field.metadata.get("flag")
        allowed = None if info is None else info.choices
        if allowed and values.get(field.name, allowed[0]) not in allowed:
            raise ConfigError(
                f"--{field.name.replace('_', '-')} {values[field.name]}: expected one of"
                f" {', '.join(allowed)}"
            )
    return entry.config(**values)


def _all_used(
    rest: Mapping[str, Any], names: Iterable[str], per_task: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse options that nobody has."""
    entries = [TASKS.get(name) for name in names]
    entries += [
        TEMPLATES.get(template)
        for name in names
        for template in as_names(
            per_task.get(name, {}).get("template", task_type(name).template), "template"
        )
    ]
    known = {field.name for entry in entries for field in dataclasses.fields(entry.config)}
    for key in rest:
        if key not in known:
            everything = {
                *known, *LISTS, *(f.name for f in dataclasses.fields(EvaluationOptions)),
                *(f"{name}_{suffix}" for name in names for suffix in TASK_FLAGS),
            }  # fmt: skip
            like = difflib.get_close_matches(key, everything, n=1)
            hint = f"; did you mean --{like[0].replace('_', '-')}?" if like else ""
            raise ConfigError(
                f"--{key.replace('_', '-')}: no option of these tasks and templates{hint}"
            )


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def _part(kind: str, set_name: str | None, language: str | None) -> str | None:
    """A set's part of a file name; of a file its name."""
    if set_name is None:
        return None
    name = safe(Path(set_name).name) if "/" in set_name else safe(set_name)
    return ".".join(filter(None, [kind, name, language]))


def _shortened(prefix: str, code: str, most: int = 180) -> str:
    """A file name that systems take; the digest tells long ones apart."""
    return f"{prefix[:most]}_{code}"


def safe(text: str) -> str:
    """A name or path as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text.strip("/")).strip("._") or "model"


def _twice(paths: list[Path]) -> Path:
    return next(path for path in paths if paths.count(path) > 1)
