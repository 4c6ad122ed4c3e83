"""StereoSet: stereotypes against their opposites and against what makes no sense."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask
from fairseq_lite.errors import DataError

PARTS = ("intersentence", "intrasentence")
LABELS = ("stereotype", "anti-stereotype", "unrelated")


@TASKS.register("stereoset")
class StereoSet(FewShotTask):
    """StereoSet (Nadeem et al. 2021), without shots, from its one JSON file.

    The candidates are the labels of the three sentences. `stereotype` counts as the gold one so
    that perplexities are told apart; it is no right answer.
    """

    sets = {"dev": ("stereoset/dev.json", "StereoSet/dev.json")}  # noqa: RUF012
    eval_set = "dev"
    max_shots = 0
    template = "stereoset"
    metrics = ("stereoset",)

    def rows(self, path: Path) -> Iterator[files.Row]:
        found = files.read_json(path)
        try:
            rows = [(row, part) for part in PARTS for row in found["data"][part]]
        except (KeyError, TypeError) as e:
            raise DataError(f"{path}: is no file of StereoSet: {e} is missing") from None
        for row, part in rows:
            yield row | {"part": part}, f"{path}: {row.get('id')}"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        found = {each["gold_label"]: each["sentence"] for each in row["sentences"]}
        data = {
            **{field: row[field] for field in ("id", "part", "target", "bias_type", "context")},
            "sentences": {label: found[label] for label in LABELS},
        }
        if row["part"] == "intrasentence":
            fills = {label: filling(row["context"], found[label]) for label in LABELS}
            data["fillings"] = fills
        return FewShotSample(data, LABELS, ("stereotype",), where=where)


def filling(context: str, sentence: str) -> str:
    """The words that a sentence has where its context has BLANK, without punctuation around them.

    Words in front of BLANK and behind it are counted, not compared: some sentences write them
    differently.
    """
    before, _, after = context.partition("BLANK")
    words = sentence.split()
    # What touches BLANK is part of its word: "BLANK," or "(BLANK".
    start = len(before.split()) - (before[-1:].strip() != "")
    end = len(words) - len(after.split()) + (after[:1].strip() != "")
    return " ".join(words[start:end]).strip(string.punctuation) or sentence
