"""--bpe hf_tokenizer: every kind of tokenizer, there and back on nasty lines; its symbols."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fairseq_lite.data.text  # noqa: F401  registers the entries
from fairseq_lite.config.core import Choice
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.text import pieces
from fairseq_lite.data.text.api import build_bpe
from fairseq_lite.data.text.bpe import BertConfig, Gpt2Config
from fairseq_lite.data.text.hf import HfTokenizer, HfTokenizerConfig
from fairseq_lite.data.words import Block
from fairseq_lite.errors import ConfigError, DataError
from tests.helpers import texts
from tests.helpers.commands import REPOSITORY
from tests.helpers.shared import shared_dir

TEXT = texts.ENGLISH + texts.CHINESE


def hf(path: Path, special: bool = False) -> HfTokenizer:
    return HfTokenizer(HfTokenizerConfig(str(path), hf_special_symbols=special))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HfTokenizer]:
    """A tokenizer of every kind that needs no file of others."""
    folder = tmp_path_factory.mktemp("tokenizers")
    model = texts.sentencepiece_model(folder / "spm.model", TEXT, byte_fallback=True)
    spiece = folder / "t5" / "spiece.model"
    spiece.parent.mkdir()
    spiece.write_bytes(model.read_bytes())
    return {
        "bytes": hf(texts.byte_level(folder / "bytes" / "tokenizer.json", TEXT)),
        "prefix": hf(texts.byte_level(folder / "prefix" / "tokenizer.json", TEXT, True).parent),
        "unigram": hf(texts.unigram(folder / "unigram.json", TEXT)),
        "chinese": hf(texts.byte_level(folder / "chinese.json", texts.CHINESE)),
        "wordpiece": hf(texts.wordpiece(folder / "bert", TEXT)),
        "spm": hf(model),
        "spm folder": hf(spiece.parent),
    }


# -- symbols -------------------------------------------------------------------------------------


@given(st.text(alphabet=st.sampled_from("a0u\\{}<>s/ \u00a0\u3000\u2028\x1c2c5"), max_size=12))
def test_every_piece_has_one_symbol_without_whitespace(piece: str) -> None:
    symbol = pieces.escape(piece)
    assert symbol.split() == [symbol] and symbol not in pieces.SPECIAL
    assert pieces.unescape(symbol) == piece


@given(st.lists(st.text(alphabet="a\\u{}01 <s>", max_size=6) | st.none(), max_size=30))
def test_every_number_has_a_symbol_of_its_own(vocabulary: list[str | None]) -> None:
    symbols = pieces.symbols(vocabulary)
    assert len({*symbols, *pieces.SPECIAL}) == len(vocabulary) + len(pieces.SPECIAL)
    assert [pieces.unescape(symbol) for symbol in symbols] == [p or "" for p in vocabulary]


def test_ordinary_pieces_stay_as_they_are() -> None:
    for piece in ("▁the", "Ġof", "##ing", "日", "\\", "\\n", "\\u00", "\ufeff", "\u200b", "<s>x"):
        assert pieces.escape(piece) == piece
    assert pieces.escape("</s>") == "\\u003c/s>" and pieces.escape("a\u00a0b") == "a\\u00a0b"


@pytest.mark.parametrize("name", ["bytes", "unigram", "spm"])
def test_the_vocabulary_survives_dict_txt(made, tmp_path, name) -> None:
    """Number n of the tokenizer is number n + 4 of the dictionary, and of the one read back."""
    tokenizer = made[name]
    dictionary = Dictionary()
    for symbol in tokenizer.vocabulary():
        dictionary.add_symbol(symbol, 0)
    dictionary.save(tmp_path / "dict.txt")
    read = Dictionary.load(tmp_path / "dict.txt")
    assert read.symbols == dictionary.symbols
    engine = tokenizer._engine
    assert len(read) == len(engine.pieces) + 4
    for number, piece in enumerate(engine.pieces):
        assert pieces.unescape(read[number + 4]) == piece
        assert read.index(read[number + 4]) == number + 4
    assert (read.bos(), read.pad(), read.eos(), read.unk()) == (0, 1, 2, 3)
    assert [read.index(s) for s in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "chinese"])
def test_bytes_give_every_line_back(made, name) -> None:
    for line in texts.NASTY:
        assert made[name].decode(made[name].encode(line)) == line


def test_a_space_that_was_put_before_a_line_is_taken_away(made) -> None:
    for line in texts.NASTY:
        # A space that was there already cannot be told from it.
        assert made["prefix"].decode(made["prefix"].encode(line)) == line.removeprefix(" ")


@pytest.mark.parametrize("name", ["spm", "spm folder"])
def test_sentencepiece_gives_back_what_the_library_does(made, name) -> None:
    model = made[name]._engine._model
    for line in texts.NASTY:
        assert made[name].decode(made[name].encode(line)) == model.decode(model.encode(line))


@pytest.mark.parametrize("name", ["unigram", "wordpiece"])
def test_others_give_back_what_the_library_does_but_for_the_unknown(made, name) -> None:
    engine = made[name]._engine
    for line in texts.NASTY:
        (numbers,) = made[name].numbers([line])
        read = ["<unk>" if n == engine.unknown else engine.pieces[n] for n in numbers]
        assert made[name].decode(made[name].encode(line)) == engine._decoder.decode(read)


@pytest.mark.parametrize("name", ["bytes", "unigram", "wordpiece", "spm", "prefix"])
def test_a_line_is_as_many_words_as_pieces(made, name) -> None:
    """Neither Python's split nor the block-wise reader finds other borders than we wrote."""
    tokenizer = made[name]
    for line in texts.NASTY:
        encoded = tokenizer.encode(line)
        (numbers,) = tokenizer.numbers([line])
        assert len(encoded.split()) == len(numbers) == Block(encoded.encode()).line_sizes().sum()
        assert tokenizer.encode_lines([line, "", line]) == [encoded, "", encoded]


