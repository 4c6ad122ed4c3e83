"""Template of PIQA."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("piqa")
class PIQATemplate(FewShotTemplate):
    """The goal, the way there."""

    def encode(self, sample: FewShotSample) -> str:
        return " ".join(filter(None, [str(sample["goal"]).strip(), MASK]))

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return str(sample[candidate]).strip()
