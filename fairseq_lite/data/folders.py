"""Data folders as they are typed, and the names of the parts of a split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from fairseq_lite.errors import ConfigError, DataError


def data_folders(data: str | None) -> list[str]:
    """The folders of a `data` argument, which must exist.

    Args:
        data: a folder, or several with colons.

    Raises:
        ConfigError: none given.
        DataError: one of them is not a folder.
    """
    folders = [part for part in (data or "").split(":") if part]
    if not folders:
        raise ConfigError("no data: give the folder made by flite-preprocess as the first word")
    for folder in folders:
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such data folder; make it with flite-preprocess")
    return folders


def part_names(split: str) -> Iterator[str]:
    """`valid`, `valid1`, `valid2`, … without end."""
    yield split
    for number in itertools.count(1):
        yield f"{split}{number}"
