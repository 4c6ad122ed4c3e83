"""The prompt that a row brings itself."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("query")
class QueryTemplate(FewShotTemplate):
    """The row's `query`, a space, and one of its `choices`, both as they are."""

    def encode(self, sample: FewShotSample) -> str:
        return f"{sample['query']} {MASK}".lstrip()

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        if "choices" not in sample.data:
            return candidate
        return str(sample["choices"][sample.candidates.index(candidate)])
