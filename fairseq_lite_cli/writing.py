"""Small text files that others may read, or a kill interrupt, at any moment."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from fairseq_lite.errors import DataError


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write a text file under another name, flush it to the disk, and rename it.

    Raises:
        DataError: it cannot be written.
    """
    # Long names leave room for what is added; processes of all machines have names of their own.
    part = path.with_name(f".{path.name[:60]}.{secrets.token_hex(8)}~")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "x", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror}") from None
