"""Template of SAT analogies."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("satanalogies")
class SATAnalogiesTemplate(FewShotTemplate):
    """One word is to another as a third is to a fourth."""

    def encode(self, sample: FewShotSample) -> str:
        stem = sample["stem"]
        return f"{stem[0]} is to {stem[1]} as {MASK}" if stem else MASK

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        one, other = sample["choices"][candidate]
        return f"{one} is to {other}"
