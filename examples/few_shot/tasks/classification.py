"""What a text is about, and whether it is friendly: AG News and SST-2."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask


@TASKS.register("sst2")
class SST2(FewShotTask):
    """Sentiment of sentences of film reviews (Socher et al. 2013): 0 is bad, 1 is good.

    GLUE's TSV (sentence, label), or lines of a label, a space, the sentence.
    """

    sets = {  # noqa: RUF012
        name: (f"SST-2/{name}.tsv", f"sst2/{name}.tsv", f"sst2/stsa.binary.{name}")
        for name in ("train", "dev", "test")
    }
    train_set = "train"
    eval_set = "dev"
    template = "sentimentanalysis"

    def rows(self, path: Path) -> Iterable[files.Row]:
        if path.suffix == ".tsv":
            return super().rows(path)
        return (
            (dict(zip(("label", "sentence"), line.split(" ", 1), strict=False)), where)
            for line, where in files.read_lines(path)
            if line
        )

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        label = row.get("label")
        if label not in ("0", "1", None):
            raise ValueError(f"label {label!r}; expected 0 or 1")
        gold = None if label is None else int(label)
        return choice({"sentence": row["sentence"].strip()}, ("0", "1"), gold, where)


@TASKS.register("agnews")
class AGNews(FewShotTask):
    """Topics of news (Zhang et al. 2015): CSV of class (from 1), title, description."""

    sets = {  # noqa: RUF012
        name: (f"agnews/{name}.csv", f"ag_news_csv/{name}.csv") for name in ("train", "test")
    }
    train_set = "train"
    eval_set = "test"
    template = "agnews"
    topics = ("World", "Sports", "Business", "Sci/Tech")

    def rows(self, path: Path) -> Iterable[files.Row]:
        return files.read_csv(path, ("class", "title", "description"))

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        # The file writes a line break as a backslash, with or without the n.
        title, text = (
            " ".join(row[name].replace("\\n", " ").replace("\\", " ").split())
            for name in ("title", "description")
        )
        data = {"title": title, "description": text}
        return choice(data, self.topics, int(row["class"]) - 1, where)
