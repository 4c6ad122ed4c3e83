"""Templates of ARC and of what comes in its format.

A question ends with a question mark; what does not is a sentence to complete. Without its question
(as calibration asks it) only the choice is left, in words of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@dataclass(frozen=True)
class Wording:
    """How questions and choices are put.

    Attributes:
        labels: in front of a question and of its answer; sentences to complete have none.
        descriptions: what is said first of a question and of a sentence, every time.
        prefix: in front of a choice that answers a question.
        alone: in front of a choice without a question.
        case: of choices: "lower", "kept", or "capitalised" (those that answer a question).
        inline: a choice stands in the line of its question, too, not only of a sentence.
    """

    labels: tuple[str, str] = ("", "")
    descriptions: tuple[str, str] = ("", "")
    prefix: str = ""
    alone: str = ""
    case: str = "lower"
    inline: bool = False


class ScienceTemplate(FewShotTemplate):
    """A question whose candidates are labels of choices; a choice ends with a full stop."""

    wording: ClassVar[Wording] = Wording()

    def encode(self, sample: FewShotSample) -> str:
        question = sample["question"]
        words = self.wording
        asked = question.endswith("?")
        fields = [("", sample["context"]), ("", words.descriptions[0 if asked else 1])]
        if not question:
            fields = [("", MASK)]
        elif asked and not words.inline:
            fields += [(words.labels[0], question), (words.labels[1], MASK)]
        else:
            fields += [("", f"{question} {MASK}")]
        return self.lines(*fields)

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        text = str(sample["texts"][sample.candidates.index(candidate)])
        question = sample["question"]
        asked = question.endswith("?")
        if self.wording.case != "kept":
            text = text.lower()
        if self.wording.case == "capitalised" and asked:
            text = text[:1].upper() + text[1:]
        before = self.wording.prefix if asked else "" if question else self.wording.alone
        return " ".join(filter(None, [before, text])) + ("" if text.endswith(".") else ".")


_IT = ("It is", "This is", "The answer is")
_DESCRIPTIONS = (
    ("Answer the question.", "Continue the sentence."),
    ("Answer the following question.", "Continue the following sentence."),
    ("Please, answer the following question.", "Please, continue the following sentence."),
)

WORDINGS = {
    "arc": Wording(),
    "arc_1": Wording(prefix="It is", alone="It is"),
    "arc_old": Wording(prefix="It is", alone="It is", inline=True),
    "arc_no_choice_lowercase": Wording(case="kept"),
    "arc_capitalize_choice": Wording(case="capitalised"),
    "arc_struct_1": Wording(labels=("Question:", "Answer:")),
    "arc_struct_2": Wording(labels=("Q:", "A:")),
    **{f"arc_descr_{n}": Wording(descriptions=said) for n, said in enumerate(_DESCRIPTIONS, 1)},
    **{f"arc_choice_format_{n}": Wording(prefix=words) for n, words in enumerate(_IT, 1)},
    **{f"arc_calib_format_{n}": Wording(alone=words) for n, words in enumerate(_IT, 1)},
    "openbookqa": Wording(case="kept", inline=True),
    "exams": Wording(case="kept"),
}


def _worded(name: str, wording: Wording) -> type[ScienceTemplate]:
    members = {
        "__doc__": f"A question and its choice: {wording}.",
        "__module__": __name__,
        "wording": wording,
    }
    return type(f"ScienceTemplate_{name}", (ScienceTemplate,), members)


for _name, _wording in WORDINGS.items():
    TEMPLATES.register(_name)(_worded(_name, _wording))


@TEMPLATES.register("arcchallenge_gpt3")
class ARCChallengeGPT3Template(ScienceTemplate):
    """Question ⏎ Answer, as in Brown et al. 2020; without its question, "Answer:" is left."""

    def encode(self, sample: FewShotSample) -> str:
        return self.lines(
            ("", sample["context"]), ("Question:", sample["question"]), ("Answer:", MASK)
        )


class OpenBookQAGPT3Template(ScienceTemplate):
    """The question and the choice, as in Brown et al. 2020; a label alone without the question."""

    alone: ClassVar[str] = ""

    def encode(self, sample: FewShotSample) -> str:
        if not sample["question"]:
            return " ".join(filter(None, [self.alone, MASK]))
        return self.lines(("", sample["context"]), ("", f"{sample['question']} {MASK}"))


@TEMPLATES.register("openbookqa_gpt3_calib_v1")
class OpenBookQAGPT3V1Template(OpenBookQAGPT3Template):
    """Of OpenBookQAGPT3Template that which leaves "Answer:"."""

    alone = "Answer:"


@TEMPLATES.register("openbookqa_gpt3_calib_v2")
class OpenBookQAGPT3V2Template(OpenBookQAGPT3Template):
    """Of OpenBookQAGPT3Template that which leaves "A:"."""

    alone = "A:"


@TEMPLATES.register("openbookqa_gpt3_calib_empty")
class OpenBookQAGPT3EmptyTemplate(OpenBookQAGPT3Template):
    """Of OpenBookQAGPT3Template that which leaves nothing."""


@TEMPLATES.register("arc_letters")
class LettersTemplate(FewShotTemplate):
    """Question ⏎ a line for each choice with its letter ⏎ Answer: the letter."""

    def encode(self, sample: FewShotSample) -> str:
        labels = [f"{label}." for label in sample.candidates]
        listed = zip(labels, sample["texts"], strict=True)
        return self.lines(
            ("", sample["context"]), ("Question:", sample["question"]), *listed, ("Answer:", MASK)
        )
