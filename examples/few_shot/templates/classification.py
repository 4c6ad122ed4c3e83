"""Templates of sentiment and topics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES
from examples.few_shot.templates.worded import Worded


@TEMPLATES.register("sentimentanalysis")
class SentimentTemplate(Worded):
    """The sentence and a full stop ⏎ All in all, it was good or bad."""

    words: ClassVar[Mapping[str, str]] = {"0": "bad", "1": "good"}

    def encode(self, sample: FewShotSample) -> str:
        sentence = str(sample["sentence"]).removesuffix(" .")
        return self.lines(
            ("", f"{sentence} ." if sentence else ""), ("", f"All in all, it was {MASK}")
        )


@TEMPLATES.register("agnews")
class AGNewsTemplate(Worded):
    """Article ⏎ Topic: World, Sports, Business or Technology."""

    words: ClassVar[Mapping[str, str]] = {
        "World": "World",
        "Sports": "Sports",
        "Business": "Business",
        "Sci/Tech": "Technology",
    }

    def encode(self, sample: FewShotSample) -> str:
        article = " ".join(filter(None, (sample["title"], sample["description"])))
        return self.lines(("Article:", article), ("Topic:", MASK))
