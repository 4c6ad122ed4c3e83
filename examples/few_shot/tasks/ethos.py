"""ETHOS: whether a comment is sexist, racist, … or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask

# The kinds of hate speech that ETHOS labels, as adjectives.
_KINDS = {
    "gender": "sexist",
    "race": "racist",
    "national_origin": "xenophobic",
    "disability": "ableist",
    "religion": "hostile to a religion",
    "sexual_orientation": "homophobic",
}


@TASKS.register("ethoszeroshot")
class EthosZeroShot(FewShotTask):
    """Hate speech by question and answer, without shots (Chiu and Alexander 2021, section 3).

    `zero_shot` is that paper's selection of comments, zero_shot_results.csv; where it is not there,
    all comments of ETHOS (Mollas et al. 2020), asked whether they are hateful. `multi_label` asks
    for every hateful comment whether it is sexist, racist and so on. A label counts from one half.
    """

    sets = {  # noqa: RUF012
        "zero_shot": ("Ethos/outputs/data/zero_shot_results.csv", "ethos/zero_shot_results.csv",
                      "ethos/Ethos_Dataset_Binary.csv"),
        "multi_label": "ethos/Ethos_Dataset_Multi_Label.csv",
    }  # fmt: skip
    eval_set = "zero_shot"
    max_shots = 0
    template = "ethoszeroshot"
    metrics = ("accuracy", "accuracy_by_category")

    def rows(self, path: Path) -> Iterator[files.Row]:
        if path.name.startswith("Ethos_Dataset"):
            for row, where in files.read_csv(path, delimiter=";"):
                asked = {"isHate": "hateful"} if "isHate" in row else _KINDS
                for field, category in asked.items():
                    yield row | {"category": category, "degree": row.get(field)}, where
        else:
            yield from files.read_csv(path)

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if "comment" in row:
            text, so = row["comment"], float(row["degree"]) >= 0.5
        elif float(row["temperature"]) == 0:
            # The comment stands between the outermost quotation marks of the paper's prompt.
            text = re.search(r'"(.*)"', row["prompt"], re.DOTALL)[1]  # type: ignore[index]
            so = row["label"] == row["category"]
        else:  # sampled answers of the paper's model to the same questions
            return None
        data = {"text": text.strip(), "category": row["category"]}
        return choice(data, ("yes", "no"), 0 if so else 1, where)
