"""`average_option` calibration: what a candidate scores without content is taken off its score.

An option empties or replaces fields of the sample: `question::`, or several at once,
`sentence1:: | sentence2::N/A`. Each option gives a copy of the question; a candidate's scores in
all copies are averaged and subtracted from its score (Zhao et al. 2021, section 5, with a
difference of log-probabilities in place of their division).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from examples.few_shot.samples import FewShotSample
from fairseq_lite.errors import ConfigError

AVERAGE_OPTION = "average_option"


def replacements(option: str) -> dict[str, str]:
    """The fields that an option replaces, and by what.

    Raises:
        ConfigError: it is not written as `field::value | field::value`.
    """
    found: dict[str, str] = {}
    for part in option.split("|"):
        name, colons, value = part.strip().partition("::")
        if not colons or not name.strip():
            raise ConfigError(
                f"calibration option {option!r}: expected field::value, several of them between"
                " bars, as in 'sentence1:: | sentence2::'"
            )
        found[name.strip()] = value.strip()
    return found


def copies(sample: FewShotSample, options: Sequence[str]) -> list[FewShotSample]:
    """The copies of a question that options make.

    Raises:
        ConfigError: a field that the sample does not have.
    """
    found = []
    for option in options:
        fields = replacements(option)
        for name in fields:
            if name not in sample.data:
                raise ConfigError(
                    f"calibration option {option!r}: samples have no field {name!r}; they have"
                    f" {', '.join(sorted(sample.data))}"
                )
        found.append(sample.with_data(**fields))
    return found


def average(scores: Sequence[Sequence[float]], candidates: int) -> list[float]:
    """The mean score of each candidate over the copies; 0 where there is no copy."""
    if not scores:
        return [0.0] * candidates
    return [math.fsum(each[j] for each in scores) / len(scores) for j in range(candidates)]
