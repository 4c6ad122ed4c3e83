"""Winograd schemas: what does a pronoun stand for. The answer is put in its place."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask
from examples.few_shot.tasks.common import gap, masked_choice
from fairseq_lite.errors import DataError

# Those of the first edition; what was added later is by custom not evaluated.
_SCHEMAS = 273


@TASKS.register("winograd")
class Winograd(FewShotTask):
    """The Winograd schema challenge (Levesque et al. 2012): the first 273 of WSCollection.xml.

    Or rows of `context_options`, `continuation`, `gold`. Shots come from what is evaluated, never
    the question itself.
    """

    sets = {  # noqa: RUF012
        "test": ("winograd/WSCollection.xml", "WSCollection.xml", "llmfoundry/winograd_wsc.jsonl")
    }
    train_set = "test"
    eval_set = "test"
    template = "winograd"

    def rows(self, path: Path) -> Iterable[files.Row]:
        return _schemas(path) if path.suffix == ".xml" else super().rows(path)

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        found = masked_choice(row, where)
        if found is not None:
            return found
        data = {name: row[name] for name in ("txt1", "pron", "txt2")}
        return choice(data, row["answers"], row["gold"], where)


def _schemas(path: Path) -> Iterator[files.Row]:
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError) as e:
        raise DataError(f"{path}: cannot be read as XML: {e}") from None
    for number, schema in enumerate(root.findall("schema")[:_SCHEMAS], start=1):
        before, pronoun, after = (
            " ".join(schema.findtext(f"text/{part}", "").split())
            for part in ("txt1", "pron", "txt2")
        )
        answers = [
            " ".join((each.text or "").split()) for each in schema.iterfind("answers/answer")
        ]
        right = schema.findtext("correctAnswer", "").strip().strip(".")
        where = f"{path}: schema {number}"
        if len(answers) != 2 or right not in ("A", "B") or not pronoun:
            raise DataError(f"{where}: expected a pronoun, two answers and which is right, A or B")
        row = {
            "txt1": before + (" " if before else ""),
            "pron": pronoun,
            "txt2": gap(after) + after,
            "answers": answers,
            "gold": "AB".index(right),
        }
        yield row, where


@TASKS.register("xwinograd")
class XWinograd(FewShotTask):
    """Winograd schemas in six languages (Tikhonov and Ryabinin 2021), dataset.tsv.

    Its columns: language, source, English schema, text, words of the text, pronoun, answers.
    """

    sets = {"test": ("xwinograd/dataset.tsv", "crosslingual_winograd/dataset.tsv")}  # noqa: RUF012
    train_set = "test"
    eval_set = "test"
    languages = ("en", "fr", "jp", "pt", "ru", "zh")
    template = "winograd"
    columns = ("language", "source", "english", "text", "words", "pronoun", "answers")

    def rows(self, path: Path) -> Iterable[files.Row]:
        return files.read_tsv(path, self.columns)

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if row["language"] != self.language:
            return None
        pronoun, (first, _), _ = json.loads(row["pronoun"])
        start = _start(row["text"], json.loads(row["words"])[:first], pronoun)
        answers = json.loads(row["answers"])
        right = [i for i, answer in enumerate(answers) if answer[3]]
        if len(answers) != 2 or len(right) != 1:
            raise ValueError("expected two answers, one of them right")
        data = {
            "txt1": row["text"][:start],
            "pron": pronoun,
            "txt2": row["text"][start + len(pronoun) :].rstrip(),
            "lang": self.language,
        }
        return choice(data, [answer[0] for answer in answers], right[0], where)


def _start(text: str, words: list[str], pronoun: str) -> int:
    """Where a pronoun of a text begins.

    Args:
        text: the text.
        words: those in front of the pronoun.
        pronoun: the pronoun.

    Raises:
        ValueError: they are not in the text.
    """
    place = 0
    for word in words:
        found = text.find(word, place)
        if found < 0 and word in ("``", "''"):
            # The tokenizer that made the file writes quotation marks so.
            word = '"'
            found = text.find(word, place)
        if found < 0:
            raise ValueError(f"the text does not have the word {word!r}")
        place = found + len(word)
    start = text.find(pronoun, place)
    if start < 0 or text[place:start].strip():
        raise ValueError(f"the text does not have the pronoun {pronoun!r} behind {words[-1:]}")
    return start


@TASKS.register("winogrande")
class WinoGrande(FewShotTask):
    """Winograd schemas at scale (Sakaguchi et al. 2020): JSON lines with a gap `_`.

    Or rows of `context_options`, `continuation`, `gold`.
    """

    sets = {  # noqa: RUF012
        **{
            name: (f"winogrande/{name}.jsonl", f"winogrande_1.1/{name}.jsonl")
            for name in ("train_xs", "train_s", "train_m", "train_l", "train_xl", "test")
        },
        "dev": (
            "winogrande/dev.jsonl",
            "winogrande_1.1/dev.jsonl",
            "llmfoundry/winogrande.jsonl",
        ),
    }
    train_set = "train_xl"
    eval_set = "dev"
    template = "winogrande"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        found = masked_choice(row, where)
        if found is not None:
            return found
        parts = row["sentence"].split("_")
        if len(parts) != 2:
            raise ValueError(f"expected a sentence with one gap _, found {len(parts) - 1}")
        answer = row.get("answer") or None
        if answer not in ("1", "2", None):
            raise ValueError(f"answer {answer!r}; expected 1 or 2")
        data = {"txt1": parts[0], "txt2": parts[1]}
        gold = None if answer is None else int(answer) - 1
        return choice(data, (row["option1"], row["option2"]), gold, where)
