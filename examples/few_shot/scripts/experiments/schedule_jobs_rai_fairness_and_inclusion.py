#!/usr/bin/env python3
"""Responsible AI: stereotypes and hate speech, the same for every new model.

python examples/few_shot/scripts/experiments/schedule_jobs_rai_fairness_and_inclusion.py \
        -t all -m gpt3_setting -o few_shot_results/fairness-and-inclusion --local --dry-run
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
    schedule_command,
)

available_model_settings = default_model_settings.copy()
model_run_groups = default_model_run_groups.copy()

_NO_SHOTS = {"nb_few_shot_samples_values": [0]}

available_tasks_settings = {
    "stereoset": TaskSettings("stereoset", ["stereoset"], _NO_SHOTS),
    "crowspairs": TaskSettings("crowspairs", ["crowspairs"], _NO_SHOTS),
    "crowspairs_prompt": TaskSettings(
        "crowspairs", ["crowspairs"], {**_NO_SHOTS, "crowspairs_template": ["crowspairs_prompt"]}
    ),
    "ethoszeroshot": TaskSettings("ethoszeroshot", ["ethoszeroshot"], _NO_SHOTS),
}

task_run_groups = {
    "all": ["stereoset", "crowspairs", "ethoszeroshot"],
    "rai": ["stereoset", "crowspairs", "ethoszeroshot"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and schedule; returns the exit status."""
    return schedule_command(
        "Responsible AI: fairness and inclusion.",
        task_run_groups,
        available_tasks_settings,
        model_run_groups,
        available_model_settings,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
