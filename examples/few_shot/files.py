"""Public data files, read row by row: JSON lines, TSV, CSV, plain lines; compressed or not."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import lzma
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fairseq_lite.errors import DataError

DATA_VARIABLE = "FSD"
DEFAULT_DATA_DIR = Path(__file__).parent / "data"

Row = tuple[dict[str, Any], str]  # and where it stands, for messages


def data_root(given: str | Path | None) -> Path:
    """`--data-dir`, else the environment variable FSD, else `examples/few_shot/data`."""
    return Path(given or os.environ.get(DATA_VARIABLE) or DEFAULT_DATA_DIR).expanduser()


def existing(task: str, root: Path, names: tuple[str, ...]) -> Path:
    """The first of a set's possible files that is there.

    Raises:
        DataError: none is; the message says where the file belongs.
    """
    for name in names:
        path = root / name
        if path.exists():
            return path
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    raise DataError(
        f"task {task}: {root / names[0]} is missing{others}; put the task's public file there, or"
        f" name its folder with --data-dir or {DATA_VARIABLE}"
    )


def open_text(path: Path) -> io.TextIOBase:
    """A text file in UTF-8; .gz and .xz are unpacked while read; lines end at newlines only."""
    openers: Mapping[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    raw = openers.get(path.suffix, open)(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines without their ends, and where they stand.

    Raises:
        DataError: the file is not to be read, or is not UTF-8.
    """
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                yield line.rstrip("\r\n"), f"{path}:{number}"
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as e:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {e}") from None


def read_text(path: Path) -> str:
    """A whole file, as it is.

    Raises:
        DataError: the file is not to be read, or is not UTF-8.
    """
    try:
        with open_text(path) as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as e:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {e}") from None


def read_json(path: Path) -> Any:
    """A file that is one JSON value.

    Raises:
        DataError: it is not.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise DataError(f"{path}:{e.lineno}: is not JSON: {e.msg} at column {e.colno}") from None


def read_jsonl(path: Path) -> Iterator[Row]:
    """JSON objects, one a line; empty lines are left out.

    Raises:
        DataError: a line is no JSON object.
    """
    for line, where in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise DataError(f"{where}: is not JSON: {e.msg} at column {e.colno}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        if "\\ud" in line.lower() and _has_half_character(row):
            raise DataError(f"{where}: has half a character, one \\ud… without its other")
        yield row, where


def _has_half_character(row: dict[str, Any]) -> bool:
    """Whether a text of a row cannot be written as UTF-8: escapes can stand for such."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def read_tsv(path: Path, fields: tuple[str, ...] | None = None) -> Iterator[Row]:
    r"""Rows of fields between tabs, without quoting.

    Args:
        path: the file.
        fields: their names; None: the first line has them.

    Raises:
        DataError: a row has another number of fields.
    """
    for line, where in read_lines(path):
        if fields is None:
            fields = tuple(line.split("\t"))
            continue
        values = line.split("\t")
        if not line:
            continue
        if len(values) != len(fields):
            raise DataError(f"{where}: {len(values)} fields; expected {len(fields)}: {fields}")
        yield dict(zip(fields, values, strict=True)), where


def read_csv(
    path: Path, fields: tuple[str, ...] | None = None, delimiter: str = ","
) -> Iterator[Row]:
    """Rows of a CSV file with quoting.

    Args:
        path: the file.
        fields: their names; None: the first line has them.
        delimiter: between fields.

    Raises:
        DataError: it cannot be read, or a row has another number of fields.
    """
    try:
        with open_text(path) as file:
            reader = csv.DictReader(file, fieldnames=fields, delimiter=delimiter)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: expected {len(reader.fieldnames or ())} fields")
                yield row, where
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: cannot be read as CSV: {e}") from None


READERS: Mapping[str, Any] = {".jsonl": read_jsonl, ".tsv": read_tsv, ".csv": read_csv}


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file of a kind that its name tells.

    Raises:
        DataError: no known kind.
    """
    suffixes = [s for s in path.suffixes if s not in (".gz", ".xz")]
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"{path}: expected a name that ends in {known} (or these with .gz, .xz)")
    yield from READERS[kind](path)


def sha256_of(path: Path) -> str:
    """The digest of a file's contents, which are never in memory whole.

    Raises:
        DataError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                found.update(piece)
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    return found.hexdigest()
