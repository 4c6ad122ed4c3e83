"""SAT analogies: which pair of words relates as another pair does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask
from fairseq_lite.errors import DataError


@TASKS.register("satanalogies")
class SATAnalogies(FewShotTask):
    """374 analogy questions (Turney 2006), SAT-package-V3.txt.

    A question is a block of eight lines between empty ones: its source, the pair of words, five
    pairs to choose from, the letter of the right one. `no choice` fills up those with four.
    """

    sets = {"test": ("satanalogies/SAT-package-V3.txt", "sat/SAT-package-V3.txt")}  # noqa: RUF012
    train_set = eval_set = "test"
    template = "satanalogies"

    def rows(self, path: Path) -> Iterator[files.Row]:
        block: list[str] = []
        start = ""
        for line, where in [*files.read_lines(path), ("", f"{path}: its end")]:
            text = line.strip()
            if text and not text.startswith("#"):
                start = start if block else where
                block.append(text)
            elif block and not text:
                if len(block) != 8:
                    raise DataError(f"{start}: a question has 8 lines, this one {len(block)}")
                yield {"source": block[0], "lines": block[1:7], "answer": block[7]}, start
                block = []

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        stem, *pairs = ([*line.split()[:2]] for line in row["lines"])
        choices = {
            letter: pair
            for letter, pair in zip("abcde", pairs, strict=True)
            if pair != ["no", "choice"]
        }
        letters = list(choices)
        data = {"source": row["source"], "stem": stem, "choices": choices}
        return choice(data, letters, letters.index(row["answer"]), where)
