"""COPA: which of two sentences is the cause, or the effect, of a third."""

from __future__ import annotations

from typing import Any

from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask


@TASKS.register("copa")
class COPA(FewShotTask):
    """Choice of plausible alternatives (Roemmele et al. 2011), in SuperGLUE's JSON lines."""

    sets = {  # noqa: RUF012
        "train": ("COPA/train.jsonl", "copa/train.jsonl"),
        "val": ("COPA/val.jsonl", "copa/val.jsonl"),
        "test": ("COPA/test.jsonl", "copa/test.jsonl"),
    }
    train_set = "train"
    template = "copa"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        return choice(row, (row["choice1"], row["choice2"]), row.get("label"), where)
