"""Templates of BoolQ, WiC, WSC, ReCoRD and MultiRC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate
from examples.few_shot.templates.text import capitalised
from examples.few_shot.templates.worded import Worded
from fairseq_lite.errors import DataError


@TEMPLATES.register("boolq")
class BoolQTemplate(Worded):
    """Paragraph ⏎ Question ⏎ Answer, True or False."""

    def encode(self, sample: FewShotSample) -> str:
        return self.lines(
            ("Paragraph:", sample["passage"]), ("Question:", asked(sample)), ("Answer:", MASK)
        )


@TEMPLATES.register("boolq_no_struct", aliases=("bool_qno_struct",))
class BoolQNoStructTemplate(Worded):
    """As boolq, without labels in front of the fields."""

    def encode(self, sample: FewShotSample) -> str:
        return self.lines(("", sample["passage"]), ("", asked(sample)), ("", MASK))


@TEMPLATES.register("boolqnopassage", aliases=("boolq_no_passage",))
class BoolQNoPassageTemplate(Worded):
    """As boolq, without the passage: what a model answers unread."""

    def encode(self, sample: FewShotSample) -> str:
        return self.lines(("Question:", asked(sample)), ("Answer:", MASK))


def asked(sample: FewShotSample) -> str:
    """The question with a large letter and one question mark; empty if there is none."""
    question = str(sample["question"]).strip().rstrip("?").rstrip()
    return f"{capitalised(question)}?" if question else ""


@TEMPLATES.register("wic")
class WiCTemplate(Worded):
    """Sentence 1 ⏎ Sentence 2 ⏎ Question ⏎ Answer, True or False."""

    def encode(self, sample: FewShotSample) -> str:
        word = sample["word"]
        question = f"Is the word '{word}' used in the same way in the two sentences above?"
        return self.lines(
            ("Sentence 1:", sample["sentence1"]),
            ("Sentence 2:", sample["sentence2"]),
            ("Question:", question if word else ""),
            ("Answer:", MASK),
        )


@TEMPLATES.register("wsc")
class WSCTemplate(Worded):
    """The text with its pronoun marked ⏎ what the pronoun refers to, Yes or No."""

    words: ClassVar[Mapping[str, str]] = {"false": "No", "true": "Yes"}

    def encode(self, sample: FewShotSample) -> str:
        question = (
            f'In the passage above, does the pronoun "*{sample["pronoun"]}*" refer to'
            f' "{sample["noun"]}"?'
        )
        return self.lines(("", sample["text"]), ("", f"{question} {MASK}"))


@TEMPLATES.register("record")
class ReCoRDTemplate(FewShotTemplate):
    """The passage with its highlights ⏎ the query, an entity in its gap."""

    def encode(self, sample: FewShotSample) -> str:
        parts = (part.strip() for part in str(sample["passage"]).split("@highlight"))
        query = str(sample["query"]).replace("@placeholder", MASK)
        return self.lines(("", "\n".join(filter(None, parts))), ("", query))


@TEMPLATES.register("multirc")
class MultiRCTemplate(Worded):
    """The passage, the question, and an answer behind a box with True or False, each in a line.

    A shot lists all answers of its question.
    """

    def encode(self, sample: FewShotSample) -> str:
        return self._listed(sample, [(MASK, sample["answer"])])

    def encode_correct_candidate(self, sample: FewShotSample) -> str:
        if not all(each.correct for each in sample.problems()):
            raise DataError(f"{sample.where}: has no answer and cannot be a shot")
        boxes = [
            (self.verbalize(each, each.correct[0]), each["answer"]) for each in sample.problems()
        ]
        return self._listed(sample, boxes)

    @staticmethod
    def _listed(sample: FewShotSample, boxes: list[tuple[str, str]]) -> str:
        answers = [f"- [{word}] {answer}".rstrip() for word, answer in boxes]
        fields = [sample["paragraph"], sample["question"], *answers]
        return "\n".join(text.strip() for text in fields if text)


@TEMPLATES.register("multirc_correct_incorrect")
class MultiRCCorrectIncorrectTemplate(MultiRCTemplate):
    """As multirc, with Correct and Incorrect."""

    words: ClassVar[Mapping[str, str]] = {"false": "Incorrect", "true": "Correct"}


@TEMPLATES.register("multirc_right_wrong")
class MultiRCRightWrongTemplate(MultiRCTemplate):
    """As multirc, with Right and Wrong."""

    words: ClassVar[Mapping[str, str]] = {"false": "Wrong", "true": "Right"}


@TEMPLATES.register("multirc_positive_negative")
class MultiRCPositiveNegativeTemplate(MultiRCTemplate):
    """As multirc, with Positive and Negative."""

    words: ClassVar[Mapping[str, str]] = {"false": "Negative", "true": "Positive"}


@TEMPLATES.register("multirc_correct_false")
class MultiRCCorrectFalseTemplate(MultiRCTemplate):
    """As multirc, with Correct and False."""

    words: ClassVar[Mapping[str, str]] = {"false": "False", "true": "Correct"}


@TEMPLATES.register("multirc_yes_no")
class MultiRCYesNoTemplate(MultiRCTemplate):
    """As multirc, with Yes and No."""

    words: ClassVar[Mapping[str, str]] = {"false": "No", "true": "Yes"}
