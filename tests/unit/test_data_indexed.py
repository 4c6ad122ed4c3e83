"""Indexed files: bytes, batched reading, older formats, and damage that is named."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import (
    ConcatDataset,
    IndexedDataset,
    IndexedWriter,
    MemoryDataset,
    TruncatedDataset,
    best_dtype,
    open_dataset,
)
from fairseq_lite.errors import DataError
from tests.helpers.shared import shared_dir

ITEMS = [[4, 5, 2], [2], [6, 7, 8, 9, 2], [], [4, 2]]


@pytest.fixture
def prefix(tmp_path):
    writer = IndexedWriter(tmp_path / "train", np.uint16)
    for item in ITEMS:
        writer.add(item)
    writer.finalize()
    return tmp_path / "train"


def test_bytes_on_disk(prefix) -> None:
    index = prefix.with_suffix(".idx").read_bytes()
    sizes = [len(i) for i in ITEMS]
    offsets = [2 * sum(sizes[:k]) for k in range(len(sizes))]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, 8, 5)
    assert index == head + struct.pack("<5i", *sizes) + struct.pack("<5q", *offsets)
    flat = [t for i in ITEMS for t in i]
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack(f"<{len(flat)}H", *flat)
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["train.bin", "train.idx"]


def test_reading(prefix) -> None:
    data = IndexedDataset(prefix)
    assert len(data) == 5 and data.sizes.tolist() == [3, 1, 5, 0, 2]
    assert [data[i].tolist() for i in range(5)] == ITEMS
    assert data[-1].tolist() == ITEMS[-1] and data[0].dtype == np.int64
    with pytest.raises(IndexError):
        data[5]
    for order in ([4, 0, 2, 2, 3], [0, 1, 2], [], [3], [1, 2, 3, 4]):
        tokens, sizes = data.gather(order)
        assert tokens.tolist() == [t for i in order for t in ITEMS[i]]
        assert sizes.tolist() == [len(ITEMS[i]) for i in order]


def test_pickles_as_its_path(prefix) -> None:
    data = IndexedDataset(prefix)
    data.check_vocabulary(100)
    blob = pickle.dumps(data)
    assert len(blob) < 500
    assert pickle.loads(blob)[2].tolist() == ITEMS[2]


def test_best_dtype() -> None:
    assert best_dtype(65499) == np.uint16 and best_dtype(65500) == np.uint32
    assert best_dtype(None) == np.uint32 and best_dtype(4294967295) == np.int64


def test_append_equals_adding(tmp_path, prefix) -> None:
    writer = IndexedWriter(tmp_path / "both", np.uint16)
    writer.add([9, 2])
    writer.append(prefix)
    writer.finalize()
    data = IndexedDataset(tmp_path / "both")
    assert [data[i].tolist() for i in range(6)] == [[9, 2], *ITEMS]


def test_an_empty_dataset(tmp_path) -> None:
    IndexedWriter(tmp_path / "e", np.uint16).finalize()
    data = IndexedDataset(tmp_path / "e")
    assert len(data) == 0 and data.gather([])[0].tolist() == []


def test_vocabulary_is_checked(prefix) -> None:
    IndexedDataset(prefix).check_vocabulary(10)
    with pytest.raises(DataError, match="id 9 does not fit the dictionary of 9"):
        IndexedDataset(prefix).check_vocabulary(9)


@pytest.mark.parametrize("impl", [None, "cached", "lazy"])
def test_legacy_format(tmp_path, impl) -> None:
    flat = [t + 1 for i in ITEMS for t in i]
    sizes = [len(i) for i in ITEMS]
    ends = [0, *np.cumsum(sizes).tolist()]
    (tmp_path / "x.bin").write_bytes(struct.pack(f"<{len(flat)}i", *flat))
    (tmp_path / "x.idx").write_bytes(
        b"TNTIDX\0\0"
        + struct.pack("<5Q", 1, 4, 4, 5, 5)
        + struct.pack("<6q", *range(6))
        + struct.pack("<6q", *ends)
        + struct.pack("<5q", *sizes)
    )
    data = open_dataset(tmp_path / "x", impl)
    assert [data[i].tolist() for i in range(5)] == ITEMS
    assert data.gather([2, 0])[0].tolist() == ITEMS[2] + ITEMS[0]


def test_raw_text(tmp_path) -> None:
    d = Dictionary()
    d.add_symbol("a")
    (tmp_path / "train.en").write_text("a b\n\na\r\na", newline="")
    data = open_dataset(tmp_path / "train.en", None, d)
    assert [data[i].tolist() for i in range(4)] == [[4, 3, 2], [2], [4, 2], [4, 2]]


def test_damage_is_named(tmp_path, prefix) -> None:
    idx, bin_ = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    good = idx.read_bytes()
    for content, says in [
        (good[:-1], "cut short"),
        (good[:20], "cut short"),
        (good + b"x", "longer"),
        (b"nonsense" * 9, "not an index file"),
        (b"", "not an index file"),
        (good[:9] + b"\7" + good[10:], "version 7"),
        (good[:17] + b"\x63" + good[18:], "type code 99"),
    ]:
        idx.write_bytes(content)
        with pytest.raises(DataError, match=says) as e:
            IndexedDataset(prefix)
        assert str(idx) in str(e.value) and "\n" not in str(e.value)
    idx.write_bytes(good)
    bin_.write_bytes(bin_.read_bytes()[:-2])
    with pytest.raises(DataError, match="train.bin: cut short: 10 tokens, its index expects 11"):
        IndexedDataset(prefix)
    bin_.unlink()
    with pytest.raises(DataError, match="does not exist"):
        IndexedDataset(prefix)
    idx.unlink()
    with pytest.raises(DataError, match="run flite-preprocess"):
        IndexedDataset(prefix)


def test_impl_that_does_not_match(prefix) -> None:
    with pytest.raises(DataError, match="--dataset-impl cached"):
        open_dataset(prefix, "cached")


def test_concatenation_with_repeats(prefix) -> None:
    a, b = IndexedDataset(prefix), MemoryDataset.of([[11, 2], [12, 12, 2]])
    both = ConcatDataset([b, a], [2, 1])
    expected = [[11, 2], [12, 12, 2]] * 2 + ITEMS
    assert both.sizes.tolist() == [len(i) for i in expected]
    order = [8, 0, 3, 6, 1, 4, 7]
    tokens, sizes = both.gather(order)
    assert tokens.tolist() == [t for i in order for t in expected[i]]
    assert sizes.tolist() == [len(expected[i]) for i in order]


def test_truncation(prefix) -> None:
    cut = TruncatedDataset(IndexedDataset(prefix), 3, eos=2)
    assert [cut[i].tolist() for i in range(5)] == [[4, 5, 2], [2], [6, 7, 2], [2], [4, 2]]
    assert cut.sizes.tolist() == [3, 2, 3, 1, 3]


def test_reference_data_opens() -> None:
    folder = shared_dir("reference", "mt", "data-bin")
    d = Dictionary.load(folder / "dict.en.txt")
    data = open_dataset(folder / "valid.en-de.en", "mmap", d)
    assert len(data) == 200 and len(d) == 3072
    text = shared_dir("reference", "mt", "text", "valid.en").read_text(encoding="utf-8")
    assert [d.string(data[i]) for i in range(200)] == text.splitlines()
