"""Text files to token files: block by block, in as many processes as wanted, the same bytes always.

No interpreted step is taken per word or per line (see `data.words`); memory holds a block and the
counts, not the corpus. A line ends at LF, CR LF or CR; words are separated by any Unicode
whitespace. This module imports no torch: it also runs in the processes that `data.workers` starts.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.dictionary import Dictionary, PathLike
from fairseq_lite.data.indexed import IndexedWriter, best_dtype
from fairseq_lite.data.words import UNKNOWN, Block, WordCounter, WordTable
from fairseq_lite.errors import DataError

BLOCK = 1 << 18  # bytes; what is computed of larger ones falls out of the processor's cache
Progress = Callable[[int], None]  # is told how many bytes more are done


@dataclass(frozen=True)
class Span:
    """The part of a file from byte `start` to byte `end`, whole lines."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class Summary:
    """What was binarised.

    Attributes:
        sentences: lines.
        tokens: words, and one eos a line.
        replaced: words that were replaced by the unknown word.
        unknown: these, and the unknown words that stand in the text itself.
    """

    sentences: int = 0
    tokens: int = 0
    replaced: int = 0
    unknown: int = 0

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.sentences + other.sentences,
            self.tokens + other.tokens,
            self.replaced + other.replaced,
            self.unknown + other.unknown,
        )


