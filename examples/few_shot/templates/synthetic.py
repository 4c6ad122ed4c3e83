"""Template of sums and scrambled words."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("synthetic")
class SyntheticTemplate(FewShotTemplate):
    """The question as its file has it, the answer. The answer is one word."""

    def encode(self, sample: FewShotSample) -> str:
        return f"{sample['context']} {MASK}"

    def postprocess(self, sample: FewShotSample, text: str) -> str:
        # Shots may stand in one line: the model goes on with another question.
        return (text.split() or [""])[0]


@TEMPLATES.register("unscrambling")
class UnscramblingTemplate(SyntheticTemplate):
    """The same behind what is to be done, in the words of Brown et al. 2020."""

    task_description = "Please unscramble the letters into a word, and write that word:"
