"""HellaSwag: how a description of what people do goes on."""

from __future__ import annotations

from typing import Any

from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask


@TASKS.register("hellaswag")
class HellaSwag(FewShotTask):
    """HellaSwag (Zellers et al. 2019) in its own JSON lines; candidates are numbers of endings."""

    sets = {  # noqa: RUF012
        "train": "hellaswag/hellaswag_train.jsonl",
        "val": "hellaswag/hellaswag_val.jsonl",
        "test": "hellaswag/hellaswag_test.jsonl",
    }
    train_set = "train"
    template = "hellaswag"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        endings, label = row["endings"], row.get("label")
        # What follows is the beginning of a sentence that an ending goes on.
        begun = row.get("ctx_b", "").strip()
        context = row["ctx"]
        if begun:
            context = f"{row['ctx_a'].strip()} {begun[0].upper()}{begun[1:]}"
        data = {"activity_label": row["activity_label"], "ctx": context, "endings": endings}
        gold = None if label in (None, "") else int(label)
        return choice(data, [str(n) for n in range(len(endings))], gold, where)
