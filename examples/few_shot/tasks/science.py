"""Questions of school exams and common knowledge with a few choices each: ARC and its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask
from fairseq_lite.config.flags import flag
from fairseq_lite.errors import DataError


class ScienceTask(FewShotTask):
    """A question with labelled choices in ARC's JSON lines, or as `query`, `choices` and `gold`.

    The candidates are the labels. Samples have the fields `question`, `texts` (of the choices) and
    `context` (empty but where paragraphs are asked for); what a row calls `query` and `choices`
    stays, for the template `query`.
    """

    train_set, eval_set = "train", "dev"
    template = "arc_old"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        question, choices, key = _flat(row) if "query" in row else _nested(row)
        labels = list(choices)
        if key and key not in choices:
            raise DataError(f"{where}: the answer is {key!r}; choices are {', '.join(labels)}")
        kept: dict[str, Any] = {field: row[field] for field in ("query", "choices") if field in row}
        texts = list(choices.values())
        data = kept | {"question": question, "texts": texts, "context": self.context(row, where)}
        return choice(data, labels, labels.index(key) if key else None, where)

    def context(self, row: Mapping[str, Any], where: str) -> str:
        """What is said in front of the question."""
        return ""


def _nested(row: Mapping[str, Any]) -> tuple[str, dict[str, str], str | None]:
    """Question, choices and the right label of a row in ARC's format."""
    question = row["question"]
    choices = {each["label"]: each["text"].strip() for each in question["choices"]}
    return question["stem"].strip(), choices, row.get("answerKey")


def _flat(row: Mapping[str, Any]) -> tuple[str, dict[str, str], str]:
    """Of a row with `query`; lettered choices may stand inside the query."""
    query, lettered, listed = row["query"].removeprefix("Question: ").partition("\nChoices:\n")
    texts = row["choices"]
    if lettered:
        texts = [line.partition(". ")[2] for line in listed.removesuffix("\nAnswer:").split("\n")]
    if len(texts) != len(row["choices"]):
        raise ValueError(f"{len(texts)} choices in its query, {len(row['choices'])} beside it")
    choices = dict(zip("ABCDEFGH", texts, strict=False))
    return query.strip(), choices, list(choices)[row["gold"]]


def _sets(*patterns: str, test: str = "") -> dict[str, tuple[str, ...]]:
    """The three sets by how their files are called, and the test set's file elsewhere."""
    found = {
        each: tuple(pattern.format(set=each, Set=each.capitalize()) for pattern in patterns)
        for each in ("train", "dev", "test")
    }
    return found | {"test": (*found["test"], *filter(None, [test]))}


def _arc(name: str, test: str) -> dict[str, tuple[str, ...]]:
    roots = ("ARC-V1-Feb2018-2", "arc")
    return _sets(*(f"{root}/{name}/{name}-{{Set}}.jsonl" for root in roots), test=test)


@TASKS.register("arceasy")
class ARCEasy(ScienceTask):
    """The easy set of the AI2 Reasoning Challenge (Clark et al. 2018)."""

    sets = _arc("ARC-Easy", "llmfoundry/arc_easy.jsonl")


@TASKS.register("arcchallenge")
class ARCChallenge(ScienceTask):
    """The challenge set of the AI2 Reasoning Challenge (Clark et al. 2018)."""

    sets = _arc("ARC-Challenge", "llmfoundry/arc_challenge.jsonl")


@TASKS.register("openbookqa")
class OpenBookQA(ScienceTask):
    """OpenBookQA (Mihaylov et al. 2018), without its book of facts."""

    sets = _sets(
        "OpenBookQA-V1-Sep2018/Data/Main/{set}.jsonl", "openbookqa/{set}.jsonl",
        test="llmfoundry/openbook_qa.jsonl",
    )  # fmt: skip
    template = "openbookqa"


@TASKS.register("commonsenseqa")
class CommonsenseQA(ScienceTask):
    """CommonsenseQA (Talmor et al. 2019); the answers of its test set are not public."""

    sets = {  # noqa: RUF012
        "train": "commonsenseqa/train_rand_split.jsonl",
        "dev": ("commonsenseqa/dev_rand_split.jsonl", "llmfoundry/commonsense_qa.jsonl"),
        "test": "commonsenseqa/test_rand_split_no_answers.jsonl",
    }


@dataclass(frozen=True)
class ExamsConfig:
    """How much is said in front of a question."""

    max_hits_cnt: int = flag(
        0,
        "EXAMS: paragraphs per choice in front of the question, of the files with_hits; those"
        " with_paragraphs have one, of all that was found",
    )


_EXAMS_LANGUAGES = {
    "bg": "Bulgarian", "hr": "Croatian", "hu": "Hungarian", "it": "Italian",
    "mk": "North Macedonian", "pl": "Polish", "pt": "Portuguese", "sq": "Albanian",
    "sr": "Serbian", "tr": "Turkish", "vi": "Vietnamese",
}  # fmt: skip


@TASKS.register("exams", config=ExamsConfig)
class Exams(ScienceTask):
    """EXAMS, its multilingual part (Hardalov et al. 2020); one file has all languages.

    Paragraphs are the texts listed in the field `hits` of a choice, or the field `para`: a list
    too, or one text, as the published files have it. What was found for a choice is joined there,
    and can be had as a whole only: --max-hits-cnt 1.
    """

    cfg: ExamsConfig
    sets = _sets("exams/multilingual/{set}.jsonl", "exams/{set}.jsonl")
    languages = tuple(_EXAMS_LANGUAGES)
    template = "exams"

    def path(self, set_name: str) -> Path:
        if self.cfg.max_hits_cnt and set_name in self.sets:
            names = [
                f"exams/{part}{name}.jsonl"
                for part in ("multilingual/", "")
                for name in (f"with_hits/{set_name}", f"with_paragraphs/{set_name}_with_para")
            ]
            names.append(f"exams/{set_name}_with_para.jsonl")
            return files.existing(self.name, self.data_dir, tuple(names))
        return super().path(set_name)

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        # "@" stands for an answer that was lost when the exam was read.
        mine = row["info"]["language"] == _EXAMS_LANGUAGES[self.language or ""]
        return super().sample(row, where) if mine and row["answerKey"] != "@" else None

    def context(self, row: Mapping[str, Any], where: str) -> str:
        most = self.cfg.max_hits_cnt
        found: dict[str, None] = {}
        for each in row["question"]["choices"] if most else ():
            hits = each.get("hits", each.get("para"))
            if hits is None:
                raise DataError(f"{where}: has neither `hits` nor `para`: --max-hits-cnt needs one")
            if isinstance(hits, str):
                if most > 1:
                    raise DataError(
                        f"{where}: `para` is one text, of which --max-hits-cnt {most} cannot tell"
                        " the paragraphs apart; 1 takes all of it"
                    )
                hits = [hits]
            found.update(dict.fromkeys(" ".join(hit.split()) for hit in hits[:most]))
        return " ".join(filter(None, found))
