"""Tokenizers and subwords: there and back, and what is missing is named."""

from __future__ import annotations

import builtins
import dataclasses

import pytest

import fairseq_lite.data.text  # noqa: F401  registers the entries
from fairseq_lite.config.core import Choice
from fairseq_lite.data.text.api import (
    BPE,
    TOKENIZERS,
    Tokenizer,
    build_bpe,
    build_tokenizer,
    check_codecs,
    required_file,
)
from fairseq_lite.data.text.bpe import (
    BertConfig,
    FastBpeConfig,
    Gpt2Config,
    SentencepieceConfig,
    SubwordNmtConfig,
)
from fairseq_lite.data.text.byte_level import ByteBpeConfig, bytes_to_chars, chars_to_text
from fairseq_lite.data.text.tokenizers import MosesConfig
from fairseq_lite.errors import ConfigError, DataError, MissingDependency
from tests.helpers.registered import registered
from tests.helpers.shared import shared_dir


def test_names_are_fairseqs_and_one_of_ours() -> None:
    assert TOKENIZERS.names() == ("moses", "nltk", "space")
    assert set(BPE.names()) == {
        *("bert", "byte_bpe", "bytes", "characters", "fastbpe"),
        *("gpt2", "hf_byte_bpe", "sentencepiece", "subword_nmt"),
        "hf_tokenizer",
    }


def test_nothing_chosen() -> None:
    assert build_bpe(Choice()) is None and build_tokenizer(Choice()) is None


@dataclasses.dataclass(frozen=True)
class WordListConfig:
    words: str | None = None


class WordList(Tokenizer):
    def __init__(self, cfg, *languages) -> None:
        super().__init__(cfg, *languages)
        required_file(cfg.words, "--words")

    def encode(self, text: str) -> str:
        return text

    decode = encode


def test_files_that_are_missing_are_found_without_any_text(tmp_path) -> None:
    there = tmp_path / "codes"
    there.write_text("#version: 0.2\n")
    check_codecs(Choice(), Choice("subword_nmt", SubwordNmtConfig(str(there))))
    with pytest.raises(DataError, match="--bpe-codes nowhere: no such file"):
        check_codecs(Choice(), Choice("subword_nmt", SubwordNmtConfig("nowhere")))
    with pytest.raises(ConfigError, match="--bpe-codes is needed"):
        check_codecs(Choice(), Choice("subword_nmt", SubwordNmtConfig()))
    with registered((TOKENIZERS, "word_list", WordList)):
        check_codecs(Choice("word_list", WordListConfig(str(there))), Choice())
        with pytest.raises(DataError, match="--words nowhere: no such file"):
            check_codecs(Choice("word_list", WordListConfig("nowhere")), Choice())


def test_moses() -> None:
    moses = build_tokenizer(Choice("moses", MosesConfig()), "en", "de")
    assert moses.encode('A "well-kept" house.') == "A &quot; well @-@ kept &quot; house ."
    assert moses.decode("Ein Haus , wie es ist .") == "Ein Haus, wie es ist."
    plain = MosesConfig(moses_no_dash_splits=True, moses_no_escape=True)
    assert build_tokenizer(Choice("moses", plain)).encode("A&B well-kept.") == "A & B well-kept ."


def test_space() -> None:
    space = build_tokenizer(Choice("space", None))
    assert space.encode(" a\u00a0 b\n") == "a b" and space.decode("a b") == "a b"


@pytest.mark.parametrize("name", ["characters", "bytes"])
@pytest.mark.parametrize("text", ["", "ein Satz", "naïve 日本 \u00ad x"])
def test_characters_and_bytes(name, text) -> None:
    subword = build_bpe(Choice(name, None))
    assert subword.decode(subword.encode(text)) == text


def test_broken_bytes_are_left_out() -> None:
    broken = bytes_to_chars("日a")[1:]
    assert chars_to_text(broken) == "a" and chars_to_text("Ж€") == ""


def test_sentencepiece() -> None:
    path = shared_dir("data", "tokenizers", "sp_en_1k", "test_model.model")
    subword = build_bpe(Choice("sentencepiece", SentencepieceConfig(sentencepiece_model=str(path))))
    line = subword.encode("This is a test.")
    assert " " in line and subword.decode(line) == "This is a test."
    assert subword.is_beginning_of_word(line.split()[0]) and subword.files() == (path,)
    sampled = build_bpe(
        Choice(
            "sentencepiece",
            SentencepieceConfig(str(path), sentencepiece_enable_sampling=True),
        )
    )
    assert subword.decode(sampled.encode("This is a test.")) == "This is a test."
    over_bytes = build_bpe(Choice("byte_bpe", ByteBpeConfig(str(path))))
    assert over_bytes.decode(over_bytes.encode("a test")) == "a test"


def test_gpt2() -> None:
    pytest.importorskip("tokenizers")
    folder = shared_dir("data", "tokenizers", "gpt2_bpe")
    subword = build_bpe(
        Choice("gpt2", Gpt2Config(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    )
    assert subword.encode("Hello world") == "15496 995"
    assert subword.decode("15496 <unk> 995") == "Hello<unk> world"
    assert subword.is_beginning_of_word("995") and not subword.is_beginning_of_word("15496")


def test_subword_nmt(tmp_path) -> None:
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\nt h\nth e</w>\n")
    subword = build_bpe(Choice("subword_nmt", SubwordNmtConfig(str(codes))))
    assert subword.decode("the hou@@ se@@") == "the house"
    pytest.importorskip("subword_nmt")
    assert subword.encode("the th") == "the t@@ h"


def test_files_must_exist(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--sentencepiece-model is needed"):
        build_bpe(Choice("sentencepiece", SentencepieceConfig()))
    with pytest.raises(DataError, match="no such file"):
        build_bpe(Choice("subword_nmt", SubwordNmtConfig("/nonexistent")))
    (tmp_path / "m").write_text("nothing")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        build_bpe(Choice("sentencepiece", SentencepieceConfig(str(tmp_path / "m"))))


@pytest.mark.parametrize(
    ("name", "config", "package"),
    [
        ("subword_nmt", SubwordNmtConfig, "subword-nmt"),
        ("fastbpe", FastBpeConfig, "fastBPE"),
        ("bert", lambda path: BertConfig(bpe_vocab_file=path), "tokenizers"),
    ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, name, config, package) -> None:
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] in ("subword_nmt", "fastBPE", "tokenizers", "nltk"):
            raise ImportError(module)
        return real(module, *args, **kwargs)

    (tmp_path / "file").write_text("#version: 0.2\n")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        build_bpe(Choice(name, config(str(tmp_path / "file")))).encode("a")
    with pytest.raises(MissingDependency, match="pip install nltk"):
        build_tokenizer(Choice("nltk", None)).encode("a")
