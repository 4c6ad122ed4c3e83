"""Template of the diagnosis tasks."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("diagnosis")
class DiagnosisTemplate(FewShotTemplate):
    """The entries between commas, an arrow, the one asked for."""

    def encode(self, sample: FewShotSample) -> str:
        return f"{', '.join(sample['choices'])} → {MASK}"

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return str(sample["choices"][int(candidate)])
