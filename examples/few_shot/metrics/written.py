"""Metrics of written answers."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from examples.few_shot.metrics.api import METRICS, Metric, percentage
from examples.few_shot.predictors.api import Prediction


def normalised(text: str) -> str:
    """A text in small letters, without punctuation, articles and needless spaces."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


@METRICS.register("exact-match")
class ExactMatch(Metric):
    """Percentage of questions whose written answer is a right one; of those with a known answer.

    Compared are the texts in small letters, without punctuation, articles and needless spaces, as
    Rajpurkar et al. 2016 do for SQuAD.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        hits = [
            normalised(each.best.candidate) in set(map(normalised, each.sample.correct))
            for each in predictions
            if each.sample.correct
        ]
        return {"exact-match": percentage(hits)}


@METRICS.register("bleu")
class BLEU(Metric):
    """BLEU of the whole set by sacrebleu (Post 2018), against one reference, tokenised as 13a."""

    packages = ("sacrebleu",)

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        from fairseq_lite.scoring.standard import SacrebleuConfig, make_bleu

        written = [each.best.candidate for each in predictions]
        references = [each.sample.correct[0] for each in predictions]
        found = make_bleu(SacrebleuConfig()).corpus_score(written, [references])
        return {"bleu": float(found.score)}
