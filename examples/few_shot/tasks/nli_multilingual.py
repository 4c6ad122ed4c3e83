"""XNLI and PAWS-X: pairs of sentences in many languages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask
from examples.few_shot.tasks.common import pair
from examples.few_shot.tasks.nli import LABELS, relation


@TASKS.register("xnli")
class XNLI(FewShotTask):
    """NLI in fifteen languages (Conneau et al. 2018).

    Its own files (JSON lines or TSV, all languages in one), or files of one language with three
    columns: premise, hypothesis, label. By default shots come from what is evaluated, never the
    question itself; `train` is MultiNLI as translated for it.
    """

    sets = {  # noqa: RUF012
        "train": ("XNLI-MT-1.0/multinli/multinli.train.{lang}.tsv", "xnli_{lang}/train.txt"),
        **{
            name: (f"XNLI-1.0/xnli.{name}.jsonl", f"XNLI-1.0/xnli.{name}.tsv",
                   "xnli_{lang}/" + f"{name}.txt")
            for name in ("dev", "test")
        },
    }  # fmt: skip
    train_set = "dev"
    eval_set = "dev"
    languages = (
        "ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh",
    )  # fmt: skip
    template = "gpt3stylenli"

    def rows(self, path: Path) -> Iterable[files.Row]:
        if path.suffix == ".txt":
            return files.read_tsv(path, ("sentence1", "sentence2", "gold_label"))
        return super().rows(path)

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if row.get("language", self.language) != self.language:
            return None
        label = row["label"] if "label" in row else row["gold_label"]
        first = row["premise"] if "premise" in row else row["sentence1"]
        second = row["hypo"] if "hypo" in row else row["sentence2"]
        if label == "-":
            return None
        return pair(first, second, LABELS, relation(label), where, lang=self.language)


@TASKS.register("pawsx")
class PAWSX(FewShotTask):
    """Paraphrases among sentences of the same words, in seven languages (Yang et al. 2019).

    TSV: id, sentence1, sentence2, label. Rows with a sentence that was not translated ("NS", or
    empty) are left out.
    """

    sets = {  # noqa: RUF012
        "train": (
            "x-final/{lang}/translated_train.tsv",
            "x-final/{lang}/train.tsv",
            "pawsx_{lang}/train.tsv",
        ),
        "dev": ("x-final/{lang}/dev_2k.tsv", "pawsx_{lang}/dev.tsv"),
        "test": ("x-final/{lang}/test_2k.tsv", "pawsx_{lang}/test.tsv"),
    }
    train_set = "dev"
    eval_set = "dev"
    languages = ("de", "en", "es", "fr", "ja", "ko", "zh")
    template = "pawsx__en"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        first, second = row["sentence1"].strip(), row["sentence2"].strip()
        if {"", "NS"} & {first, second}:
            return None
        answers = {"0": "false", "1": "true"}
        if row["label"] not in answers:
            raise ValueError(f"label {row['label']!r}; expected 0 or 1")
        correct = answers[row["label"]]
        return pair(first, second, ("true", "false"), correct, where, lang=self.language)
