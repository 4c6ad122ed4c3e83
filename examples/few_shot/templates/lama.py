"""Template of LAMA and mLAMA."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.lama import GAP
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("lama", aliases=("mlama",))
class LAMATemplate(FewShotTemplate):
    """The sentence, with the answer in its place."""

    def encode(self, sample: FewShotSample) -> str:
        return str(sample["sentence"]).replace(GAP, MASK)
