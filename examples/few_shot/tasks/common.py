"""What tasks share: fields that go by several names, and rows of other public formats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import Paths


@dataclass(frozen=True)
class NamedSample(FewShotSample):
    """A sample some of whose fields go by several names; to change one is to change all of them.

    Templates and calibration options of one task then serve another.

    Attributes:
        names: groups of fields that say the same.
    """

    names: tuple[tuple[str, ...], ...] = field(default=(), compare=False)

    def with_data(self, **fields: Any) -> FewShotSample:
        for group in self.names:
            said = [fields[name] for name in group if name in fields]
            if said:
                fields |= dict.fromkeys(group, said[-1])
        return super().with_data(**fields)


def named(
    data: Mapping[str, Any],
    names: Sequence[tuple[str, ...]],
    candidates: Sequence[str],
    correct: str | None,
    where: str,
) -> NamedSample:
    """A multiple-choice sample whose fields have several names.

    Args:
        data: the first name of each group with its text, and fields that have one name.
        names: groups of names.
        candidates: in order.
        correct: the right one; None where it is not known.
        where: file and line.

    Raises:
        DataError: the right one is no candidate.
    """
    data = {**data, **{name: data[group[0]] for group in names for name in group}}
    answer = () if correct is None else (correct,)
    return NamedSample(data, tuple(candidates), answer, where=where, names=tuple(names))


PAIR = (("premise", "sentence1"), ("hypothesis", "sentence2"))


def pair(
    first: str, second: str, candidates: Sequence[str], correct: str | None, where: str, **more: Any
) -> NamedSample:
    """Two texts and how they relate: `premise` or `sentence1`, `hypothesis` or `sentence2`."""
    data = {"premise": str(first).strip(), "hypothesis": str(second).strip(), **more}
    return named(data, PAIR, candidates, correct, where)


def superglue(folder: str, val: tuple[str, ...] = ()) -> dict[str, Paths]:
    """The files of a task of SuperGLUE: as in its archive, as others lay them out, as FewGLUE's.

    Args:
        folder: its name in the archive.
        val: further names of what is evaluated.
    """
    found: dict[str, Paths] = {}
    further = {"train": (f"fewglue/{folder}/train.jsonl",), "val": val}
    for name in ("train", "val", "test"):
        file = f"{name}.jsonl"
        small = folder.lower()
        found[name] = (
            f"{folder}/{file}", f"SuperGLUE/{folder}/{file}", f"{small}/{file}",
            f"superglue_{small}/{file}", *further.get(name, ()),
        )  # fmt: skip
    return found


def gap(behind: str) -> str:
    """What stands between a word and the text behind it, which has lost it: a space or nothing."""
    return "" if re.match(r"$|[.,;:!?)]|['’]s\b", behind) else " "


def masked(row: Mapping[str, Any]) -> tuple[str, tuple[str, str], str] | None:
    """A row that gives a sentence twice, with either answer in place, and how it goes on.

    Args:
        row: `context_options`, `continuation`.

    Returns:
        The text in front of the answers, the answers, the text behind them; None for another row.
    """
    if "context_options" not in row:
        return None
    one, other = row["context_options"]
    # Whole words only, and one word at least for each answer.
    parting = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    start = one.rfind(" ", 0, next(parting, min(len(one), len(other)))) + 1
    behind = str(row["continuation"])
    return one[:start], (one[start:], other[start:]), gap(behind) + behind


def masked_choice(row: Mapping[str, Any], where: str) -> FewShotSample | None:
    """A row of `masked` as a sample with the fields `txt1` and `txt2`; None for another row."""
    found = masked(row)
    if found is None:
        return None
    before, options, behind = found
    data = {"txt1": before, "txt2": behind, "pron": ""}
    return choice(data, options, row.get("gold"), where)
