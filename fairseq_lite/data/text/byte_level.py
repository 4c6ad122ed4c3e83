"""Subwords without a model of words: characters, bytes, and sentencepiece over bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_lite.config.flags import flag
from fairseq_lite.data.text.api import BPE, Subword, required_file
from fairseq_lite.data.text.bpe import SPACE_MARK, load_sentencepiece

# A byte is written as the Latin-1 character it is where that can be printed, else 256 further on.
_PRINTABLE = {*range(32, 127), *range(161, 173), *range(174, 256)}
_BYTE_TO_CHAR = {b: chr(b if b in _PRINTABLE else 256 + b) for b in range(256)}
_CHAR_TO_BYTE = {c: b for b, c in _BYTE_TO_CHAR.items()}


def bytes_to_chars(text: str) -> str:
    """The UTF-8 bytes of a line, each as one printable character; whitespace made single spaces."""
    return "".join(_BYTE_TO_CHAR[b] for b in re.sub(r"\s+", " ", text).encode("utf-8"))


def chars_to_text(text: str) -> str:
    """Undo `bytes_to_chars`; bytes that make up no character are left out."""
    found = bytes(_CHAR_TO_BYTE[c] for c in text if c in _CHAR_TO_BYTE)
    return found.decode("utf-8", errors="ignore")


def _apart(text: str) -> str:
    return " ".join(text.replace(" ", SPACE_MARK))


def _together(text: str) -> str:
    return text.replace(" ", "").replace(SPACE_MARK, " ")


@BPE.register("characters")
class Characters(Subword):
    """Every character a piece."""

    def encode(self, text: str) -> str:
        """Put a space between characters."""
        return _apart(text)

    def decode(self, text: str) -> str:
        """Join characters."""
        return _together(text)


@BPE.register("bytes")
class Bytes(Subword):
    """Every byte a piece."""

    def encode(self, text: str) -> str:
        """Put a space between bytes."""
        return _apart(bytes_to_chars(text))

    def decode(self, text: str) -> str:
        """Join bytes."""
        return chars_to_text(_together(text))


@dataclass(frozen=True)
class ByteBpeConfig:
    """Flags of sentencepiece over bytes."""

    sentencepiece_model_path: str | None = flag(None, "path of the model")


@BPE.register("byte_bpe", config=ByteBpeConfig)
class ByteBpe(Subword):
    """A sentencepiece model of bytes."""

    def __init__(self, cfg: ByteBpeConfig) -> None:
        super().__init__(cfg)
        self._path = required_file(cfg.sentencepiece_model_path, "--sentencepiece-model-path")
        self._model = load_sentencepiece(self._path)

    def encode(self, text: str) -> str:
        """Segment the bytes of a line."""
        return " ".join(self._model.encode(bytes_to_chars(text), out_type=str))

    def decode(self, text: str) -> str:
        """Join pieces."""
        # sentencepiece begins a line with a space of its own
        return chars_to_text(_together(text)).removeprefix(" ")

    def files(self) -> Sequence[Path]:
        """The model."""
        return (self._path,)
