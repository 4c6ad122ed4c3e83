"""The reference data, where it lies beside the repository; tests skip when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def shared_dir(*parts: str) -> Path:
    """A path inside the folder `shared` beside the repository; skips the test when absent."""
    path = REPOSITORY.parent.joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"reference data absent: {'/'.join(('..', 'shared', *parts))}")
    return path
