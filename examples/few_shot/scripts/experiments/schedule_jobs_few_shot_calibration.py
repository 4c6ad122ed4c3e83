#!/usr/bin/env python3
"""Tasks with scores calibrated by copies without content, beside those without calibration.

python examples/few_shot/scripts/experiments/schedule_jobs_few_shot_calibration.py \
        -t copa_vs_calib -m 125M_gpt3_setting -o few_shot_results/calibration --local --dry-run
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

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

# Of each task the fields that are emptied: what is left of a prompt says how likely an answer is
# whatever the question.
_CONTENT = {
    "copa": ["premise::"],
    "xcopa": ["premise::"],
    "boolq": ["passage:: | question::"],
    "rte": ["premise:: | hypothesis::"],
    "cb": ["premise:: | hypothesis::"],
    "snli": ["premise:: | hypothesis::"],
    "mnlimatched": ["premise:: | hypothesis::"],
    "mnlimismatched": ["premise:: | hypothesis::"],
    "anlir1": ["premise:: | hypothesis::"],
    "anlir2": ["premise:: | hypothesis::"],
    "anlir3": ["premise:: | hypothesis::"],
    "xnli": ["premise:: | hypothesis::"],
    "pawsx": ["sentence1:: | sentence2::"],
    "multirc": ["paragraph:: | question::"],
    "arceasy": ["question::"],
    "arcchallenge": ["question::"],
    "openbookqa": ["question::"],
    "commonsenseqa": ["question::"],
    "exams": ["question::"],
}


def _calibrated(task: str) -> TaskSettings:
    params = {"calibrator_name": "average_option", f"{task}_calibration_options": _CONTENT[task]}
    return TaskSettings(task, [task], params)


available_tasks_settings = default_tasks_settings.copy()
available_tasks_settings.update({f"{task}_calib": _calibrated(task) for task in _CONTENT})

task_run_groups = default_task_run_groups.copy()
task_run_groups.update({f"{task}_vs_calib": [task, f"{task}_calib"] for task in _CONTENT})
task_run_groups.update(
    {
        "without_calibration": list(_CONTENT),
        "calibration": [f"{task}_calib" for task in _CONTENT],
        "all": [key for task in _CONTENT for key in (task, f"{task}_calib")],
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and schedule; returns the exit status."""
    return schedule_command(
        "Few-shot evaluation with calibrated scores.",
        task_run_groups,
        available_tasks_settings,
        model_run_groups,
        available_model_settings,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