def test_lines_are_neither_cut_nor_padded_nor_given_special_symbols(made) -> None:
    assert made["bytes"].encode("fox " * 50).split().count("Ġfox") == 49
    assert made["bytes"].encode("a a").split() == ["a", "Ġa"]


def test_unknown_text_is_our_unknown_symbol(made) -> None:
    assert made["unigram"].encode("𓀀").split()[-1] == "<unk>"
    assert made["wordpiece"].encode("fox 𓀀") == "fox <unk>"
    assert made["wordpiece"].decode("fox <unk> dog <<unk>>") == "fox <unk> dog <<unk>>"
    dog = made["spm"].encode("dog")
    assert made["spm"].decode(f"{dog} <unk> {dog} <<unk>>") == "dog<unk> dog<<unk>>"


def test_special_symbols_are_text_unless_asked_for(made, tmp_path) -> None:
    path = texts.byte_level(tmp_path / "tokenizer.json", TEXT)
    assert len(hf(path).encode("a<mask></s>").split()) > 3
    # The tokenizer's own end symbol is not ours.
    asked = hf(path, special=True)
    assert asked.encode("a<mask></s>").split() == ["a", "<mask>", "\\u003c/s>"]
    assert asked.decode(asked.encode("a<mask></s>")) == "a<mask></s>"
    # A unigram model takes any of its pieces for text, but never writes one of our symbols.
    assert made["unigram"].encode("a</s>").split()[-1] == "\\u003c/s>"
    with pytest.raises(ConfigError, match="--hf-special-symbols: only a tokenizer.json"):
        hf(texts.wordpiece(tmp_path / "bert", TEXT), special=True).encode("a")


def test_whitespace_in_pieces_and_numbers_without_a_piece(tmp_path) -> None:
    vocab = {" ": 0, "\u00a0": 1, "\u3000": 2, "\u2028": 3, "a": 5, "\r": 7, "": 9, "\\": 10}
    tokenizer = hf(texts.whole(tmp_path / "t.json", vocab))
    line = "a \u00a0\u3000\u2028\\a"
    symbols = tokenizer.encode(line).split(" ")
    assert symbols == ["a", "\\u0020", "\\u00a0", "\\u3000", "\\u2028", "\\", "a"]
    assert tokenizer.decode(" ".join(symbols)) == line
    names = tokenizer.vocabulary()
    assert (names[4], names[6], names[8], names[9]) == ("\\u{4}", "\\u{6}", "\\u{8}", "\\u{}")
    assert len(set(names)) == len(names) == 11
    assert tokenizer.decode("a \\u{4} \\u000d a") == "a a"  # one line in, one line out
    assert (
        tokenizer.drops_text()
        and not hf(texts.whole(tmp_path / "u.json", {"?": 0}, "?")).drops_text()
    )


def test_pieces_that_stand_twice_keep_their_numbers(tmp_path) -> None:
    from tokenizers import Tokenizer, models

    model = models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("a", -3.0)], 0)
    Tokenizer(model).save(str(tmp_path / "t.json"))
    tokenizer = hf(tmp_path / "t.json")
    assert tokenizer.vocabulary() == ["\\u003cunk>", "a", "b", "a\\u{3}"]
    assert tokenizer.decode("b a\\u{3}") == "b a"


@pytest.mark.parametrize("name", ["bytes", "unigram", "spm", "wordpiece"])
def test_beginnings_of_words(made, name) -> None:
    tokenizer = made[name]
    symbols = tokenizer.encode("the lazy dog unhappy").split()
    begins = [tokenizer.is_beginning_of_word(s) for s in symbols[1:]]
    # So many words have begun as there are spaces.
    text = [tokenizer.decode(" ".join(symbols[: n + 2])) for n in range(len(begins))]
    assert [line.count(" ") for line in text] == list(itertools.accumulate(begins))
    assert begins.count(True) == 3
    assert tokenizer.is_beginning_of_word("<unk>") and tokenizer.is_beginning_of_word("</s>")


