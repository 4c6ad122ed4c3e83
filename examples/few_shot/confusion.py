"""Which answers were given for which, in percent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from examples.few_shot.predictors.api import Prediction


def confusion_lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    """A table: a row for each answer given, a column for each right one; percent of all questions.

    Where samples have candidates of their own, answers are told by their numbers.
    """
    named = len({p.sample.candidates for p in predictions}) == 1
    pairs: Counter[tuple[str, str]] = Counter()
    for each in predictions:
        for right in each.sample.correct[:1]:
            pairs[_name(each, each.best.candidate, named), _name(each, right, named)] += 1
    total = sum(pairs.values())
    if not total:
        return
    labels = sorted({label for pair in pairs for label in pair})
    width = max(8, *(len(label) for label in labels)) + 2
    yield "given\\right".ljust(width) + "".join(label.rjust(width) for label in labels)
    for given in labels:
        cells = (f"{100 * pairs[given, right] / total:.1f}%" for right in labels)
        yield given.ljust(width) + "".join(cell.rjust(width) for cell in cells)


def _name(prediction: Prediction, answer: str, named: bool) -> str:
    candidates = prediction.sample.candidates
    return answer if named or answer not in candidates else str(candidates.index(answer))
