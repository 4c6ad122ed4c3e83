"""Template of translation."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("mt")
class TranslationTemplate(FewShotTemplate):
    """The sentence, an equals sign, its translation. The translation ends with its line."""

    def encode(self, sample: FewShotSample) -> str:
        return f"{sample['source']} = {MASK}"

    def postprocess(self, sample: FewShotSample, text: str) -> str:
        return text.strip().partition("\n")[0].strip()
