"""Subwords learned from data: sentencepiece, subword-nmt, fastBPE, GPT-2's and BERT's."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from fairseq_lite.config.flags import flag
from fairseq_lite.data.postprocess import post_process
from fairseq_lite.data.text.api import BPE, NumberedSubword, Subword, required_file
from fairseq_lite.errors import DataError, MissingDependency

SPACE_MARK = "\u2581"


def load_sentencepiece(path: Path) -> Any:
    """Open a sentencepiece model.

    Raises:
        DataError: the file is not one.
    """
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise DataError(f"{path}: not a sentencepiece model, or a damaged one") from None


@dataclass(frozen=True)
class SentencepieceConfig:
    """Flags of sentencepiece."""

    sentencepiece_model: str | None = flag(None, "path of the model")
    sentencepiece_enable_sampling: bool = flag(False, "draw a segmentation instead of the best")
    sentencepiece_alpha: float | None = flag(
        None, "smoothing of the draw (unigram), or share of merges left out (BPE)"
    )


@BPE.register("sentencepiece", config=SentencepieceConfig)
class Sentencepiece(Subword):
    """A sentencepiece model."""

    cfg: SentencepieceConfig

    def __init__(self, cfg: SentencepieceConfig) -> None:
        super().__init__(cfg)
        self._path = required_file(cfg.sentencepiece_model, "--sentencepiece-model")
        self._model = load_sentencepiece(self._path)

    def encode(self, text: str) -> str:
        """Segment a line, at random with `--sentencepiece-enable-sampling`."""
        cfg = self.cfg
        if cfg.sentencepiece_enable_sampling:
            alpha = 0.1 if cfg.sentencepiece_alpha is None else cfg.sentencepiece_alpha
            pieces = self._model.encode(
                text, out_type=str, enable_sampling=True, alpha=alpha, nbest_size=-1
            )
        else:
            pieces = self._model.encode(text, out_type=str)
        return " ".join(pieces)

    def encode_lines(self, lines: Sequence[str]) -> list[str]:
        """Segment lines."""
        if self.cfg.sentencepiece_enable_sampling:
            return super().encode_lines(lines)
        found = self._model.encode(list(lines), out_type=str, num_threads=1)
        return [" ".join(pieces) for pieces in found]

    def decode(self, text: str) -> str:
        """Join pieces."""
        return post_process(text, "sentencepiece")

    def is_beginning_of_word(self, piece: str) -> bool:
        """Whether a piece begins a word; special symbols do."""
        return piece in ("<unk>", "<s>", "</s>", "<pad>") or piece.startswith(SPACE_MARK)

    def files(self) -> Sequence[Path]:
        """The model."""
        return (self._path,)


@dataclass(frozen=True)
class SubwordNmtConfig:
    """Flags of subword-nmt."""

    bpe_codes: str | None = flag(None, "path of the learned merges")
    bpe_separator: str = flag("@@", "mark of a piece that the word goes on after")


@BPE.register("subword_nmt", config=SubwordNmtConfig)
class SubwordNmt(Subword):
    """Merges learned by subword-nmt; the package is needed to segment, not to join."""

    cfg: SubwordNmtConfig

    def __init__(self, cfg: SubwordNmtConfig) -> None:
        super().__init__(cfg)
        self._path = required_file(cfg.bpe_codes, "--bpe-codes")
        self._bpe: Any = None

    def encode(self, text: str) -> str:
        """Segment a line of words.

        Raises:
            MissingDependency: subword-nmt is not installed.
        """
        if self._bpe is None:
            self._bpe = self._load()
        line: str = self._bpe.process_line(text)
        return line

    def _load(self) -> Any:
        try:
            from subword_nmt import apply_bpe
        except ImportError:
            raise MissingDependency(
                "--bpe subword_nmt needs subword-nmt to segment text: pip install subword-nmt"
            ) from None
        with self._path.open(encoding="utf-8") as codes:
            try:
                return apply_bpe.BPE(codes, separator=self.cfg.bpe_separator)
            except (SystemExit, ValueError, IndexError):  # its reader exits on a malformed line
                raise DataError(f"--bpe-codes {self._path}: not a file of merges") from None

    def decode(self, text: str) -> str:
        """Join pieces."""
        return (text + " ").replace(self.cfg.bpe_separator + " ", "").rstrip()

    def files(self) -> Sequence[Path]:
        """The merges."""
        return (self._path,)


@dataclass(frozen=True)
class FastBpeConfig:
    """Flags of fastBPE."""

    bpe_codes: str | None = flag(None, "path of the learned merges")


@BPE.register("fastbpe", config=FastBpeConfig)
class FastBpe(Subword):
    """Merges learned by fastBPE; the package is needed to segment, not to join."""

    cfg: FastBpeConfig

    def __init__(self, cfg: FastBpeConfig) -> None:
        super().__init__(cfg)
        self._path = required_file(cfg.bpe_codes, "--bpe-codes")
        self._bpe: Any = None

    def encode(self, text: str) -> str:
        """Segment a line of words.

        Raises:
            MissingDependency: fastBPE is not installed.
        """
        if self._bpe is None:
            try:
                import fastBPE
            except ImportError:
                raise MissingDependency(
                    "--bpe fastbpe needs fastBPE to segment text: pip install fastBPE"
                ) from None
            self._bpe = fastBPE.fastBPE(str(self._path))
        line: str = self._bpe.apply([text])[0]
        return line

    def decode(self, text: str) -> str:
        """Join pieces."""
        return post_process(text, "@@ ")

    def files(self) -> Sequence[Path]:
        """The merges."""
        return (self._path,)


def tokenizers_library(name: str) -> Any:
    """Hugging Face's tokenizers, for the `--bpe` called `name`; imported when first needed.

    Raises:
        MissingDependency: it is not installed.
    """
    # The library's threads do not survive a fork, which it says on standard error whenever a
    # process is made afterwards. Processes are what --workers asks for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError:
        raise MissingDependency(f"--bpe {name} needs tokenizers: pip install tokenizers") from None
    return tokenizers


class _ByteLevel(NumberedSubword):
    """Byte-level BPE whose pieces are written as their numbers.

    Args:
        cfg: the entry's config.
        vocab: JSON of piece -> number.
        merges: the merges, one a line.
        prefix_space: put a space before the line.
    """

    name: str

    def __init__(self, cfg: Any, vocab: Path, merges: Path, prefix_space: bool = False) -> None:
        super().__init__(cfg)
        self._vocab, self._merges = vocab, merges
        self._prefix_space = prefix_space

    @functools.cached_property
    def _bpe(self) -> Any:
        library = tokenizers_library(self.name)
        try:
            return library.ByteLevelBPETokenizer(
                str(self._vocab), str(self._merges), add_prefix_space=self._prefix_space
            )
        except Exception as e:  # the library raises bare Exception for malformed files
            raise DataError(
                f"{self._vocab}, {self._merges}: not a byte-level BPE: {' '.join(str(e).split())}"
            ) from None

    @functools.cached_property
    def _pieces(self) -> dict[int, str]:
        return {number: piece for piece, number in self._bpe.get_vocab().items()}

    @functools.cached_property
    def _names(self) -> list[str]:
        return [str(number) for number in range(max(self._pieces, default=-1) + 1)]

    def numbers(self, lines: Sequence[str]) -> list[list[int]]:
        """The numbers of each line's pieces."""
        return [line.ids for line in self._bpe.encode_batch(list(lines))]

    def names(self) -> Sequence[str]:
        """A piece is written as its number."""
        return self._names

    def vocabulary(self) -> Sequence[str]:
        """All numbers."""
        return self._names

    def decode(self, text: str) -> str:
        """Turn numbers into text; anything else, such as <unk>, stays as it is."""
        pieces: list[str] = []
        run: list[int] = []
        for word in text.split():
            if word.isdecimal() and int(word) in self._pieces:
                run.append(int(word))
                continue
            pieces += [self._bpe.decode(run), word]
            run = []
        return "".join([*pieces, self._bpe.decode(run)])

    def is_beginning_of_word(self, piece: str) -> bool:
        """Whether the piece with this number begins with a space."""
        if not piece.isdecimal():
            return True
        return self._pieces.get(int(piece), "").startswith("\u0120")

    def files(self) -> Sequence[Path]:
        """Vocabulary and merges."""
        return (self._vocab, self._merges)


