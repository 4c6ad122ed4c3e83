"""Template of questions without documents."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("odqa")
class OpenQuestionTemplate(FewShotTemplate):
    """Q ⏎ A; a question mark where there is no mark. The answer ends with its line."""

    def encode(self, sample: FewShotSample) -> str:
        question = str(sample["question"])
        mark = "?" if question[-1:].isalnum() else ""
        return self.lines(("Q:", question + mark), ("A:", MASK))

    def postprocess(self, sample: FewShotSample, text: str) -> str:
        # Shots may stand in one line: the model goes on with another question.
        return text.strip().partition("\n")[0].partition("Q:")[0].strip()
