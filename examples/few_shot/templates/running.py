"""Templates that add no words: LAMBADA, one's own texts, running text."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate


@TEMPLATES.register("lambada")
class LAMBADATemplate(FewShotTemplate):
    """The passage, its last word."""

    def encode(self, sample: FewShotSample) -> str:
        return f"{sample['context']} {MASK}"


@TEMPLATES.register("processtext")
class ProcessTextTemplate(FewShotTemplate):
    """The text with the candidate where it has <mask>, or behind it."""

    def encode(self, sample: FewShotSample) -> str:
        text = str(sample["text"])
        return text if MASK in text else " ".join(filter(None, [text, MASK]))


@TEMPLATES.register("perplexity")
class PerplexityTemplate(FewShotTemplate):
    """The text as it is."""

    def encode(self, sample: FewShotSample) -> str:
        return MASK

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return str(sample["text"])
