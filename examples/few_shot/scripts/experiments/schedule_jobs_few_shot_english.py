#!/usr/bin/env python3
"""Few-shot evaluation of English tasks: reading, commonsense, science, grammar, running text.

python examples/few_shot/scripts/experiments/schedule_jobs_few_shot_english.py \
        -t default -m gpt3_setting --nshot 0 32 -o few_shot_results/english --local --dry-run
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
from examples.few_shot.tasks.api import task_type

available_model_settings = default_model_settings.copy()
model_run_groups = default_model_run_groups.copy()

# A few samples of everything, to see that models, tasks and data work together.
_FEW = {"n_eval_samples": 5}
_NO_SHOTS = {"nb_few_shot_samples_values": [0]}
# English parts of tasks in several languages.
_ENGLISH = {
    "storycloze": {"storycloze_languages": ["en"]},
    "xwinograd": {"xwinograd_languages": ["en"]},
    "mlama": {"mlama_googlere_languages": ["en"], "mlama_trex_languages": ["en"]},
}
_CHOICE = [
    "agnews", "anlir1", "anlir2", "anlir3", "arcchallenge", "arceasy", "blimp", "boolq", "cb",
    "commonsenseqa", "copa", "hellaswag", "mnlimatched", "mnlimismatched", "multirc", "openbookqa",
    "piqa", "record", "rte", "snli", "sst2", "storycloze", "wic", "winograd", "winogrande", "wsc",
]  # fmt: skip

available_tasks_settings = default_tasks_settings.copy()
available_tasks_settings.update(
    {
        "storycloze": TaskSettings("storycloze", ["storycloze"], _ENGLISH["storycloze"]),
        "xwinograd": TaskSettings("xwinograd", ["xwinograd"], _ENGLISH["xwinograd"]),
        "test_multichoice": TaskSettings(
            "test_multichoice", _CHOICE, {**_FEW, **_ENGLISH["storycloze"]}
        ),
        "test_lama": TaskSettings(
            "test_lama", ["lama"], {**_FEW, "nb_few_shot_samples_values": [0]}
        ),
        "test_mlama": TaskSettings(
            "test_mlama",
            ["mlama"],
            {**_FEW, **_NO_SHOTS, **_ENGLISH["mlama"], "max_cands": 2},
        ),
        "diagnosis": TaskSettings("diagnosis", ["diagnosis"], _FEW),
    }
)

_COMMONSENSE = ["copa", "hellaswag", "piqa", "storycloze", "winograd", "winogrande"]
_SUPERGLUE = ["boolq", "cb", "multirc", "record", "rte", "wic", "wsc"]
_SCIENCE = ["arceasy", "arcchallenge", "openbookqa", "commonsenseqa"]

task_run_groups = default_task_run_groups.copy()
task_run_groups.update(
    {
        "all": [
            name
            for name in default_task_run_groups["all"]
            if not task_type(name).languages or name in _ENGLISH
        ],
        "default": ["blimp", *_SUPERGLUE, *_COMMONSENSE, *_SCIENCE],
        # What follows is likely or not: tasks that a language model does as it was trained.
        "lm": ["blimp", "hellaswag", "lambada", "storycloze", "winograd", "winogrande"],
        "superglue": _SUPERGLUE,
        "commonsense": _COMMONSENSE,
        "science": _SCIENCE,
        # Those that grow steadily with models, so that small ones tell something of large ones.
        "good_correlation": [
            "arceasy", "hellaswag", "lambada", "openbookqa", "piqa", "storycloze", "winogrande",
        ],
        "test_tasks": ["test_multichoice", "test_lama", "test_mlama", "diagnosis"],
    }
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and schedule; returns the exit status."""
    return schedule_command(
        "Few-shot evaluation of English tasks.",
        task_run_groups,
        available_tasks_settings,
        model_run_groups,
        available_model_settings,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
