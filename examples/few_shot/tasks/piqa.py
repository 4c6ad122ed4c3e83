"""PIQA: which of two ways leads to a goal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask
from fairseq_lite.errors import DataError


@TASKS.register("piqa")
class PIQA(FewShotTask):
    """Physical interaction QA (Bisk et al. 2020): goals in X.jsonl, answers in X-labels.lst."""

    sets = {  # noqa: RUF012
        "train": ("piqa/train.jsonl", "physicaliqa-train-dev/train.jsonl"),
        "valid": ("piqa/valid.jsonl", "physicaliqa-train-dev/dev.jsonl"),
        "test": ("piqa/tests.jsonl", "piqa/test.jsonl"),
    }
    train_set, eval_set = "train", "valid"
    template = "piqa"

    def beside(self, path: Path) -> Iterable[Path]:
        """The answers; those of the test set are not public."""
        labels = path.with_name(path.name.partition(".jsonl")[0] + "-labels.lst")
        return () if path.name.startswith("test") and not labels.exists() else (labels,)

    def rows(self, path: Path) -> Iterable[files.Row]:
        """Questions with their answers, where there are such."""
        found = list(files.read_jsonl(path))
        labels = next(iter(self.beside(path)), None)
        if labels is None:
            return found
        answers = [line for line, _ in files.read_lines(labels)]
        if len(answers) != len(found):
            raise DataError(
                f"{labels}: {len(answers)} answers for {len(found)} rows of {path.name}"
            )
        return [
            (row | {"label": answer}, where)
            for (row, where), answer in zip(found, answers, strict=True)
        ]

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        row["sol1"], row["sol2"]
        gold = int(row["label"]) if "label" in row else None
        return choice(row, ("sol1", "sol2"), gold, where)
