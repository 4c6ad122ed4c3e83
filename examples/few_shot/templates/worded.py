"""Templates whose candidates are names of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import FewShotTemplate
from fairseq_lite.errors import DataError


class Worded(FewShotTemplate):
    """A template whose candidates stand for other words.

    Attributes:
        words: what is said for each candidate.
    """

    words: ClassVar[Mapping[str, str]] = {"false": "False", "true": "True"}

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        try:
            return self.words[candidate]
        except KeyError:
            raise DataError(
                f"{sample.where}: {type(self).__name__} has no word for {candidate!r}; it has words"
                f" for {', '.join(self.words)}: choose another template"
            ) from None
