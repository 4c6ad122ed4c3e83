"""Perplexity of running text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask
from fairseq_lite.config.flags import flag


@dataclass(frozen=True)
class PerplexityConfig:
    """What is one text."""

    documents: str = flag(
        "file",
        "perplexity: a text is the whole file, or a line of it; of .jsonl files a row's `text`",
        choices=("file", "line"),
    )


@TASKS.register("perplexity", config=PerplexityConfig)
class Perplexity(FewShotTask):
    """A text file, read once from its beginning to its end; --perplexity-eval-set names it.

    Every text is scored in windows as long as the model takes, each behind the last token of the
    one before. Of a .jsonl file (or .jsonl.gz, .jsonl.xz) every row's `text` is one.
    """

    cfg: PerplexityConfig
    kind = "perplexity"
    eval_set = None
    max_shots = 0
    template = "perplexity"
    metrics = ("rolling_perplexity",)

    def rows(self, path: Path) -> Iterator[files.Row]:
        if ".jsonl" in path.suffixes:
            yield from files.read_jsonl(path)
        elif self.cfg.documents == "line":
            for line, where in files.read_lines(path):
                if line.strip():
                    yield {"text": line}, where
        else:
            yield {"text": files.read_text(path)}, str(path)

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if not row["text"].strip():
            raise ValueError("has no text")
        return FewShotSample({"text": row["text"]}, where=where)
