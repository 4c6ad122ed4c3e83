"""`--bpe hf_tokenizer`: plain text through a Hugging Face tokenizer, or any sentencepiece model.

Nothing is downloaded, transformers is not needed, and the libraries are imported and the files read
when the first line is segmented. A piece is written as a symbol without whitespace
(`data.text.pieces`). Text the tokenizer does not know is our `<unk>`, whatever the tokenizer itself
calls it; no `[CLS]`, `</s>` or the like is added; a line is never cut or padded, even where the
tokenizer's file says so.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fairseq_lite.config.flags import flag
from fairseq_lite.data.text.api import BPE, NumberedSubword
from fairseq_lite.data.text.bpe import load_sentencepiece, tokenizers_library
from fairseq_lite.data.text.pieces import SPECIAL, UNKNOWN, symbols, unescape
from fairseq_lite.errors import ConfigError, DataError

_FLAG = "--hf-tokenizer"
_CONFIG = "tokenizer_config.json"
_IN_PARTS = ("byte_bpe", "wordpiece")
# What a folder may hold, the first found counts: all files of a row are needed.
_KINDS = (
    ("json", ("tokenizer.json",)),
    ("sentencepiece", ("spiece.model",)),
    ("sentencepiece", ("sentencepiece.bpe.model",)),
    ("sentencepiece", ("tokenizer.model",)),
    ("byte_bpe", ("vocab.json", "merges.txt")),
    ("byte_bpe", ("encoder.json", "vocab.bpe")),
    ("wordpiece", ("vocab.txt",)),
)
# Of no use without what lies beside it.
_PARTS = {_CONFIG, *(name for kind, names in _KINDS for name in names if kind in _IN_PARTS)}
# A letter hardly any vocabulary has: an Egyptian hieroglyph.
_STRANGE = "\U00013000"


@dataclass(frozen=True)
class HfTokenizerConfig:
    """Flags of Hugging Face tokenizers."""

    hf_tokenizer: str | None = flag(
        None,
        "a tokenizer.json, a folder with a tokenizer's files, or a sentencepiece model",
        metavar="PATH",
    )
    hf_special_symbols: bool = flag(
        False,
        "read special symbols such as <extra_id_0> where the text has them, not as text",
    )


@dataclass(frozen=True)
class Source:
    """Where a tokenizer is stored.

    Attributes:
        kind: "json", "sentencepiece", "byte_bpe" or "wordpiece".
        files: the files of its vocabulary.
        settings: its tokenizer_config.json, where the vocabulary alone does not say everything.
    """

    kind: str
    files: tuple[Path, ...]
    settings: Path | None = None


def find(path: str | None) -> Source:
    """What a path leads to, by the names of files alone.

    Raises:
        ConfigError: no path given.
        DataError: there is nothing, or no tokenizer of a known kind.
    """
    if not path:
        raise ConfigError(
            f"{_FLAG} is needed: give a tokenizer.json, a folder with a tokenizer's files, or a "
            "sentencepiece model"
        )
    place = Path(path)
    if place.is_file():
        if place.name in _PARTS:
            raise DataError(f"{_FLAG} {path}: is a part of a tokenizer: give the folder it lies in")
        return Source("json" if place.suffix == ".json" else "sentencepiece", (place,))
    if not place.is_dir():
        raise DataError(
            f"{_FLAG} {path}: no such file or folder; nothing is downloaded: give a folder or a "
            "tokenizer.json on this machine"
        )
    for kind, names in _KINDS:
        files = tuple(place / name for name in names)
        if all(file.is_file() for file in files):
            return _in_folder(place, kind, files)
    expected = ", ".join(" with ".join(names) for _, names in _KINDS)
    raise DataError(f"{_FLAG} {path}: this folder holds no tokenizer; expected {expected}")


def _in_folder(place: Path, kind: str, files: tuple[Path, ...]) -> Source:
    if kind not in _IN_PARTS:
        return Source(kind, files)
    if (place / "added_tokens.json").is_file():
        raise DataError(
            f"{_FLAG} {place}: added_tokens.json is read from a tokenizer.json only; have the "
            "library that wrote this folder save one"
        )
    settings = place / _CONFIG
    return Source(kind, files, settings if settings.is_file() else None)


class _Engine(Protocol):
    """A library's tokenizer: text to numbers, pieces to text.

    `pieces` has the piece of each number, None where a number has none.
    """

    # The number of unknown text, where it has one.
    unknown: int | None

    @property
    def pieces(self) -> Sequence[str | None]: ...

    def numbers(self, lines: Sequence[str]) -> list[list[int]]: ...

    def text(self, pieces: Sequence[str]) -> str: ...

    def ends_words(self) -> bool: ...


class _Sentencepiece:
    """A sentencepiece model; its numbers are the model's own."""

    def __init__(self, path: Path) -> None:
        self._model = load_sentencepiece(path)
        self.pieces: list[str] = self._model.id_to_piece(list(range(self._model.get_piece_size())))
        self.unknown: int | None = self._model.unk_id()

    def numbers(self, lines: Sequence[str]) -> list[list[int]]:
        # One thread: --workers decides how many processors are used.
        found: list[list[int]] = self._model.encode(list(lines), out_type=int, num_threads=1)
        return found

    def text(self, pieces: Sequence[str]) -> str:
        # The library has a mark of its own for <unk>; in two parts it stays what it is.
        parts = [part for p in pieces for part in (("<", "unk>") if p == UNKNOWN else (p,))]
        line: str = self._model.decode(parts) if parts else ""
        return line

    def ends_words(self) -> bool:
        return False


