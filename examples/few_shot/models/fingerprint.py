"""Which files a model came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.few_shot.files import sha256_of
from fairseq_lite.training.checkpoint.parts import readable_files


def checkpoint_files(path: str) -> list[Path]:
    """The files of a checkpoint, or of several between colons."""
    return [file for name in path.split(":") if name for file in _files(Path(name))]


def identity_of(found: Sequence[Path]) -> dict[str, Any]:
    """Names, sizes and SHA-256 of files, and one digest of them all."""
    files = [
        {"name": file.name, "size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in found
    ]
    whole = hashlib.sha256("".join(str(each["sha256"]) for each in files).encode()).hexdigest()
    return {"files": files, "sha256": whole}


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
            if found := readable_files(path / name):
                return sorted(found.values())
    return sorted(readable_files(path).values()) or [path]