def spans(path: PathLike, count: int) -> list[Span]:
    """Cut a file into at most `count` spans of about equal length, at line ends.

    Raises:
        DataError: the file cannot be read.
    """
    name = os.fspath(path)
    bounds = [0]
    with open_text(name) as file:
        size = os.fstat(file.fileno()).st_size
        for number in range(1, count):
            file.seek(size * number // count)
            file.readline()
            bounds.append(max(file.tell(), bounds[-1]))
    bounds.append(size)
    found = [Span(name, a, b) for a, b in itertools.pairwise(bounds) if a < b]
    return found or [Span(name, 0, 0)]


def open_text(path: str) -> Any:
    """Open a file for reading bytes.

    Raises:
        DataError: it cannot be.
    """
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such text file") from None
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None


def blocks(span: Span, progress: Progress | None = None) -> Iterator[Block]:
    """The text of a span in blocks of whole lines.

    Raises:
        DataError: bytes that are not UTF-8; the message names file and line.
    """
    for data, _ in chunks(span, progress):
        yield Block(data)


def chunks(span: Span, progress: Progress | None = None) -> Iterator[tuple[bytes, int]]:
    """The bytes of a span, whole lines at a time, and where in the file they begin.

    Raises:
        DataError: bytes that are not UTF-8; the message names file and line.
    """
    with open_text(span.path) as file:
        file.seek(span.start)
        left = span.end - span.start
        carry = b""
        while left > 0 and (data := file.read(min(BLOCK, left))):
            left -= len(data)
            data = carry + data
            cut = len(data)
            if left:
                # A CR at the very end may be half of a CR LF.
                cut = max(data.rfind(b"\n"), data.rfind(b"\r", 0, len(data) - 1)) + 1
            carry = data[cut:]
            begin = file.tell() - len(data)
            if cut:
                yield _checked(data[:cut], span.path, begin), begin
            if progress is not None:
                progress(cut)
        if carry:  # the file became shorter while it was read
            begin = file.tell() - len(carry)
            yield _checked(carry, span.path, begin), begin


def lines_of(data: bytes) -> list[str]:
    """Whole lines of text without their ends: LF, CR LF or CR."""
    text = data.decode("utf-8")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _checked(data: bytes, path: str, offset: int) -> bytes:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = count_lines(path, offset + e.start, partial=False) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {data[e.start]:#04x}: {e.reason}); "
            "convert the file, for example with iconv"
        ) from None
    return data


def count_lines(path: PathLike, end: int | None = None, partial: bool = True) -> int:
    """The number of lines of a file.

    Args:
        path: the file.
        end: count in the first `end` bytes only.
        partial: count a last line that has no line end.

    Raises:
        DataError: the file cannot be read.
    """
    lines = 0
    last = b""
    with open_text(os.fspath(path)) as file:
        left = os.fstat(file.fileno()).st_size if end is None else end
        while left > 0 and (data := file.read(min(1 << 20, left))):
            left -= len(data)
            lines += data.count(b"\n")
            if b"\r" in data:
                lines += data.count(b"\r") - data.count(b"\r\n")
            if last == b"\r" and data[:1] == b"\n":
                lines -= 1  # a CR LF across two reads was counted twice
            last = data[-1:]
    return lines + (partial and last not in (b"", b"\n", b"\r"))


def count_words(span: Span, progress: Progress | None = None) -> dict[str, int]:
    """How often each word occurs in a span."""
    counter = WordCounter()
    for block in blocks(span, progress):
        counter.add(block)
    return counter.counts()


class Encoder:
    """Looks up the words of whole blocks of text.

    Args:
        indices: word -> id.
        eos: id that ends a line.
        unk: id of words that are not known.
    """

    def __init__(self, indices: Mapping[str, int], eos: int, unk: int) -> None:
        size = max([*indices.values(), eos, unk]) + 1  # the last symbol is never overwritten
        self.dtype = best_dtype(size).newbyteorder("<")
        self.unk, self.eos = unk, eos
        self._table = WordTable(list(indices), list(indices.values()))

    @classmethod
    def of(cls, dictionary: Dictionary) -> Encoder:
        """The encoder of a dictionary, storing ids in the type that its size asks for."""
        return cls(dictionary.indices, dictionary.eos(), dictionary.unk())

    def encode(self, block: Block) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
        """Encode whole lines.

        Returns:
            The ids of all lines, eos after each; the length of each line; how many words were
            replaced by the unknown word (which may itself stand in the text: that is not counted).
        """
        numbers = self._table.look_up(block.hashes())
        unknown = np.flatnonzero(numbers == UNKNOWN)
        numbers[unknown] = self.unk
        sizes = block.line_sizes() + 1
        ids = np.full(len(numbers) + len(sizes), self.eos, dtype=self.dtype)
        is_word = np.ones(len(ids), dtype=bool)
        is_word[block.words_before + np.arange(len(sizes))] = False
        ids[is_word] = numbers
        return ids, sizes, len(unknown)


def encode_span(
    span: Span, encoder: Encoder, prefix: PathLike, progress: Progress | None = None
) -> Summary:
    """Write the sentences of a span as a dataset at `prefix`."""
    writer = IndexedWriter(prefix, encoder.dtype)
    total = Summary()
    try:
        for block in blocks(span, progress):
            ids, sizes, replaced = encoder.encode(block)
            writer.add_block(ids, sizes)
            unknown = int(np.count_nonzero(ids == encoder.unk))
            total += Summary(len(sizes), len(ids), replaced, unknown)
        writer.finalize()
    finally:
        writer.close()
    return total


def encode_alignments(path: PathLike, prefix: PathLike) -> int:
    """Write a file of alignments (`0-0 1-2 …` a line) as a dataset; returns the number of lines.

    Raises:
        DataError: a pair that is not two numbers; the message names file and line.
    """
    name = os.fspath(path)
    open_text(name).close()
    writer = IndexedWriter(prefix, best_dtype(None))
    number = 0
    try:
        with open(name, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                writer.add(parse_alignment(line, f"{name}:{number}"))
        writer.finalize()
    finally:
        writer.close()
    return number


def parse_alignment(line: str, where: str) -> list[int]:
    """`0-0 1-2` as [0, 0, 1, 2].

    Raises:
        DataError: a pair that is not two numbers.
    """
    numbers: list[int] = []
    for pair in line.split():
        source, dash, target = pair.partition("-")
        if not (dash and source.isdecimal() and target.isdecimal()):
            raise DataError(f"{where}: expected pairs such as 0-0 1-2, found {pair!r}")
        numbers += [int(source), int(target)]
    return numbers
