"""The figures of a training log that was written with `--log-format json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

Record = dict[str, float]


@dataclass
class Log:
    """The records of a run by number of updates; what was logged twice counts once, as it was last.

    Attributes:
        inner: what was logged within epochs.
        epochs: the summaries of training data.
        valid: the validations, by split.
    """

    inner: dict[int, Record] = field(default_factory=dict)
    epochs: dict[int, Record] = field(default_factory=dict)
    valid: dict[str, dict[int, Record]] = field(default_factory=dict)


def read(lines: Iterable[str]) -> Log:
    """Find the records among the lines of a log.

    A summary's keys begin with the name of its split, which is taken off: `valid_loss`.
    """
    log = Log()
    for line in lines:
        start = line.find("{")
        if start < 0 or "num_updates" not in line:
            continue
        try:
            found = json.loads(line[start:])
        except ValueError:  # cut by a kill
            continue
        names = [name for name in found if name.endswith("num_updates")]
        if not isinstance(found, dict) or len(names) != 1:
            continue
        split = names[0].removesuffix("num_updates").removesuffix("_")
        record = _numbers(found, f"{split}_" if split else "")
        updates = int(record["num_updates"])
        if not split:
            log.inner[updates] = record
        elif split == "train":
            log.epochs[updates] = record
        else:
            log.valid.setdefault(split, {})[updates] = record
    return log


def _numbers(found: dict[str, object], prefix: str) -> Record:
    numbers = {}
    for name, value in found.items():
        try:
            numbers[name.removeprefix(prefix)] = float(str(value))
        except ValueError:
            continue
    return numbers
