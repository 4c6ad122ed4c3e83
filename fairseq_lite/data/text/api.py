"""What a tokenizer and a subword segmentation are: text to pieces and back.

On the way in a line goes through the tokenizer, then the subwords; on the way out the other way
round. Both are strings with spaces between pieces, which is what `dict.txt` and the data hold.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairseq_lite.config.core import Choice
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.registry import Registry

TOKENIZERS = Registry("tokenizer", "--tokenizer")
BPE = Registry("subword segmentation", "--bpe")


class TextCodec(ABC):
    """A reversible segmentation of a line of text."""

    @abstractmethod
    def encode(self, text: str) -> str:
        """Segment a line; pieces are separated by single spaces."""

    @abstractmethod
    def decode(self, text: str) -> str:
        """Undo `encode`."""

    def encode_lines(self, lines: Sequence[str]) -> list[str]:
        """`encode` of many lines at once; overridden where a library has a quicker way."""
        return [self.encode(line) for line in lines]

    def files(self) -> Sequence[Path]:
        """Files that must travel with a model that uses this."""
        return ()


class Tokenizer(TextCodec):
    """Words and punctuation (`--tokenizer`).

    Args:
        cfg: the entry's config.
        source_lang: what `encode` reads.
        target_lang: what `decode` writes.
    """

    def __init__(self, cfg: Any, source_lang: str = "en", target_lang: str = "en") -> None:
        self.cfg = cfg
        self.source_lang, self.target_lang = source_lang, target_lang


class Subword(TextCodec):
    """Pieces of words (`--bpe`).

    Args:
        cfg: the entry's config.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def is_beginning_of_word(self, piece: str) -> bool:
        """Whether a piece begins a word.

        Raises:
            ConfigError: this segmentation cannot tell.
        """
        raise ConfigError(f"{type(self).__name__} cannot tell where words begin")

    def drops_text(self) -> bool:
        """Whether text that is not known leaves no piece at all, as far as can be told."""
        return False

    def vocabulary(self) -> Sequence[str]:
        """Every symbol that `encode` may give, and those it never gives, in the model's own order.

        Raises:
            ConfigError: this segmentation has no numbers of its own.
        """
        raise ConfigError(
            "--dict-from-tokenizer: only --bpe hf_tokenizer, gpt2 and hf_byte_bpe number their "
            "pieces; --bpe hf_tokenizer reads sentencepiece models and BERT's vocab.txt as well"
        )


class NumberedSubword(Subword):
    """Subwords whose library gives the numbers of pieces, many lines at once."""

    @abstractmethod
    def numbers(self, lines: Sequence[str]) -> Sequence[Sequence[int]]:
        """The numbers of each line's pieces."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """The symbol that each number is written as."""

    def encode(self, text: str) -> str:
        """Segment a line into the symbols of its pieces."""
        return self.encode_lines([text])[0]

    def encode_lines(self, lines: Sequence[str]) -> list[str]:
        """Segment lines."""
        name = self.names().__getitem__
        return [" ".join(map(name, found)) for found in self.numbers(lines)]


def build_tokenizer(
    choice: Choice, source_lang: str | None = None, target_lang: str | None = None
) -> Tokenizer | None:
    """The tokenizer of a run, or None when it has none."""
    if choice.name is None:
        return None
    factory = TOKENIZERS.get(choice.name).factory
    tokenizer: Tokenizer = factory(choice.config, source_lang or "en", target_lang or "en")
    return tokenizer


def build_bpe(choice: Choice) -> Subword | None:
    """The subword segmentation of a run, or None when it has none."""
    if choice.name is None:
        return None
    subword: Subword = BPE.get(choice.name).factory(choice.config)
    return subword


def build_codecs(
    tokenizer: Choice,
    bpe: Choice,
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Raw text to segmented text (tokenizer, then subwords), and back."""
    parts = codec_chain(tokenizer, bpe, source_lang, target_lang)

    def encode(text: str) -> str:
        for codec in parts:
            text = codec.encode(text)
        return text

    def decode(text: str) -> str:
        for codec in reversed(parts):
            text = codec.decode(text)
        return text

    return encode, decode


def codec_chain(
    tokenizer: Choice,
    bpe: Choice,
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> list[TextCodec]:
    """What a line goes through on the way in, in this order."""
    both = (build_tokenizer(tokenizer, source_lang, target_lang), build_bpe(bpe))
    return [codec for codec in both if codec is not None]


def check_codecs(tokenizer: Choice, bpe: Choice) -> None:
    """Refuse entries whose files are missing, before any work and before they are recorded.

    Raises:
        FliteError: as the entry says it.
    """
    build_bpe(bpe)
    # A tokenizer may take a second to import: those without a file have nothing to be checked.
    fields = dataclasses.fields(tokenizer.config)
    if any(isinstance(getattr(tokenizer.config, field.name), str) for field in fields):
        build_tokenizer(tokenizer)


def required_file(path: str | None, flag: str) -> Path:
    """The file a flag names.

    Raises:
        ConfigError: the flag was not given.
        DataError: there is no such file.
    """
    if not path:
        raise ConfigError(f"{flag} is needed: give the path of the file")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{flag} {path}: no such file")
    return file
