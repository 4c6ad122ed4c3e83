"""COPA and its translations: which of two sentences is the cause, or the effect, of a third."""

from __future__ import annotations

from typing import Any

from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask
from examples.few_shot.tasks.common import superglue

# How rows that bring a prompt of their own tell the kind of question.
_CONJUNCTIONS = {"because": "cause", "therefore": "effect"}


@TASKS.register("copa")
class COPA(FewShotTask):
    """Choice of plausible alternatives (Roemmele et al. 2011), in SuperGLUE's JSON lines.

    Rows of `query`, `choices`, `gold` are taken apart into premise and question.
    """

    sets = superglue("COPA", val=("llmfoundry/copa.jsonl",))
    train_set = "train"
    template = "copa"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if "query" in row:
            row = self._from_query(row)
        if row["question"] not in ("cause", "effect"):
            raise ValueError(f"question {row['question']!r}; expected cause or effect")
        if self.language is not None:
            row = {**row, "lang": self.language}
        return choice(row, (row["choice1"], row["choice2"]), row.get("label"), where)

    @staticmethod
    def _from_query(row: dict[str, Any]) -> dict[str, Any]:
        premise, _, conjunction = str(row["query"]).rpartition(" ")
        if conjunction not in _CONJUNCTIONS:
            raise ValueError(f"a query that ends in {conjunction!r}; expected because or therefore")
        first, second = row["choices"]
        return {
            **row,
            "premise": premise.rstrip(", ") + ".",
            "question": _CONJUNCTIONS[conjunction],
            "choice1": first,
            "choice2": second,
            "label": row.get("gold"),
        }


@TASKS.register("xcopa")
class XCOPA(COPA):
    """COPA in twelve languages (Ponti et al. 2020; Russian: Shavrina et al. 2020).

    There are no training rows: shots come from what is evaluated, never the question itself.
    """

    sets = {  # noqa: RUF012
        "val": ("xcopa/{lang}/val.{lang}.jsonl", "xcopa/data/{lang}/val.{lang}.jsonl"),
        "test": ("xcopa/{lang}/test.{lang}.jsonl", "xcopa/data/{lang}/test.{lang}.jsonl"),
    }
    train_set = "val"
    languages = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh", "ru")
    default_languages = languages[:-1]  # Russian comes from another archive
    template = "xcopa"