class _Tokenizers:
    """A tokenizer of Hugging Face's library."""

    def __init__(self, tokenizer: Any, special_symbols: bool) -> None:
        # A tokenizer.json may say that lines are cut, padded or segmented at random.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for name in ("dropout", "alpha", "nbest_size"):
            if getattr(tokenizer.model, name, None) is not None:
                setattr(tokenizer.model, name, None)
        tokenizer.encode_special_tokens = not special_symbols
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder
        self.pieces = _pieces(tokenizer)
        self.unknown = _unknown(tokenizer)

    def numbers(self, lines: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(list(lines), add_special_tokens=False)
        return [line.ids for line in found]

    def text(self, pieces: Sequence[str]) -> str:
        if self._decoder is None:
            return " ".join(pieces)
        line: str = self._decoder.decode(list(pieces))
        return line

    def ends_words(self) -> bool:
        return bool(getattr(self._tokenizer.model, "end_of_word_suffix", None))


def _pieces(tokenizer: Any) -> list[str | None]:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    pieces = [tokenizer.id_to_token(number) for number in range(size)]
    if None not in pieces and tokenizer.id_to_token(size) is None:
        return pieces
    # There are numbers without a piece, or two of the same piece.
    last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return [tokenizer.id_to_token(number) for number in range(last + 1)]


def _unknown(tokenizer: Any) -> int | None:
    name = getattr(tokenizer.model, "unk_token", None)
    if name is not None:
        number: int | None = tokenizer.token_to_id(name)
        return number
    # A unigram model keeps a number and does not show it. No piece can hold this text: its quotes
    # would be escaped.
    found = re.search(r'"unk_id":(\d+)', tokenizer.to_str())
    return int(found[1]) if found else None


def _load(source: Source, special_symbols: bool) -> _Engine:
    """Read a tokenizer.

    Raises:
        DataError: it is damaged, or of a kind that its files do not say enough about.
        ConfigError: special symbols are asked for where the files do not name them.
    """
    if special_symbols and source.kind != "json":
        raise ConfigError(
            "--hf-special-symbols: only a tokenizer.json says which symbols are special; leave it "
            f"out with {source.files[0].name}"
        )
    if source.kind == "sentencepiece":
        return _Sentencepiece(source.files[0])
    library = tokenizers_library("hf_tokenizer")
    try:
        make = {"json": _from_json, "byte_bpe": _byte_bpe, "wordpiece": _wordpiece}[source.kind]
        return _Tokenizers(make(library, source), special_symbols)
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of the library is no Exception
        _refuse(source, " ".join(str(e).split()))


def _refuse(source: Source, why: str) -> NoReturn:
    names = " and ".join(str(file) for file in source.files)
    raise DataError(f"{_FLAG} {names}: not a tokenizer that can be read, or a damaged one: {why}")


def _from_json(library: Any, source: Source) -> Any:
    return library.Tokenizer.from_file(str(source.files[0]))


def _settings(source: Source) -> dict[str, Any]:
    if source.settings is None:
        return {}
    try:
        found = json.loads(source.settings.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{source.settings}: cannot be read: {' '.join(str(e).split())}") from None
    return found if isinstance(found, dict) else {}


def _byte_bpe(library: Any, source: Source) -> Any:
    """GPT-2's and RoBERTa's form: vocabulary and merges over bytes."""
    prefix = bool(_settings(source).get("add_prefix_space", False))
    tokenizer = library.Tokenizer(library.models.BPE.from_file(*map(str, source.files)))
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    if any(tokenizer.token_to_id(character) is None for character in alphabet):
        _refuse(source, "its pieces are not made of bytes; give its tokenizer.json")
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _wordpiece(library: Any, source: Source) -> Any:
    """BERT's form: a list of pieces."""
    settings = _settings(source)
    unknown = str(settings.get("unk_token", "[UNK]"))
    model = library.models.WordPiece.from_file(str(source.files[0]), unk_token=unknown)
    tokenizer = library.Tokenizer(model)
    if tokenizer.token_to_id(unknown) is None:
        _refuse(source, f"it has no {unknown}")
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    return tokenizer


@BPE.register("hf_tokenizer", config=HfTokenizerConfig)
class HfTokenizer(NumberedSubword):
    """A Hugging Face tokenizer, or a sentencepiece model, on plain text."""

    cfg: HfTokenizerConfig

    def __init__(self, cfg: HfTokenizerConfig) -> None:
        super().__init__(cfg)
        self._source = find(cfg.hf_tokenizer)

    @functools.cached_property
    def _engine(self) -> _Engine:
        return _load(self._source, self.cfg.hf_special_symbols)

    @functools.cached_property
    def _symbols(self) -> list[str]:
        return symbols(self._engine.pieces)

    @functools.cached_property
    def _written(self) -> list[str]:
        written = list(self._symbols)
        if self._engine.unknown is not None:
            written[self._engine.unknown] = UNKNOWN
        return written

    @functools.cached_property
    def _leads_with_space(self) -> bool:
        """Whether a space is put before every line, which is no part of the text."""
        pieces = [self._engine.pieces[number] or "" for number in self._try("a") or ()]
        return self._engine.text(pieces).startswith(" ")

    def _try(self, text: str) -> list[int] | None:
        """The numbers of a line's pieces; None where the library refuses it."""
        try:
            return self.numbers([text])[0]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of the library is no Exception
            return None

    def numbers(self, lines: Sequence[str]) -> list[list[int]]:
        """The tokenizer's own numbers of each line's pieces."""
        return self._engine.numbers(lines)

    def names(self) -> Sequence[str]:
        """The symbol of each number; `<unk>` for the tokenizer's unknown one."""
        return self._written

    def vocabulary(self) -> Sequence[str]:
        """A symbol for each of the tokenizer's numbers, different from all others and from ours."""
        return self._symbols

    def decode(self, text: str) -> str:
        """Symbols to text by the tokenizer's own decoder; one line, whatever the pieces hold."""
        line = self._engine.text([unescape(symbol) for symbol in text.split(" ") if symbol])
        if self._leads_with_space:
            line = line.removeprefix(" ")
        return line.replace("\r", " ").replace("\n", " ")

    def is_beginning_of_word(self, piece: str) -> bool:
        """Whether the tokenizer's decoder puts a space before a piece; special symbols begin words.

        Raises:
            ConfigError: the tokenizer marks where words end.
        """
        if self._engine.ends_words():
            raise ConfigError(f"{_FLAG} {self.cfg.hf_tokenizer}: marks the ends of words only")
        return piece in SPECIAL or self._engine.text(["a", unescape(piece)])[1:2] == " "

    def drops_text(self) -> bool:
        """Whether text that the tokenizer does not know leaves no piece at all: it is tried."""
        return self._try(_STRANGE) == []

    def files(self) -> Sequence[Path]:
        """What the tokenizer is read from."""
        settings = self._source.settings
        return self._source.files if settings is None else (*self._source.files, settings)
