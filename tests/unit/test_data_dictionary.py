"""Dictionary: ids, order, padding, files and strings as fairseq has them."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.text.postprocess import post_process
from fairseq_lite.errors import ConfigError, DataError


def _counted(text: str) -> Dictionary:
    dictionary = Dictionary()
    for word in text.split():
        dictionary.add_symbol(word)
    return dictionary


def test_special_symbols_come_first() -> None:
    d = Dictionary()
    assert [d.bos(), d.pad(), d.eos(), d.unk()] == [0, 1, 2, 3]
    assert d.symbols == ["<s>", "<pad>", "</s>", "<unk>"] and d.nspecial == len(d) == 4


def test_order_is_count_then_code_point() -> None:
    d = _counted("b b a a c z Z ä")
    d.finalize(padding_factor=1)
    assert d.symbols[4:] == ["a", "b", "Z", "c", "z", "ä"]
    assert d.index("a") == 4 and d.index("nope") == d.unk() and "a" in d


def test_threshold_and_nwords() -> None:
    d = _counted("a a a b b c")
    d.finalize(threshold=2, padding_factor=0)
    assert d.symbols[4:] == ["a", "b"]
    d = _counted("a a a b b c")
    d.finalize(nwords=5, padding_factor=8)
    assert d.symbols[4:] == ["a", "madeupword0000", "madeupword0001", "madeupword0002"]


def test_padding_skips_a_made_up_word_of_the_text() -> None:
    d = _counted("madeupword0000")
    d.finalize(padding_factor=8)
    assert len(d) == 8 and d.symbols[4:6] == ["madeupword0000", "madeupword0001"]


def test_text_equal_to_a_special_symbol_merges_into_it(tmp_path) -> None:
    d = _counted("<unk> a </s>")
    d.finalize(padding_factor=1)
    d.save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_text() == "a 1\n"


def test_save_and_load(tmp_path) -> None:
    d = _counted("über x\u200by naïve x\u200by")
    d.finalize()
    d.save(tmp_path / "d")
    again = Dictionary.load(tmp_path / "d")
    assert again == d and again.count[4:] == d.count[4:]


def test_overwrite_flag_round_trip(tmp_path) -> None:
    text = "a 5\nb 4\na 1 #fairseq:overwrite\n"
    (tmp_path / "d").write_text(text)
    d = Dictionary.load(tmp_path / "d")
    assert len(d) == 7 and d.index("a") == 6
    d.save(tmp_path / "e")
    assert (tmp_path / "e").read_text() == text


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"a 5\na 4\n", 2, "already"),
        (b"a 5\nb\n", 2, "expected '<token> <cnt> [flags]'"),
        (b"a 5\n\nb 1\n", 2, "expected '<token> <cnt> [flags]'"),
        (b"a 5\nb x\n", 2, "expected '<token> <cnt> [flags]'"),
        (b"a 5\nb 1\n\xff 3\n", 3, "not UTF-8"),
        (b"<s> 1\n", 1, "already"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, content, line, says) -> None:
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"dict.txt:{line}") as e:
        Dictionary.load(path)
    assert says in str(e.value)


def test_missing_file() -> None:
    with pytest.raises(DataError, match="no dictionary"):
        Dictionary.load("/nonexistent/dict.txt")


def test_encode_line_splits_at_unicode_whitespace() -> None:
    d = _counted("a b")
    expected = [4, 5, 3, 2]
    assert d.encode_line(" a\u00a0b\u3000c\n").tolist() == expected
    assert d.encode_line("a\x85b\u2028 c", append_eos=False).tolist() == expected[:-1]
    assert d.encode_line("").tolist() == [2]
    assert d.encode_line("a").dtype == np.int64


def test_string() -> None:
    d = _counted("a@@ b")
    ids = np.array([0, 4, 5, 3, 2])
    assert d.string(ids) == "a@@ b <unk>"
    assert d.string(ids, "@@ ", escape_unk=True) == "ab <<unk>>"
    assert d.string(ids, unk_string="?", include_eos=True) == "a@@ b ? </s>"
    assert d.string(ids, extra_symbols_to_ignore={4}) == "b <unk>"
    assert d.string(np.array([[4, 2], [5, 2]])) == "a@@\nb"
    assert d[99] == "<unk>"


def test_update_sums_counts() -> None:
    d, e = _counted("a b"), _counted("b c")
    d.update(e)
    assert dict(zip(d.symbols[4:], d.count[4:], strict=True)) == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("text", "symbol", "expected"),
    [
        ("un@@ do it@@", "subword_nmt", "undo it"),
        ("un@@ do", "@@ ", "undo"),
        ("\u2581un do \u2581it", "sentencepiece", "undo it"),
        ("_un do _it", "wordpiece", "undo it"),
        ("a b | c", "letter", "ab c"),
        ("a b_EOW c_EOW", "_EOW", "ab c"),
        ("a <SIL> b", "silence", "a b"),
        ("a@@ b", None, "a@@ b"),
        ("a@@ b", "none", "a@@ b"),
    ],
)
def test_post_process(text, symbol, expected) -> None:
    assert post_process(text, symbol) == expected


def test_post_process_unknown() -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        post_process("a", "nope")
