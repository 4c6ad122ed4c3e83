"""The quickstart's corpus: the same each time, real pairs, nothing of the test set in training."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.helpers.commands import REPOSITORY

pytest.importorskip("babel")


@pytest.fixture(scope="module")
def make_corpus() -> ModuleType:
    path = REPOSITORY / "examples" / "quickstart" / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits(make_corpus):
    return make_corpus.make(train=3000, valid=100, test=200, seed=1)


def test_sizes(splits):
    assert {name: len(pairs) for name, pairs in splits.items()} == {
        "train": 3000,
        "valid": 100,
        "test": 200,
    }


def test_no_sentence_occurs_twice_on_either_side(splits):
    pairs = [pair for part in splits.values() for pair in part]
    for side in (0, 1):
        assert len({pair[side] for pair in pairs}) == len(pairs)


def test_the_same_seed_gives_the_same_corpus(make_corpus, splits):
    assert make_corpus.make(train=3000, valid=100, test=200, seed=1) == splits
    assert make_corpus.make(train=3000, valid=100, test=200, seed=2) != splits


def test_single_names_are_in_training(splits):
    assert ("Germany", "Deutschland") in splits["train"]


def test_written_files_have_as_many_lines(make_corpus, splits, tmp_path):
    make_corpus.write(splits, tmp_path)
    for split, pairs in splits.items():
        for side, language in enumerate(("en", "de")):
            text = (tmp_path / f"{split}.{language}").read_text(encoding="utf-8")
            assert text == "".join(pair[side] + "\n" for pair in pairs)
            assert text.splitlines() == [pair[side] for pair in pairs]
