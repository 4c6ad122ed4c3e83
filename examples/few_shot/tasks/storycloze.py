"""StoryCloze: which sentence ends a story of four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask

# How the English files are called where they come from.
_ENGLISH = {
    "val2016": (
        "storycloze/spring2016.val.tsv",
        "storycloze/cloze_test_val__spring2016 - cloze_test_ALL_val.csv",
    ),
    "test2016": (
        "storycloze/spring2016.test.tsv",
        "storycloze/cloze_test_test__spring2016 - cloze_test_ALL_test.csv",
    ),
}


def _split(part: str) -> tuple[str, ...]:
    file = f"spring2016.val.{{lang}}.tsv.split_20_80_{part}.tsv"
    return (f"storycloze/{file}", f"xstorycloze/{file}")


@TASKS.register("storycloze")
class StoryCloze(FewShotTask):
    """StoryCloze (Mostafazadeh et al. 2016) and its translations, XStoryCloze (Lin et al. 2021).

    Only the sets `val2016_split_20_80_train` and `…_eval`, 20 and 80 percent of the validation set,
    exist in all languages. The candidates are the numbers of the two endings.
    """

    sets = {  # noqa: RUF012
        "val2016": "storycloze/spring2016.val.{lang}.tsv",
        "test2016": "storycloze/spring2016.test.{lang}.tsv",
        "val2016_split_20_80_train": _split("train"),
        "val2016_split_20_80_eval": _split("eval"),
    }
    train_set, eval_set = "val2016", "test2016"
    languages = ("en", "ru", "zh", "es", "ar", "hi", "id", "te", "sw", "eu", "my")
    template = "storycloze"

    def path(self, set_name: str) -> Path:
        if self.language == "en" and set_name in _ENGLISH:
            own = str(self.sets[set_name]).replace("{lang}", "en")
            return files.existing(self.name, self.data_dir, (own, *_ENGLISH[set_name]))
        return super().path(set_name)

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        label = row.get("AnswerRightEnding")
        return choice(row, ("1", "2"), int(label) - 1 if label else None, where)
