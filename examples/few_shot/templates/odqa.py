"""Template of questions without documents."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("odqa")
class OpenQuestionTemplate(FewShotTemplate):
    """Q ⏎ A. The answer ends with its line."""

    def encode(self, sample: FewShotSample) -> str:
        return self.lines(("Q:", sample["question"]), ("A:", MASK))

    def postprocess(self, sample: FewShotSample, text: str) -> str:
        # Shots may stand in one line: the model goes on with another question.
        return text.strip().partition("\n")[0].partition("Q:")[0].strip()
