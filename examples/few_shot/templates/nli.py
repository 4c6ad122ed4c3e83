"""Templates of natural language inference in English: CB, RTE, SNLI, MNLI, ANLI, diagnostics.

Each serves every task whose samples are pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES
from examples.few_shot.templates.text import capitalised, decapitalised, without_marks
from examples.few_shot.templates.worded import Worded

TRUTH = {
    "entailment": "True",
    "not_entailment": "False",
    "contradiction": "False",
    "neutral": "Neither",
}


@TEMPLATES.register("gpt3stylenli")
class GPT3StyleNLITemplate(Worded):
    """Paragraph ⏎ Question True, False, or Neither? ⏎ Answer."""

    words: ClassVar[Mapping[str, str]] = TRUTH

    def encode(self, sample: FewShotSample) -> str:
        question = f"{sample['hypothesis']} True, False, or Neither?".lstrip()
        return self.lines(
            ("Paragraph:", sample["premise"]), ("Question:", question), ("Answer:", MASK)
        )


@TEMPLATES.register("petstylenli")
class PETStyleNLITemplate(Worded):
    """Premise? <mask>, hypothesis: Yes, No or Maybe."""

    words: ClassVar[Mapping[str, str]] = {
        "entailment": "Yes",
        "not_entailment": "No",
        "contradiction": "No",
        "neutral": "Maybe",
    }

    def encode(self, sample: FewShotSample) -> str:
        premise = without_marks(sample["premise"])
        hypothesis = decapitalised(sample["hypothesis"])
        return (
            (f"{premise}? " if premise else "") + MASK + (f", {hypothesis}" if hypothesis else "")
        )


@TEMPLATES.register("generativenli")
class GenerativeNLITemplate(Worded):
    """Premise, right? <mask>, hypothesis: Yes, No or Also."""

    words: ClassVar[Mapping[str, str]] = {
        "entailment": "Yes",
        "not_entailment": "No",
        "contradiction": "No",
        "neutral": "Also",
    }

    def encode(self, sample: FewShotSample) -> str:
        premise = capitalised(without_marks(sample["premise"]))
        hypothesis = decapitalised(sample["hypothesis"])
        before = f"{premise}, right? " if premise else ""
        return before + MASK + (f", {hypothesis}" if hypothesis else "")


def asked(sample: FewShotSample) -> str:
    """The hypothesis as a question; empty if there is none."""
    question = without_marks(sample["hypothesis"])
    return f"{capitalised(question)}?" if question else ""


@TEMPLATES.register("cb")
class CBTemplate(Worded):
    """Paragraph ⏎ Question? True, False, or Neither? ⏎ Answer."""

    words: ClassVar[Mapping[str, str]] = TRUTH

    def encode(self, sample: FewShotSample) -> str:
        question = f"{asked(sample)} True, False, or Neither?".lstrip()
        return self.lines(
            ("Paragraph:", sample["premise"]), ("Question:", question), ("Answer:", MASK)
        )


@TEMPLATES.register("cb_no_struct", aliases=("cbno_struct",))
class CBNoStructTemplate(Worded):
    """As cb, without labels in front of the fields."""

    words: ClassVar[Mapping[str, str]] = TRUTH

    def encode(self, sample: FewShotSample) -> str:
        question = f"{asked(sample)} True, False, or Neither?".lstrip()
        return self.lines(("", sample["premise"]), ("", question), ("", MASK))


@TEMPLATES.register("cb_gpt3_reproduce")
class CBGPT3Template(Worded):
    """CB as in Brown et al. (2020, appendix G): small letters, fields in lines of their own."""

    words: ClassVar[Mapping[str, str]] = {name: word.lower() for name, word in TRUTH.items()}

    def encode(self, sample: FewShotSample) -> str:
        said = without_marks(sample["hypothesis"])
        said = f"{capitalised(said)}. " if said else ""
        question = f"question: {said}true, false, or neither?"
        return "\n".join(filter(None, (sample["premise"], question, f"answer: {MASK}")))


@TEMPLATES.register("rte")
class RTETemplate(Worded):
    """Premise ⏎ question: hypothesis True or False? ⏎ answer."""

    words: ClassVar[Mapping[str, str]] = TRUTH

    def encode(self, sample: FewShotSample) -> str:
        said = sample["hypothesis"]
        question = f"question: {said} True or False?" if said else ""
        fields = (sample["premise"], question, f"answer: {MASK}")
        return self._between().join(filter(None, fields))

    def _between(self) -> str:
        return self.sep


@TEMPLATES.register("rte_gpt3_reproduce")
class RTEGPT3Template(RTETemplate):
    """RTE as in Brown et al. (2020, appendix G): fields in lines of their own."""

    def _between(self) -> str:
        return "\n"
