#!/usr/bin/env python3
"""What chance and the most frequent answer reach on tasks with choices.

python examples/few_shot/scripts/experiments/schedule_jobs_few_shot_baselines_random.py \
        -t all -m baselines -o few_shot_results/baselines --local --dry-run
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from examples.few_shot.scripts.experiments.schedule_jobs_few_shot import (
    TaskSettings,
    default_model_settings,
    default_task_run_groups,
    default_tasks_settings,
    schedule_command,
)
from examples.few_shot.tasks.api import task_type

available_model_settings = {key: default_model_settings[key] for key in ("random", "majority")}
model_run_groups = {"baselines": ["random", "majority"], "all": ["random", "majority"]}

# Baselines choose; they write no text and rank no vocabulary.
_CHOICE = [name for name in default_task_run_groups["all"] if task_type(name).kind == "choice"]
# Neither reads shots.
_NO_SHOTS = {"nb_few_shot_samples_values": [0]}

available_tasks_settings = default_tasks_settings.copy()
available_tasks_settings.update({name: TaskSettings(name, [name], _NO_SHOTS) for name in _CHOICE})

task_run_groups = {"all": _CHOICE, "rai": default_task_run_groups["rai"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and schedule; returns the exit status."""
    return schedule_command(
        "Baselines that ask no model.",
        task_run_groups,
        available_tasks_settings,
        model_run_groups,
        available_model_settings,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
