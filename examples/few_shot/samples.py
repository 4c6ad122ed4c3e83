"""Examples of tasks as plain values."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fairseq_lite.errors import DataError

# Fields that say which row a sample is, or its answer, and not what it asks.
_NO_CONTENT = frozenset(
    {
        *("idx", "id", "uid", "UID", "guid", "pairID", "InputStoryid", "question_id"),
        *("label", "gold", "answer", "AnswerRightEnding"),
        "changed",  # XCOPA: whether the translator changed the sentence
    }
)


@dataclass(frozen=True)
class FewShotSample:
    """One example of a task.

    Attributes:
        data: the row of the data file; templates read it by indexing the sample.
        candidates: what is chosen from; empty where the model writes the answer.
        correct: the right answers: some of `candidates` where there are any.
        subproblems: questions that are answered one by one and belong together (MultiRC); such a
            sample has neither candidates nor answers of its own.
        where: file and line, for messages.
    """

    data: Mapping[str, Any]
    candidates: tuple[str, ...] = ()
    correct: tuple[str, ...] = ()
    subproblems: tuple[FewShotSample, ...] = ()
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for each in self.candidates:
            if not isinstance(each, str):
                raise DataError(
                    f"{self.where or 'a sample'}: a candidate is {each!r}; expected a text"
                )
        strange = [c for c in self.correct if self.candidates and c not in self.candidates]
        if strange:
            raise DataError(
                f"{self.where or 'a sample'}: the answer {strange[0]!r} is no candidate"
            )

    def __getitem__(self, key: str) -> Any:
        try:
            found = self.data[key]
        except KeyError:
            known = ", ".join(sorted(self.data))
            raise DataError(f"{self.where}: there is no field {key!r}; it has {known}") from None
        if found is None:
            raise DataError(f"{self.where}: field {key!r} is null")
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """A field, or what stands for it where there is none."""
        return self.data.get(key, default)

    @functools.cached_property
    def identity(self) -> str:
        """A digest of what it says: equal for the same example in two files."""
        text = json.dumps([self.data, self.candidates], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def content(self) -> str:
        """A digest of what it asks: equal for copies under other numbers or with other answers."""
        data = {name: value for name, value in self.data.items() if name not in _NO_CONTENT}
        text = json.dumps([data, self.candidates], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def problems(self) -> tuple[FewShotSample, ...]:
        """The questions it asks: its subproblems, or itself."""
        return self.subproblems or (self,)

    def with_data(self, **fields: Any) -> FewShotSample:
        """The same example with other fields: what calibration takes the content out with."""
        return replace(self, data={**self.data, **fields})


def choice(
    row: Mapping[str, Any], candidates: Sequence[str], gold: int | None, where: str = ""
) -> FewShotSample:
    """A multiple-choice example.

    Args:
        row: the data.
        candidates: in the order of the file.
        gold: the number of the right one; None where it is not known.
        where: file and line.

    Raises:
        DataError: there is no such candidate.
    """
    if gold is not None and not 0 <= gold < len(candidates):
        raise DataError(f"{where}: the answer is number {gold} of {len(candidates)} candidates")
    correct = () if gold is None else (candidates[gold],)
    return FewShotSample(row, tuple(candidates), correct, where=where)
