"""What `pytest tests/gpu -k` chooses by the words of fairseq's guide for contributors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu.conftest import pytest_collection_modifyitems
from tests.gpu.test_few_shot import MODELS
from tests.smoke.matrix import rows


def items(*names: str) -> Any:
    return [SimpleNamespace(name=name, extra_keyword_matches=set()) for name in names]


@pytest.mark.parametrize(("word", "part"), [("fsdp", "fully_sharded"), ("moe", "experts")])
def test_rows_go_by_the_words_of_the_guide(word: str, part: str) -> None:
    found = items(*(f"test_row[{row}]" for row in rows("cuda")))
    pytest_collection_modifyitems(found)
    chosen = [each.name for each in found if word in each.extra_keyword_matches]
    assert chosen == [each.name for each in found if part in each.name] != []
    assert len(chosen) < len(found)


def test_other_tests_keep_their_names() -> None:
    found = items("test_copa_on_the_cpu[experts]")
    pytest_collection_modifyitems(found)
    assert not found[0].extra_keyword_matches


def test_the_tiny_models_of_the_guide_are_there() -> None:
    assert {"tiny_multi", "tiny_multi_moe"} <= MODELS.keys()
    assert MODELS["tiny_multi_moe"][2] == ["--cap", "1."]
