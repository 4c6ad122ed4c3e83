"""Templates of ARC and of what comes in its format."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


class ScienceTemplate(FewShotTemplate):
    """A question whose candidates are labels of choices."""

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return str(sample["texts"][sample.candidates.index(candidate)])


@TEMPLATES.register("arc")
class ARCTemplate(ScienceTemplate):
    """Context (if any) ⏎ Question ⏎ Answer."""

    def encode(self, sample: FewShotSample) -> str:
        return self.lines(
            ("Context:", sample["context"]), ("Question:", sample["question"]), ("Answer:", MASK)
        )


@TEMPLATES.register("arc_old")
class ARCOldTemplate(ScienceTemplate):
    """A question, "It is" and the choice; a sentence to complete, the choice.

    The choice begins with a small letter, but for I and words with more capitals (DNA).
    """

    def encode(self, sample: FewShotSample) -> str:
        question = str(sample["question"])
        return " ".join(filter(None, [question, "It is" if question.endswith("?") else "", MASK]))

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        text = super().verbalize(sample, candidate)
        first = text.partition(" ")[0]
        name = first == "I" or any(letter.isupper() for letter in first[1:])
        return text if name else text[:1].lower() + text[1:]


@TEMPLATES.register("openbookqa", aliases=("exams",))
class PlainTemplate(ScienceTemplate):
    """Context (if any) ⏎ question, and the choice behind it: no words of any language."""

    def encode(self, sample: FewShotSample) -> str:
        question = " ".join(filter(None, [sample["question"], MASK]))
        return self.lines(("", sample["context"]), ("", question))


@TEMPLATES.register("arcchallenge_gpt3", aliases=("openbookqa_gpt3_calib_v1",))
class GPT3Template(ScienceTemplate):
    """Question ⏎ Answer, as in Brown et al. 2020; without its question, "Answer:" alone is left."""

    def encode(self, sample: FewShotSample) -> str:
        return self.lines(("Question:", sample["question"]), ("Answer:", MASK))


@TEMPLATES.register("openbookqa_gpt3_calib_v2")
class GPT3LabelsTemplate(ScienceTemplate):
    """The same, but without its question both labels are left."""

    def encode(self, sample: FewShotSample) -> str:
        question = " ".join(filter(None, ["Question:", sample["question"]]))
        return self.lines(("", question), ("Answer:", MASK))


@TEMPLATES.register("openbookqa_gpt3_calib_empty")
class GPT3EmptyTemplate(ScienceTemplate):
    """The same, but without its question nothing is left in front of the choice."""

    def encode(self, sample: FewShotSample) -> str:
        if not sample["question"]:
            return MASK
        return self.lines(("Question:", sample["question"]), ("Answer:", MASK))


@TEMPLATES.register("arc_letters")
class LettersTemplate(FewShotTemplate):
    """Question ⏎ a line for each choice with its letter ⏎ Answer: the letter."""

    def encode(self, sample: FewShotSample) -> str:
        labels = [f"{label}." for label in sample.candidates]
        listed = zip(labels, sample["texts"], strict=True)
        return self.lines(
            ("Context:", sample["context"]), ("Question:", sample["question"]), *listed,
            ("Answer:", MASK),
        )  # fmt: skip
