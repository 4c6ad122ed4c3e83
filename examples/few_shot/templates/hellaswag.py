"""Templates of HellaSwag."""

from __future__ import annotations

import re

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("hellaswag")
class HellaSwagTemplate(FewShotTemplate):
    """The label of the activity, a colon, what has happened, the ending."""

    def encode(self, sample: FewShotSample) -> str:
        label, context = self.text(sample["activity_label"]), self.text(sample["ctx"])
        return " ".join(filter(None, [f"{label}:" if label else "", context, MASK]))

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return self.text(sample["endings"][int(candidate)])

    def text(self, text: str) -> str:
        """A text of the row as it stands in the prompt."""
        return " ".join(text.split())


@TEMPLATES.register("hellaswag_clean")
class HellaSwagCleanTemplate(HellaSwagTemplate):
    """The same without the marks that WikiHow's texts bear: [header], [title], [step]."""

    def text(self, text: str) -> str:
        return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())
