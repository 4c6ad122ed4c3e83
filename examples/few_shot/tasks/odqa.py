"""Questions without documents: the answer is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask


class OpenQuestions(FewShotTask):
    """Questions with any number of right answers, compared as `exact-match` says.

    A row has `question` and `answer` (a text or a list), or `context`, `answer` and `aliases`.
    """

    kind = "generation"
    train_set, eval_set = "train", "dev"
    template = "odqa"
    metrics = ("exact-match",)
    stop = ("\n", "Q:")

    def rows(self, path: Path) -> Iterator[files.Row]:
        """Of JSON lines, or of a file that is one list (TriviaQA's stands in `Data`)."""
        if path.suffix != ".json":
            yield from super().rows(path)
            return
        found = files.read_json(path)
        if isinstance(found, dict):
            found = found.get("Data", [])
        for number, row in enumerate(found):
            yield row, f"{path}: number {number}"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if "context" in row:
            text = row["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
            answers = [row["answer"], *row["aliases"]]
        else:
            text, answers = row["question"], row["answer"]
            answers = [answers] if isinstance(answers, str) else answers
        if not answers:
            raise ValueError("has no answer")
        data, correct = {"question": text.strip()}, tuple(dict.fromkeys(answers))
        return FewShotSample(data, (), correct, where=where)


@TASKS.register("naturalquestions")
class NaturalQuestions(OpenQuestions):
    """Natural Questions in its open form (Lee et al. 2019), NQ-open."""

    sets = {  # noqa: RUF012
        "train": "nq_open/NQ-open.train.jsonl",
        "dev": "nq_open/NQ-open.dev.jsonl",
    }


@TASKS.register("triviaqa")
class TriviaQA(OpenQuestions):
    """TriviaQA, unfiltered (Joshi et al. 2017); llmfoundry's rows are 3000 of its dev set."""

    sets = {  # noqa: RUF012
        "train": ("triviaqa-unfiltered/unfiltered-web-train.json", "triviaqa/train.jsonl"),
        "dev": ("triviaqa-unfiltered/unfiltered-web-dev.json", "triviaqa/dev.jsonl",
                "llmfoundry/triviaqa_sm_sub.jsonl"),
    }  # fmt: skip

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if "Question" in row:
            answers = [row["Answer"]["Value"], *row["Answer"]["Aliases"]]
            row = {"question": row["Question"], "answer": answers}
        return super().sample(row, where)


@TASKS.register("webquestions")
class WebQuestions(OpenQuestions):
    """WebQuestions (Berant et al. 2013): answers are the descriptions in `targetValue`."""

    sets = {  # noqa: RUF012
        each: (f"webquestions/webquestions.examples.{each}.json", f"webquestions/{each}.jsonl")
        for each in ("train", "test")
    }
    eval_set = "test"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if "utterance" in row:
            row = {"question": row["utterance"], "answer": descriptions(row["targetValue"])}
        return super().sample(row, where)


def descriptions(value: str) -> list[str]:
    r"""The texts of `(list (description "One, two") (description three))`."""
    found = re.findall(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()\s]+))\)', value)
    return [re.sub(r"\\(.)", r"\1", quoted) or plain for quoted, plain in found]