# -- other people's tokenizers ---------------------------------------------------------------------


def test_t5() -> None:
    tokenizer = hf(shared_dir("data", "tokenizers", "t5_spm"))
    assert tokenizer.encode("Hello world, </s> 𓀀") == "▁Hello ▁world , ▁ <unk> / s > ▁ <unk>"
    assert tokenizer.numbers(["Hello"]) == [[8774]]
    assert tokenizer.vocabulary()[:4] == ["\\u003cpad>", "\\u003c/s>", "\\u003cunk>", "▁"]
    assert [file.name for file in tokenizer.files()] == ["spiece.model"]


def test_gpt2_in_two_ways(tmp_path) -> None:
    source = shared_dir("data", "tokenizers", "gpt2_bpe")
    tokenizer = hf(texts.gpt2_folder(source, tmp_path / "gpt2"))
    config = Gpt2Config(str(source / "encoder.json"), str(source / "vocab.bpe"))
    fairseqs = build_bpe(Choice("gpt2", config))
    for line in texts.NASTY + TEXT:
        assert " ".join(map(str, tokenizer.numbers([line])[0])) == fairseqs.encode(line)
        assert tokenizer.decode(tokenizer.encode(line)) == line
    assert hf(source).numbers(["Hello world"]) == [[15496, 995]]  # fairseq's names of the files
    assert fairseqs.vocabulary()[995] == "995" and len(fairseqs.vocabulary()) == 50257


def test_bert_as_fairseqs_entry(tmp_path) -> None:
    folder = texts.wordpiece(tmp_path / "bert", TEXT)
    fairseqs = build_bpe(Choice("bert", BertConfig(bpe_vocab_file=str(folder / "vocab.txt"))))
    for line in TEXT:
        assert fairseqs.encode(line).replace("[UNK]", "<unk>") == hf(folder).encode(line)
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert hf(folder).encode("The the") == "<unk> the"
    assert {file.name for file in hf(folder).files()} == {"vocab.txt", "tokenizer_config.json"}


# -- what goes wrong -------------------------------------------------------------------------------


def _damaged(folder: Path) -> dict[str, Path]:
    good = texts.byte_level(folder / "good.json", TEXT).read_text(encoding="utf-8")
    (folder / "cut.json").write_text(good[:500], encoding="utf-8")
    (folder / "other.json").write_text('{"model_type": "t5"}')
    (folder / "cut.model").write_bytes(b"\x0a\x0e\x0a")
    for name in ("empty", "clip", "bert", "added"):
        (folder / name).mkdir()
    (folder / "clip" / "vocab.json").write_text('{"a</w>": 0}')
    (folder / "clip" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "bert" / "vocab.txt").write_text("a\nb\n")
    (folder / "added" / "vocab.txt").write_text("[UNK]\n")
    (folder / "added" / "added_tokens.json").write_text("{}")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cut.json", "not a tokenizer that can be read, or a damaged one"),
        ("other.json", "not a tokenizer that can be read"),
        ("cut.model", "not a sentencepiece model"),
        ("empty", "this folder holds no tokenizer; expected tokenizer.json, spiece.model"),
        ("clip", "not made of bytes; give its tokenizer.json"),
        ("bert", "has no \\[UNK\\]"),
        ("added", "added_tokens.json is read from a tokenizer.json only"),
        ("bert/vocab.txt", "is a part of a tokenizer: give the folder it lies in"),
        ("google/mt5-small", "no such file or folder; nothing is downloaded"),
    ],
)
def test_errors_are_one_line(tmp_path, name, says) -> None:
    path = _damaged(tmp_path).get(name) or (Path(name) if "google" in name else tmp_path / name)
    with pytest.raises(DataError, match=says) as e:
        hf(path).encode("a")
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_a_path_is_needed() -> None:
    with pytest.raises(ConfigError, match="--hf-tokenizer is needed"):
        HfTokenizer(HfTokenizerConfig())


def test_nothing_is_imported_before_it_is_used(tmp_path) -> None:
    path = texts.byte_level(tmp_path / "t.json", TEXT)
    code = (
        "import sys, fairseq_lite.data.text, fairseq_lite.data.text.recorded\n"
        "from fairseq_lite.data.text.hf import HfTokenizer, HfTokenizerConfig\n"
        f"made = HfTokenizer(HfTokenizerConfig({str(path)!r}))\n"
        "made.files()\n"
        "named = {'tokenizers', 'transformers', 'sacremoses', 'torch'} & set(sys.modules)\n"
        "assert not named, named\n"
        "made.encode('a')\n"
        "assert 'tokenizers' in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
