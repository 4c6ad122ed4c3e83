#!/usr/bin/env python3
"""Few-shot evaluation of tasks in several languages.

python examples/few_shot/scripts/experiments/schedule_jobs_few_shot_multilingual.py \
        -t pawsx_default_vs_gt_calib -m dense_vs_moe_lang16 --nshot 0 --local --dry-run
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from examples.few_shot.scripts.experiments.schedule_jobs_few_shot import (
    ModelSettings,
    TaskSettings,
    default_model_run_groups,
    default_model_settings,
    default_task_run_groups,
    default_tasks_settings,
    schedule_command,
)

available_model_settings = default_model_settings.copy()
available_model_settings.update(
    {
        "dense_lang16": ModelSettings("dense_lang16", {}, {"train_sep": "\n"}, 1, 1, 1, 8, 3),
        "moe_128exp_lang16": ModelSettings(
            "moe_128exp_lang16", {}, {"train_sep": "\n"}, 2, 8, 1, 8, 3
        ),
    }
)

model_run_groups = default_model_run_groups.copy()
model_run_groups.update({"dense_vs_moe_lang16": ["dense_lang16", "moe_128exp_lang16"]})

_WITHOUT_SENTENCES = {
    "calibrator_name": "average_option",
    "pawsx_calibration_options": ["sentence1:: | sentence2::"],
}
_WITHOUT_PREMISE = {
    "calibrator_name": "average_option",
    "xcopa_calibration_options": ["premise::"],
}
# The validation set is there in all languages, once it is parted.
_STORIES = {
    "storycloze_train_set": "val2016_split_20_80_train",
    "storycloze_eval_set": ["val2016_split_20_80_eval"],
}

available_tasks_settings = default_tasks_settings.copy()
available_tasks_settings.update(
    {
        "xcopa_mt": TaskSettings("xcopa", ["xcopa"], {"xcopa_template": ["xcopa_mt"]}),
        "xcopa_calib": TaskSettings("xcopa", ["xcopa"], _WITHOUT_PREMISE),
        "xcopa_english_template": TaskSettings(
            "xcopa", ["xcopa"], {"xcopa_template": ["xcopa__en"]}
        ),
        "xnli_mt": TaskSettings("xnli", ["xnli"], {"xnli_template": ["xnli_mt"]}),
        "xnli_english_template": TaskSettings("xnli", ["xnli"], {"xnli_template": ["xnli__en"]}),
        "xnli_english_shots": TaskSettings(
            "xnli_english_shots",
            ["xnli"],
            {"xnli_template": ["xnli__en"], "xnli_train_lang": "en"},
        ),
        "pawsx_default": TaskSettings("pawsx", ["pawsx"], {"pawsx_template": ["pawsx_default"]}),
        "pawsx_default_calib": TaskSettings(
            "pawsx", ["pawsx"], {"pawsx_template": ["pawsx_default"], **_WITHOUT_SENTENCES}
        ),
        "pawsx_googletranslate": TaskSettings(
            "pawsx", ["pawsx"], {"pawsx_template": ["pawsx_googletranslate"]}
        ),
        "pawsx_googletranslate_calib": TaskSettings(
            "pawsx", ["pawsx"], {"pawsx_template": ["pawsx_googletranslate"], **_WITHOUT_SENTENCES}
        ),
        "xstorycloze": TaskSettings("xstorycloze", ["storycloze"], _STORIES),
    }
)

task_run_groups = default_task_run_groups.copy()
task_run_groups.update(
    {
        "multilingual_multichoice": ["xcopa", "xnli", "exams", "pawsx"],
        "commonsense": ["xcopa", "xstorycloze", "xwinograd"],
        "translation": [
            "wmt14fren",
            "wmt14enfr",
            "wmt16deen",
            "wmt16ende",
            "wmt16roen",
            "wmt16enro",
        ],
        "pawsx_default_vs_gt_calib": ["pawsx_default_calib", "pawsx_googletranslate_calib"],
    }
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and schedule; returns the exit status."""
    return schedule_command(
        "Few-shot evaluation of tasks in several languages.",
        task_run_groups,
        available_tasks_settings,
        model_run_groups,
        available_model_settings,
        argv,
        defaults={
            "output": "few_shot_results/multilingual",
            "scoring": "mean",
            "nb_few_shot_samples_values": [0, 32],
            "num_trials": 10,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
