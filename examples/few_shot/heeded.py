"""What is said and does nothing: refused where no task heeds it, remarked where some do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from examples.few_shot.options import OF_SHOTS
from examples.few_shot.predictors.api import predictor_type
from examples.few_shot.settings import PlannedEvaluation, template_entry
from examples.few_shot.tasks.api import task_type
from fairseq_lite.errors import ConfigError

# Flags that only some kinds of tasks heed: the kinds, and what tells these from others.
_CHOOSES = (frozenset({"choice"}), "chooses among candidates")
_ASKS = (frozenset({"choice", "generation", "ranking"}), "puts questions")
_KINDS: Mapping[str, tuple[frozenset[str], str]] = {
    "scoring": _CHOOSES,
    "skip_context_scores": _CHOOSES,
    "add_calib_to_meta": _CHOOSES,
    "add_positional_scores_to_meta": _CHOOSES,
    "add_prompt_tokens_to_meta": _CHOOSES,
    "add_prompt_to_meta": _ASKS,
    "beam_size": (frozenset({"generation", "ranking"}), "writes answers or ranks words"),
    "train_sep": _ASKS,
    "truncate_few_shot_samples_globally": _ASKS,
}

# What a predictor that reads no prompts has no use for, besides templates and their options.
_OF_MODELS = (
    *_KINDS, "calibrator_name", "replace_newline_with_eos", "max_positions", "bf16", "fp16",
    "moe_eval_capacity_token_fraction", "num_training_updates", "batch_size", "max_tokens",
)  # fmt: skip

# Those of them that change no number: to say them is no contradiction.
_HARMLESS = {
    "add_calib_to_meta", "add_positional_scores_to_meta", "add_prompt_tokens_to_meta",
    "add_prompt_to_meta", "batch_size", "max_tokens",
}  # fmt: skip


def remarks(planned: Sequence[PlannedEvaluation], said: Mapping[str, Any]) -> list[str]:
    """Of what is said that which evaluations do not heed, a line each.

    Args:
        planned: all of a call.
        said: destinations of flags and their values, as they were typed.

    Raises:
        ConfigError: something that changes numbers, and those of no task.
    """
    _of_languages(planned, said)
    return [*_of_shots(planned, said), *_of_predictor(planned, said)]


def _of_predictor(planned: Sequence[PlannedEvaluation], said: Mapping[str, Any]) -> list[str]:
    options = planned[0].options
    given = {name for name in _OF_MODELS if _is_given(name, said.get(name))}
    if not predictor_type(options.predictor_name).reads_prompts:
        return list(_of_baseline(planned, said, given))
    return list(_of_kinds(planned, said, given))


def _of_languages(planned: Sequence[PlannedEvaluation], said: Mapping[str, Any]) -> None:
    """Refuse languages where no task has several."""
    if not any(task_type(each.task).languages for each in planned):
        for name in ("any_languages", "any_train_lang", "any_valid_lang"):
            if said.get(name) is not None:
                raise ConfigError(
                    f"{_shown(name, said)}: none of these tasks is in several languages; leave it"
                    " out"
                )
    if said.get("any_valid_lang") is not None and all(each.valid_set is None for each in planned):
        raise ConfigError(f"{_shown('any_valid_lang', said)}: say --any-valid-set, too")


def _of_shots(planned: Sequence[PlannedEvaluation], said: Mapping[str, Any]) -> Iterator[str]:
    """What is said of shots where there are none."""
    if any(each.k for each in planned):
        return
    names = [*OF_SHOTS, "num_trials", "any_train_set", "any_train_lang"]
    for task in dict.fromkeys(each.task for each in planned):
        names += [f"{task}_train_set", f"{task}_train_lang"]
    if given := [_shown(name, said) for name in names if said.get(name) not in (None, False)]:
        verb = "does" if len(given) == 1 else "do"
        yield f"{', '.join(given)}: {verb} nothing without shots, --nb-few-shot-samples-values 0"


def _is_given(name: str, value: Any) -> bool:
    """Whether a flag says something: one beam is what there is without --beam-size."""
    return value not in (None, False) and (name, value) != ("beam_size", 1)


def _of_kinds(
    planned: Sequence[PlannedEvaluation], said: Mapping[str, Any], given: set[str]
) -> Iterator[str]:
    names = list(dict.fromkeys(each.task for each in planned))
    for name, (kinds, what) in _KINDS.items():
        deaf = [task for task in names if task_type(task).kind not in kinds]
        if name not in given or not deaf:
            continue
        if len(deaf) == len(names) and name not in _HARMLESS:
            raise ConfigError(f"{_shown(name, said)}: none of these tasks {what}; leave it out")
        yield f"{_shown(name, said)}: does nothing for {_listed(deaf)}; it is for what {what}"
    if "add_calib_to_meta" in given and planned[0].options.calibrator_name is None:
        yield "--add-calib-to-meta: does nothing without --calibrator-name"


def _of_baseline(
    planned: Sequence[PlannedEvaluation], said: Mapping[str, Any], given: set[str]
) -> Iterator[str]:
    baseline = planned[0].options.predictor_name
    for name in dict.fromkeys((*sorted(given), *_of_templates(planned, said))):
        shown = _shown(name, said)
        if name not in _HARMLESS:
            raise ConfigError(f"{shown}: --predictor-name {baseline} reads no prompt; leave it out")
        yield f"{shown}: does nothing, --predictor-name {baseline} reads no prompt"


def _of_templates(planned: Sequence[PlannedEvaluation], said: Mapping[str, Any]) -> Iterator[str]:
    """What is said of templates: which, with which options, with what taken out."""
    for each in planned:
        suffixes = ("template", "templates", "calibration_options")
        yield from (key for suffix in suffixes if (key := f"{each.task}_{suffix}") in said)
        fields = dataclasses.fields(template_entry(each.task, each.template).config)
        yield from (field.name for field in fields if field.name in said)


def _shown(name: str, said: Mapping[str, Any]) -> str:
    value = said[name]
    flag = "--" + name.replace("_", "-")
    words = () if value is True else value if isinstance(value, (list, tuple)) else (value,)
    return " ".join([flag, *map(str, words)]).replace("\n", r"\n")


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
