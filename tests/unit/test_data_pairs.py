"""Pairs: the sample a model reads, and the same batches as fairseq on the reference data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fairseq_lite.data.batching import shuffled
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import MemoryDataset, open_dataset
from fairseq_lite.data.pairs import PairDataset
from fairseq_lite.errors import DataError
from tests.helpers.shared import shared_dir

SOURCES = [[4, 2], [5, 6, 7, 2], [8, 9, 2]]
TARGETS = [[14, 15, 2], [16, 2], [17, 18, 19, 20, 2]]


def _dictionary() -> Dictionary:
    d = Dictionary()
    for i in range(4, 30):
        d.add_symbol(f"w{i}")
    return d


def _pairs(target=TARGETS, **options) -> PairDataset:
    tgt = None if target is None else MemoryDataset.of(target)
    return PairDataset(MemoryDataset.of(SOURCES), tgt, _dictionary(), **options)


def test_sample() -> None:
    sample = _pairs().collate([0, 1, 2])
    assert sample["id"].tolist() == [1, 2, 0]
    assert sample["nsentences"] == 3 and sample["ntokens"] == 10
    net = sample["net_input"]
    assert net["src_tokens"].tolist() == [[5, 6, 7, 2], [1, 8, 9, 2], [1, 1, 4, 2]]
    assert net["src_lengths"].tolist() == [4, 3, 2]
    assert sample["target"].tolist() == [[16, 2, 1, 1, 1], [17, 18, 19, 20, 2], [14, 15, 2, 1, 1]]
    assert net["prev_output_tokens"].tolist() == [
        [2, 16, 1, 1, 1],
        [2, 17, 18, 19, 20],
        [2, 14, 15, 1, 1],
    ]
    assert all(t.dtype == torch.int64 for t in (sample["id"], sample["target"], *net.values()))


def test_samples_of_single_examples_collate_the_same() -> None:
    pairs = _pairs()
    one, two = pairs.collate([2, 0]), pairs.collate([pairs[2], pairs[0]])
    assert torch.equal(one["target"], two["target"]) and torch.equal(one["id"], two["id"])
    assert torch.equal(one["net_input"]["src_tokens"], two["net_input"]["src_tokens"])


def test_padding_sides_and_multiple() -> None:
    sample = _pairs(left_pad_source=False, left_pad_target=True, pad_to_multiple=4).collate([0, 2])
    assert sample["net_input"]["src_tokens"].tolist() == [[8, 9, 2, 1], [4, 2, 1, 1]]
    assert sample["target"].shape == (2, 8)
    assert sample["net_input"]["prev_output_tokens"][1].tolist() == [1, 1, 1, 1, 1, 2, 14, 15]


def test_without_target() -> None:
    sample = _pairs(target=None).collate([0, 1])
    assert sample["target"] is None and sample["ntokens"] == 6
    assert "prev_output_tokens" not in sample["net_input"]
    assert _pairs().collate([]) == {}


def test_eos_and_bos() -> None:
    pairs = _pairs(
        target=[[14], [15, 2], [16]],
        remove_eos_from_source=True,
        append_eos_to_target=True,
        append_bos=True,
        left_pad_source=False,
    )
    sample = pairs.collate([0, 1, 2])
    assert sample["net_input"]["src_tokens"].tolist() == [[0, 5, 6, 7], [0, 8, 9, 1], [0, 4, 1, 1]]
    assert sample["target"].tolist() == [[0, 15, 2], [0, 16, 2], [0, 14, 2]]


def test_unequal_sides() -> None:
    with pytest.raises(DataError, match="equally many"):
        _pairs(target=TARGETS[:2])


def test_filter_and_batches() -> None:
    pairs = _pairs(shuffle=False)
    assert pairs.sizes.tolist() == [[2, 3], [4, 2], [3, 5]]
    assert pairs.num_tokens().tolist() == [3, 4, 5]
    assert [b.tolist() for b in pairs.batches(max_sentences=2)] == [[0, 2], [1]]
    with pytest.raises(DataError, match="valid: 1 examples are too long; example 2 has 3/5"):
        pairs.batches(max_tokens=100, max_positions=(4, 4), name="valid")
    found = pairs.batches(max_tokens=100, max_positions=4, skip_invalid=True)
    assert [b.tolist() for b in found] == [[0, 1]]


def test_buckets() -> None:
    rng = np.random.RandomState(0)
    items = [[4] * n + [2] for n in rng.randint(1, 50, 300)]
    data = MemoryDataset.of(items)
    pairs = PairDataset(data, data, _dictionary(), num_buckets=3)
    batches = pairs.batches(max_tokens=400, required_multiple=8)
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    shapes = {tuple(pairs.collate(b)["target"].shape) for b in batches}
    assert len({columns for _, columns in shapes}) <= 3
    assert all(rows * columns <= 400 for rows, columns in shapes)
    sample = pairs.collate(batches[0])
    assert sample["ntokens"] == sum(len(items[i]) for i in batches[0])


@pytest.mark.parametrize(
    ("log", "options", "world"),
    [
        ("uf1", {"max_tokens": 2000}, 1),
        ("uf2", {"max_tokens": 2000}, 2),
        ("np2", {"max_tokens": 2000}, 2),
        ("ce_bs48", {"max_tokens": 2000, "max_sentences": 48}, 1),
    ],
)
def test_the_reference_batches(log, options, world) -> None:
    """Sentences and target tokens of every update equal those fairseq logged."""
    folder = shared_dir("reference", "mt")
    dictionary = Dictionary.load(folder / "data-bin" / "dict.en.txt")
    src, tgt = (
        open_dataset(folder / "data-bin" / f"train.en-de.{lang}", None, dictionary)
        for lang in ("en", "de")
    )
    pairs = PairDataset(src, tgt, dictionary)
    batches = pairs.batches(required_multiple=8, seed=7, max_positions=(1024, 1024), **options)
    order = shuffled(len(batches), 7 + 1)
    records = [json.loads(line) for line in (folder / "logs" / f"{log}.jsonl").open()]
    updates = [r for r in records if "bsz" in r]
    assert len(updates) >= 20
    for number, record in enumerate(updates[:20]):
        group = order[number * world : (number + 1) * world]
        samples = [pairs.collate(batches[k]) for k in group]
        assert sum(s["nsentences"] for s in samples) == int(record["bsz"])
        assert sum(s["ntokens"] for s in samples) == int(record["wpb"])
