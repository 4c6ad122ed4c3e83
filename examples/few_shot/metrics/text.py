"""Metrics of running text: the last word of a passage, perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from examples.few_shot.metrics.api import METRICS, Metric, mean, percentage
from examples.few_shot.predictors.api import Prediction
from examples.few_shot.scoring import perplexity


@METRICS.register("last_word_accuracy")
class LastWord(Metric):
    """Percentage of passages whose last word has the likeliest token in each of its places.

    last_word_perplexity: exp of the mean negative log-probability of the last word, of which each
    counts once, however many tokens it has.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        known = [each.best.meta for each in predictions if "greedy" in each.best.meta]
        # The tail begins behind the prompt, where the word is the one candidate.
        sums = [math.fsum(meta["tail_scores"]) for meta in known]
        return {
            "last_word_accuracy": percentage([meta["greedy"] for meta in known]),
            "last_word_perplexity": perplexity(mean(sums), 1),
        }


@METRICS.register("rolling_perplexity")
class RollingPerplexity(Metric):
    """Perplexities of all texts together, whose tokens are predicted from those in front of them.

    token_perplexity, word_perplexity, byte_perplexity: exp of the negative log-probability of all
    texts over the number of tokens, of words between spaces, of bytes in UTF-8. bits_per_byte: the
    same for bytes in bits, the logarithm of base 2 of byte_perplexity.
    """

    def score(self, predictions: Sequence[Prediction]) -> Mapping[str, float]:
        total = math.fsum(each.best.score for each in predictions)
        counts = {
            unit: sum(each.best.meta[unit] for each in predictions)
            for unit in ("tokens", "words", "bytes")
        }
        found = {
            f"{unit.removesuffix('s')}_perplexity": perplexity(total, count)
            for unit, count in counts.items()
        }
        bits = -total / math.log(2) / counts["bytes"] if counts["bytes"] else math.nan
        return found | {"bits_per_byte": bits}
