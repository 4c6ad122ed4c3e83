"""The flags of an evaluation: those for all tasks, and those of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from examples.few_shot.predictors.api import PREDICTORS
from examples.few_shot.scoring import SCORINGS
from examples.few_shot.tasks.api import TASKS
from fairseq_lite.config.flags import default_of, flag
from fairseq_lite.errors import ConfigError


@dataclass(frozen=True)
class EvaluationOptions:
    """The flags of `gpt3_eval` that hold for all tasks."""

    predictor_name: str = flag("clmprompting", "who answers")
    calibrator_name: str | None = flag(
        None, "calibrate scores by copies without content", choices=("average_option",)
    )
    data_dir: str | None = flag(None, "the folder of the tasks' files (default: $FSD)")
    results_dir: str | None = flag(None, "where results go (default: few_shot_MODEL_results)")
    predictions_dump_dir: str | None = flag(
        None, "where predictions go (default: beside the results)"
    )
    add_prompt_to_meta: bool = flag(False, "keep prompts in the predictions")
    add_calib_to_meta: bool = flag(False, "keep the scores of every calibration option")
    add_positional_scores_to_meta: bool = flag(
        False, "keep the scores of whole prompts by token, and of answers without a prompt"
    )
    add_prompt_tokens_to_meta: bool = flag(False, "keep the tokens of prompts")
    scoring: str = flag("sum", "from scores of tokens to that of a candidate", choices=SCORINGS)
    n_eval_samples: int | None = flag(
        None, "evaluate the first N samples; 0 for all", aliases=("--n",)
    )
    confusion_matrix: bool = flag(False, "print which answers were given for which, in percent")
    batch_size: int | None = flag(None, "no more prompts at a time; results do not depend on it")
    uniform_sampling: bool = flag(
        False, "as many shots of each class: of each answer, or of each place of the right one"
    )
    beam_size: int = flag(
        1, "of written answers; from 2 on also the tokens that a ranking lists, otherwise 10"
    )
    num_trials: int = flag(5, "trials with other shots, where there are shots")
    seed: int = flag(0, "of all draws, with the number of the trial; files count trials from it on")
    moe_eval_capacity_token_fraction: float | None = flag(
        None, "an expert's capacity, as a part of the tokens; default: no token is dropped",
        aliases=("--cap",),
    )  # fmt: skip
    truncate_few_shot_samples_globally: bool = flag(
        False, "as many shots for all samples as fit the longest"
    )
    max_positions: int | None = flag(
        None, "tokens of a prompt with its answer (default: the model's; 0: --max-tokens)"
    )
    num_training_updates: int = flag(-1, "take the checkpoint of this update")
    no_shuffle_examples: bool = flag(False, "shots stand in the order of their file")
    allow_test_shots: bool = flag(False, "a sample may be among its own shots")
    replace_newline_with_eos: bool = flag(
        False, "every line break is the end symbol; empty lines go"
    )
    train_sep: str = flag(" ", r"between shots; \n for a line break")
    skip_completed: bool = flag(False, "leave out evaluations that have complete results")
    override_completed: bool = flag(False, "predict anew what is there already")
    recalc_metrics_from_predictions: bool = flag(
        False, "compute metrics of finished evaluations anew from their predictions"
    )
    any_train_set: str | None = flag(None, "where shots come from, for tasks that do not say")
    any_valid_set: str | None = flag(None, "as --TASK-valid-set, for tasks that do not say")
    any_train_lang: str | None = flag(None, "the language of shots, for tasks that do not say")
    any_valid_lang: str | None = flag(None, "as --TASK-valid-lang, for tasks that do not say")
    max_tokens: int | None = flag(
        None, "tokens computed at a time, padding included (default: chosen by the model)"
    )
    compute_vocab_dist: bool = flag(False, "LAMA: rank the answer in the vocabulary (always done)")
    skip_context_scores: bool = flag(
        False, "do not score the tokens of prompts: faster; perplexities of whole prompts are left"
        " out and sum begins where candidates differ",
    )  # fmt: skip
    fsdp: bool = flag(False, "not built: experts are spread over the processes without it")
    fp16: bool = flag(False, "compute in float16 (CUDA)")
    bf16: bool = flag(False, "compute in bfloat16")
    cpu: bool = flag(False, "use no GPU")
    distributed_world_size: int | None = flag(
        None, "processes (default: one, or those that torchrun or Slurm started)"
    )
    distributed_port: int | None = flag(None, "where they meet, under Slurm only")
    user_dir: str | None = flag(None, "a folder of plugins: architectures, tasks, templates")
    debug: bool = flag(False, "show tracebacks of users' errors, too")

    def __post_init__(self) -> None:
        for name, least in (
            ("num_trials", 1),
            ("beam_size", 1),
            ("n_eval_samples", 0),
            ("max_positions", 0),
            ("max_tokens", 1),
            ("batch_size", 1),
            ("distributed_world_size", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                flag_name = name.replace("_", "-")
                raise ConfigError(f"--{flag_name} {value}: expected {least} or more")
        for one, other in (
            ("fp16", "bf16"),
            ("skip_completed", "override_completed"),
            ("recalc_metrics_from_predictions", "override_completed"),
        ):
            if getattr(self, one) and getattr(self, other):
                names = (f"--{name.replace('_', '-')}" for name in (one, other))
                raise ConfigError(f"{' '.join(names)}: choose one")
        if self.fsdp:
            raise ConfigError(
                "--fsdp: every process has all weights of a dense model, and of a mixture of"
                " experts its share of them without being told; leave it out, --bf16 halves what"
                " they take"
            )
        if self.predictor_name not in PREDICTORS:
            PREDICTORS.get(self.predictor_name)

    @property
    def separator(self) -> str:
        """Between shots."""
        return self.train_sep.replace("\\n", "\n").replace("\\t", "\t")


# What changes no number, or is part of an evaluation's own settings.
NO_SETTING = {
    "data_dir", "results_dir", "predictions_dump_dir", "add_prompt_to_meta", "add_calib_to_meta",
    "add_positional_scores_to_meta", "add_prompt_tokens_to_meta", "confusion_matrix", "batch_size",
    "max_tokens", "skip_completed", "override_completed", "recalc_metrics_from_predictions",
    "any_train_set", "any_valid_set", "any_train_lang", "any_valid_lang", "distributed_world_size",
    "fsdp", "cpu", "distributed_port", "user_dir", "debug", "compute_vocab_dist",
    "num_trials", "seed",
}  # fmt: skip

# What evaluations without shots do not heed: off in their settings, whatever is said.
OF_SHOTS = (
    "uniform_sampling", "no_shuffle_examples", "allow_test_shots",
    "truncate_few_shot_samples_globally",
)  # fmt: skip

LISTS = ("tasks", "nb_few_shot_samples_values", "any_eval_set", "any_languages")
DEFAULT_SHOTS = (0, 1, 32)

# Of each task: suffix of the flag, whether it takes several values, what it says.
TASK_FLAGS: Mapping[str, tuple[bool, str]] = {
    "template": (True, "templates, each an evaluation"),
    "train_set": (False, "where shots come from: a set or a file"),
    "valid_set": (False, "whose answers --predictor-name majorityclass counts: a set or a file"),
    "eval_set": (True, "what is evaluated: sets or files, each an evaluation"),
    "calibration_options": (True, "see --calibrator-name: field::value, several between bars"),
    "languages": (True, "languages, each an evaluation"),
    "train_lang": (False, "the language of shots"),
    "valid_lang": (False, "the language of --valid-set"),
}


def flag_of(task: str, suffix: str) -> str:
    """The flag of a task."""
    return "--" + f"{task}_{suffix}".replace("_", "-")


# Other spellings of the suffixes, as in the scripts and documents of the original.
_ALIASES = {"language": "languages", "templates": "template", "eval_sets": "eval_set"}


def flag_owner(key: str) -> tuple[str, str] | None:
    """The task and the suffix of a task's flag, as in `TASK_FLAGS`; None for another's."""
    for suffix in sorted({*TASK_FLAGS, *_ALIASES}, key=len, reverse=True):
        if key.endswith("_" + suffix):
            name = key[: -len(suffix) - 1]
            if name in TASKS:
                return name, _ALIASES.get(suffix, suffix)
    return None


def default_options() -> dict[str, Any]:
    """Every flag for all tasks with its default."""
    return {f.name: default_of(f) for f in dataclasses.fields(EvaluationOptions)}
