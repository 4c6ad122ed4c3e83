"""Template of BLiMP."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("blimp")
class BLiMPTemplate(FewShotTemplate):
    """The sentence alone."""

    def encode(self, sample: FewShotSample) -> str:
        return MASK

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return str(sample[candidate])