@dataclass(frozen=True)
class Gpt2Config:
    """Flags of GPT-2's BPE."""

    gpt2_encoder_json: str | None = flag(None, "path of encoder.json")
    gpt2_vocab_bpe: str | None = flag(None, "path of vocab.bpe")


@BPE.register("gpt2", config=Gpt2Config)
class Gpt2(_ByteLevel):
    """GPT-2's byte-level BPE."""

    name = "gpt2"

    def __init__(self, cfg: Gpt2Config) -> None:
        vocab = required_file(cfg.gpt2_encoder_json, "--gpt2-encoder-json")
        super().__init__(cfg, vocab, required_file(cfg.gpt2_vocab_bpe, "--gpt2-vocab-bpe"))


@dataclass(frozen=True)
class HfByteBpeConfig:
    """Flags of byte-level BPE in Hugging Face's files."""

    bpe_merges: str | None = flag(None, "path of merges.txt")
    bpe_vocab: str | None = flag(None, "path of vocab.json")
    bpe_add_prefix_space: bool = flag(False, "put a space before every line")


@BPE.register("hf_byte_bpe", config=HfByteBpeConfig)
class HfByteBpe(_ByteLevel):
    """Byte-level BPE as Hugging Face's tokenizers store it."""

    name = "hf_byte_bpe"

    def __init__(self, cfg: HfByteBpeConfig) -> None:
        vocab = required_file(cfg.bpe_vocab, "--bpe-vocab")
        merges = required_file(cfg.bpe_merges, "--bpe-merges")
        super().__init__(cfg, vocab, merges, cfg.bpe_add_prefix_space)


