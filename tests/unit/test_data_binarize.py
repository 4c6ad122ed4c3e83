"""Binarising: the same words and lines as Python's own, whatever the bytes and the blocks."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairseq_lite.data import binarize
from fairseq_lite.data.binarize import Encoder, count_lines, count_words, encode_span, spans
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedDataset
from fairseq_lite.data.words import UNKNOWN, Block, WordTable
from fairseq_lite.errors import DataError

# All the whitespace there is, what looks like it in part, and words of many lengths.
_SPACES = "".join(chr(c) for c in range(0x10000) if chr(c).isspace())
_LOOKALIKES = (
    "\x00\x08\x0e\x1b\x7f\u0084\u00a1\u167f\u1681\u1fff\u200b\u202a\u2060\u2fff\u3001â\xad"
)
_texts = st.lists(
    st.one_of(
        st.sampled_from([*_SPACES, "\r\n", "\n", "\n\n"]),
        st.sampled_from(list(_LOOKALIKES)),
        st.text(alphabet="abé日😀", min_size=1, max_size=20),
        st.sampled_from(["</s>", "<unk>", "<pad>", "aaaaaaaa", "aaaaaaaaa"]),
    ),
    max_size=60,
).map("".join)


def _python_lines(text: str) -> list[list[str]]:
    return [line.split() for line in io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")]


@settings(deadline=None, max_examples=300)
@given(text=_texts, block=st.integers(1, 40), parts=st.integers(1, 4))
@example(text="a\rb\r\nc", block=1, parts=3)
@example(text="", block=1, parts=1)
def test_words_and_lines_are_pythons(tmp_path_factory, text, block, parts) -> None:
    folder = tmp_path_factory.mktemp("text")
    path = folder / "text"
    path.write_bytes(text.encode())
    lines = _python_lines(text)
    words = Counter(w for line in lines for w in line)
    old, binarize.BLOCK = binarize.BLOCK, block
    try:
        counts: Counter[str] = Counter()
        for span in spans(path, parts):
            counts.update(count_words(span))
        assert counts == words
        dictionary = Dictionary()
        dictionary.add_counts({w: n for w, n in words.items() if hash(w) % 3})
        found, replaced = [], 0
        for number, span in enumerate(spans(path, parts)):
            summary = encode_span(span, Encoder.of(dictionary), folder / str(number))
            data = IndexedDataset(folder / str(number))
            found += [data[i].tolist() for i in range(len(data))]
            assert (summary.sentences, summary.tokens) == (len(data), int(data.sizes.sum()))
            replaced += summary.replaced
    finally:
        binarize.BLOCK = old
    assert found == [dictionary.encode_line(" ".join(line)).tolist() for line in lines]
    assert replaced == sum(n for w, n in words.items() if w not in dictionary)
    assert count_lines(path) == len(lines)


def test_all_whitespace_of_unicode() -> None:
    text = "a" + "a".join(_SPACES) + "a"
    block = Block(text.encode())
    assert len(block.starts) == len(_SPACES) + 1
    assert [block.word(i) for i in range(len(block.starts))] == ["a"] * len(block.starts)
    assert len(Block(_LOOKALIKES.encode()).starts) == len(_LOOKALIKES.split())


def test_a_large_table() -> None:
    words = [f"{n:x}" * (1 + n % 5) for n in range(1, 100_000)]
    unique = list(dict.fromkeys(words))
    table = WordTable(unique, list(range(len(unique))))
    block = Block(" ".join(unique).encode())
    assert np.array_equal(table.look_up(block.hashes()), np.arange(len(unique)))
    others = Block(" ".join(f"z{w}" for w in unique).encode())
    assert (table.look_up(others.hashes()) == UNKNOWN).all()


def test_large_vocabularies_are_stored_wider(tmp_path) -> None:
    (tmp_path / "t").write_text("w69999 w0\n")
    dictionary = Dictionary()
    for n in range(70_000):
        dictionary.add_symbol(f"w{n}")
    encode_span(spans(tmp_path / "t", 1)[0], Encoder.of(dictionary), tmp_path / "o")
    data = IndexedDataset(tmp_path / "o")
    assert data.dtype == np.uint32 and data[0].tolist() == [70_003, 4, 2]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xff", 1),
        (b"a\r\nb\rc\nd \xc3", 4),
        (b"a\n" * 1000 + b"\xe2\x80\n" + b"b\n" * 1000, 1001),
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_undecodable_bytes_are_named(tmp_path: Path, monkeypatch, content, line, parts) -> None:
    monkeypatch.setattr(binarize, "BLOCK", 64)
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(DataError, match=f"t:{line}: not UTF-8"):
        list(map(count_words, spans(tmp_path / "t", parts)))


def test_missing_text() -> None:
    with pytest.raises(DataError, match="no such text file"):
        spans("/nonexistent", 2)
