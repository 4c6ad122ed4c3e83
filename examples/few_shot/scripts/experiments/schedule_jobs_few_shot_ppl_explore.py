#!/usr/bin/env python3
"""How the choice of an answer depends on what is made of the scores of its tokens.

python examples/few_shot/scripts/experiments/schedule_jobs_few_shot_ppl_explore.py \
        -t scorings -m 125M_gpt3_setting -o few_shot_results/scorings --local --dry-run
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from examples.few_shot.scoring import SCORINGS
from examples.few_shot.scripts.experiments.schedule_jobs_few_shot import (
    TaskSettings,
    default_model_run_groups,
    default_model_settings,
    default_task_run_groups,
    default_tasks_settings,
    schedule_command,
)

available_model_settings = default_model_settings.copy()
model_run_groups = default_model_run_groups.copy()

# Tasks whose candidates differ in length, so that scorings disagree.
_TASKS = ["arceasy", "arcchallenge", "copa", "hellaswag", "openbookqa", "piqa"]
# Tasks with a common text behind the candidates, which `suffix` scores.
_MASK_INSIDE = ["winograd", "winogrande"]

available_tasks_settings = default_tasks_settings.copy()
available_tasks_settings.update(
    {
        f"{task}_{scoring}": TaskSettings(task, [task], {"scoring": scoring})
        for task in (*_TASKS, *_MASK_INSIDE)
        for scoring in SCORINGS
        if scoring != "suffix" or task in _MASK_INSIDE
    }
)

task_run_groups = default_task_run_groups.copy()
task_run_groups.update(
    {
        scoring: [key for key in available_tasks_settings if key.endswith(f"_{scoring}")]
        for scoring in SCORINGS
    }
)
task_run_groups["scorings"] = [key for scoring in SCORINGS for key in task_run_groups[scoring]]
task_run_groups["all"] = task_run_groups["scorings"]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and schedule; returns the exit status."""
    return schedule_command(
        "Experiments with metrics that are made of perplexities.",
        task_run_groups,
        available_tasks_settings,
        model_run_groups,
        available_model_settings,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