@dataclass(frozen=True)
class BertConfig:
    """Flags of BERT's word pieces."""

    bpe_cased: bool = flag(False, "keep upper case")
    bpe_vocab_file: str | None = flag(None, "path of vocab.txt")


@BPE.register("bert", config=BertConfig)
class Bert(Subword):
    """BERT's word pieces."""

    cfg: BertConfig

    def __init__(self, cfg: BertConfig) -> None:
        super().__init__(cfg)
        self._path = required_file(cfg.bpe_vocab_file, "--bpe-vocab-file")

    @functools.cached_property
    def _pieces(self) -> Any:
        library = tokenizers_library("bert")
        try:
            return library.BertWordPieceTokenizer(str(self._path), lowercase=not self.cfg.bpe_cased)
        except Exception as e:  # the library raises bare Exception for malformed files
            raise DataError(f"{self._path}: not a vocabulary of BERT's kind: {e}") from None

    def encode(self, text: str) -> str:
        """Segment a line."""
        return self.encode_lines([text])[0]

    def encode_lines(self, lines: Sequence[str]) -> list[str]:
        """Segment lines."""
        found = self._pieces.encode_batch(list(lines), add_special_tokens=False)
        return [" ".join(line.tokens) for line in found]

    def decode(self, text: str) -> str:
        """Join pieces, and punctuation to the word before it."""
        line = text.replace(" ##", "").strip()
        for mark in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re"):
            line = line.replace(" " + mark, mark)
        return line

    def is_beginning_of_word(self, piece: str) -> bool:
        """Whether a piece begins a word."""
        return not piece.startswith("##")

    def files(self) -> Sequence[Path]:
        """The vocabulary."""
        return (self._path,)
