#!/usr/bin/env python3
"""Schedule few-shot jobs.

python examples/few_shot/scripts/experiments/schedule_jobs_few_shot.py \
        -t copa boolq rte -m 125M_gpt3_setting --nshot 0 32 -o few_shot_results --local --dry-run

The other scripts of this folder build on the settings of this one: see ../../docs/SCHEDULING.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from examples.few_shot.builtins import load_builtins
from examples.few_shot.scheduling.arguments import arg_modify_default, get_argparser
from examples.few_shot.scheduling.schedule import (
    exit_status,
    run_script,
    schedule_command,
    schedule_experiment_jobs,
)
from examples.few_shot.scheduling.settings import ModelSettings, TaskSettings
from examples.few_shot.tasks.api import GROUPS, TASKS, task_type

__all__ = [
    "ModelSettings", "TaskSettings", "arg_modify_default", "default_model_run_groups",
    "default_model_settings", "default_task_run_groups", "default_tasks_settings", "exit_status",
    "get_argparser", "run_script", "schedule_command",
    "schedule_experiment_jobs",
]  # fmt: skip


def _no_gpu(model_name: str, predictor: str) -> ModelSettings:
    params = {"predictor_name": predictor}
    return ModelSettings(model_name, {}, params, gpus_per_node=0, cpus_per_task=1)


def _dense(model_name: str, gpus: int) -> ModelSettings:
    return ModelSettings(model_name, {}, {}, nodes=1, gpus_per_node=gpus)


def _experts(model_name: str, nodes: int) -> ModelSettings:
    return ModelSettings(model_name, {}, {}, nodes=nodes, gpus_per_node=8)


# The first field is a name of model_configs.py; the key here names folders and jobs.
default_model_settings = {
    "random": _no_gpu("random", "random"),
    "majority": _no_gpu("majority", "majorityclass"),
    "dummy": _no_gpu("dummy", "dummy"),
    "125M_gpt3_setting": _dense("125M_gpt3_setting", 1),
    "355M_gpt3_setting": _dense("355M_gpt3_setting", 1),
    "1.3B_gpt3_setting": _dense("1.3B_gpt3_setting", 2),
    "2.7B_gpt3_setting": _dense("2.7B_gpt3_setting", 1),
    "6.7B_gpt3_setting": _dense("6.7B_gpt3_setting", 2),
    "6.7B_gpt3_setting_1024ctx": _dense("6.7B_gpt3_setting_1024ctx", 2),
    "13B_gpt3_setting": _dense("13B_gpt3_setting", 4),
    "moe_15B": _experts("moe_15B", 1),
    "moe_52B": _experts("moe_52B", 2),
    "moe_207B": _experts("moe_207B", 16),
    "moe_523B": _experts("moe_523B", 16),
    "moe_1.1T": _experts("moe_1.1T", 32),
    "xglm_564M": _dense("xglm_564M", 1),
    "xglm_1.7B": _dense("xglm_1.7B", 1),
    "xglm_2.9B": _dense("xglm_2.9B", 1),
    "xglm_4.5B": _dense("xglm_4.5B", 1),
    "xglm_7.5B": _dense("xglm_7.5B", 2),
    "dense_lang16": _dense("dense_lang16", 1),
    "moe_128exp_lang16": _experts("moe_128exp_lang16", 2),
    "tiny_125m": _dense("tiny_125m", 1),
    "tiny_moe": _dense("tiny_moe", 1),
    "tiny_multi_moe": _dense("tiny_multi_moe", 1),
}

_GPT3 = [key for key in default_model_settings if key.endswith("_gpt3_setting")]
_MOE = ["moe_15B", "moe_52B", "moe_207B", "moe_523B", "moe_1.1T"]

default_model_run_groups = {
    "all": [*_GPT3, *_MOE],
    "gpt3_setting": _GPT3,
    "moe": _MOE,
    "multilingual": [key for key in default_model_settings if key.startswith("xglm_")],
    "baselines": ["random", "majority"],
}


def _registered() -> dict[str, TaskSettings]:
    """A setting for every task, and for every group of tasks, of its own name."""
    load_builtins()
    found = {}
    for name in (*TASKS.names(), *GROUPS):
        kinds = [task_type(task) for task in GROUPS.get(name, (name,))]
        # Tasks that take no shots, or have none, are evaluated without whatever --nshot says.
        bare = all(kind.max_shots == 0 or kind.train_set is None for kind in kinds)
        params = {"nb_few_shot_samples_values": [0]} if bare else {}
        found[name] = TaskSettings(name, (name,), params)
    return found


default_tasks_settings = _registered()

default_task_run_groups = {
    # Every task but those that are told what to read (`--perplexity-eval-set FILE`).
    "all": [name for name in TASKS.names() if task_type(name).eval_set is not None],
    "rai": ["stereoset", "crowspairs", "ethoszeroshot"],
    # Quick to do and sure to move: for checkpoints of a model that is still in training.
    "intermediate_eval_v1": [
        "arceasy", "boolq", "cb", "copa", "hellaswag", "openbookqa", "piqa", "rte", "winogrande",
    ],
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and schedule; returns the exit status."""
    return schedule_command(
        "Schedule few-shot jobs.",
        default_task_run_groups,
        default_tasks_settings,
        default_model_run_groups,
        default_model_settings,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
