"""Tasks of SuperGLUE (Wang et al. 2019), in its JSON lines. COPA is in `copa.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.few_shot.files import Row
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask
from examples.few_shot.tasks.common import named, pair, superglue

TRUTH = ("false", "true")


def truth(label: object) -> str | None:
    """The candidate that a label of true and false stands for; None for no label.

    Raises:
        ValueError: neither.
    """
    if label is None:
        return None
    found = {"true": "true", "1": "true", "false": "false", "0": "false"}.get(str(label).lower())
    if found is None:
        raise ValueError(f"label {label!r}; expected true or false")
    return found


@TASKS.register("cb")
class CB(FewShotTask):
    """CommitmentBank (de Marneffe et al. 2019): does a text entail a sentence or contradict it."""

    sets = superglue("CB")
    train_set = "train"
    template = "cb"
    metrics = ("accuracy", "prf1_macro", "prf1_micro")

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        labels = ("entailment", "contradiction", "neutral")
        return pair(row["premise"], row["hypothesis"], labels, row.get("label"), where)


@TASKS.register("rte")
class RTE(FewShotTask):
    """Recognising textual entailment (Dagan et al. 2005 and later)."""

    sets = superglue("RTE")
    train_set = "train"
    template = "rte"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        labels = ("entailment", "not_entailment")
        return pair(row["premise"], row["hypothesis"], labels, row.get("label"), where)


@TASKS.register("boolq")
class BoolQ(FewShotTask):
    """Yes-no questions about a passage (Clark et al. 2019): SuperGLUE's rows or the authors' own.

    Rows of `query`, `choices`, `gold` are taken apart into passage and question.
    """

    sets = superglue("BoolQ", val=("boolq/dev.jsonl", "llmfoundry/boolq.jsonl"))
    train_set = "train"
    template = "boolq"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        label = row.get("label", row.get("answer", row.get("gold")))
        if "query" in row:
            found = re.fullmatch(r"Passage: (.*)\nQuestion: ([^\n]*)", row["query"], re.DOTALL)
            if found is None or row["choices"] != ["no", "yes"]:
                raise ValueError("expected a query of Passage and Question, choices no and yes")
            row = {**row, "passage": found[1], "question": found[2]}
        kept = [name for name in ("query", "choices") if name in row]
        data = {name: row[name] for name in ("passage", "question", *kept)}
        return named(data, (("passage", "paragraph"),), TRUTH, truth(label), where)


@TASKS.register("wic")
class WiC(FewShotTask):
    """Words in context (Pilehvar and Camacho-Collados 2019): one word, one meaning or two."""

    sets = superglue("WiC")
    train_set = "train"
    template = "wic"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        data = {name: row[name] for name in ("word", "sentence1", "sentence2")}
        return named(data, (), TRUTH, truth(row.get("label")), where)


@TASKS.register("wsc")
class WSC(FewShotTask):
    """Winograd schemas as questions of true and false: does this pronoun mean that.

    `text` has the pronoun between asterisks.
    """

    sets = superglue("WSC")
    train_set = "train"
    template = "wsc"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        target = row["target"]
        pronoun = target["span2_text"]
        start = _place(row["text"], pronoun, target["span2_index"])
        end = start + len(pronoun)
        data = {
            "text": f"{row['text'][:start]}*{pronoun}*{row['text'][end:]}",
            "pronoun": pronoun,
            "noun": target["span1_text"],
        }
        return named(data, (), TRUTH, truth(row.get("label")), where)


def _place(text: str, words: str, number: int) -> int:
    """Where words begin that are the `number`-th of a text; of equal ones the nearest to that.

    Raises:
        ValueError: the text does not have them.
    """
    found = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.I)]
    if not found:
        raise ValueError(f"the text does not have {words!r}")
    return min(found, key=lambda start: abs(len(text[:start].split()) - number))


@TASKS.register("record")
class ReCoRD(FewShotTask):
    """Reading with commonsense reasoning (Zhang et al. 2018): which entity fills the gap.

    A row has several queries, each a sample; an entity mentioned twice is one candidate.
    """

    sets = superglue("ReCoRD")
    train_set = "train"
    template = "record"

    def rows(self, path: Path) -> Iterator[Row]:
        for row, where in super().rows(path):
            for query in _listed(row.get("qas")):
                yield {"passage": row.get("passage"), "query": query}, where

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        text, query = row["passage"]["text"], row["query"]["query"]
        if query.count("@placeholder") != 1:
            raise ValueError("expected a query with one @placeholder")
        spans = [text[entity["start"] : entity["end"] + 1] for entity in row["passage"]["entities"]]
        correct = [answer["text"] for answer in row["query"].get("answers", ())]
        return FewShotSample(
            {"passage": text, "query": query},
            tuple(dict.fromkeys(spans)),
            tuple(dict.fromkeys(correct)),
            where=where,
        )


def _listed(found: object) -> list[Any]:
    """A list, or one with nothing in it that a sample can be made of."""
    return found if isinstance(found, list) else [None]


@TASKS.register("multirc")
class MultiRC(FewShotTask):
    """Reading comprehension over several sentences (Khashabi et al. 2018).

    A question is a sample; its answers are subproblems, each right or wrong by itself.
    """

    sets = superglue("MultiRC")
    train_set = "train"
    template = "multirc"
    metrics = ("multirc",)

    def rows(self, path: Path) -> Iterator[Row]:
        for number, (row, where) in enumerate(super().rows(path)):
            passage = row.get("passage")
            questions = passage.get("questions") if isinstance(passage, dict) else None
            for place, question in enumerate(_listed(questions)):
                # The numbers that files give are not unique in every copy; places are.
                known = {"passage": passage, "question_id": f"{number}.{place}"}
                yield known | {"question": question}, where

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        names = (("paragraph", "text", "context"),)
        question = row["question"]
        shared = {
            "paragraph": row["passage"]["text"],
            "question": question["question"],
            "question_id": row["question_id"],
        }
        parts = tuple(
            named(shared | {"answer": each["text"]}, names, TRUTH, truth(each.get("label")), where)
            for each in question["answers"]
        )
        return FewShotSample(shared, subproblems=parts, where=where) if parts else None
