"""Template of StoryCloze."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("storycloze")
class StoryClozeTemplate(FewShotTemplate):
    """The four sentences, the ending."""

    def encode(self, sample: FewShotSample) -> str:
        story = [str(sample[f"InputSentence{n}"]).strip() for n in range(1, 5)]
        return " ".join(filter(None, [*story, MASK]))

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return str(sample[f"RandomFifthSentenceQuiz{candidate}"]).strip()
