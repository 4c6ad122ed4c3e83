"""Names that `pytest tests/gpu -k` knows rows by beside their own: those of fairseq's branch."""

from __future__ import annotations

import pytest

# Part of a row's name -> what else it goes by.
ALSO = {"fully_sharded": "fsdp", "experts": "moe"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let `-k fsdp` and `-k moe` choose what they chose there."""
    for item in items:
        item.extra_keyword_matches.update(
            other for name, other in ALSO.items() if "test_row" in item.name and name in item.name
        )
