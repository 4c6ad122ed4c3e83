"""Words of a block of text as numbers: split, hashed and looked up by numpy, no step per word.

A word is known by a 64-bit hash of its bytes and length; the hash table is two arrays that whole
blocks are looked up in. Two of a million different words share a hash with a probability of one in
forty million.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]

_PAD = 8  # bytes after a text, so that eight can be read at any position of it
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[[*range(9, 14), *range(28, 33)]] = True
_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(9)], dtype=np.uint64)
_A, _B, _C = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xFF51AFD7ED558CCD))
_EMPTY = np.uint64(0)
UNKNOWN = -1


class Block:
    """Whole lines of text, split into words.

    Args:
        data: valid UTF-8; lines end in LF, CR LF or CR.

    Attributes:
        starts: where each word begins, in bytes.
        lengths: how many bytes it has.
        words_before: for each line end, how many words come before it.
    """

    def __init__(self, data: bytes) -> None:
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not data.endswith(b"\n"):
            data += b"\n"
        self.text = np.frombuffer(bytearray(data + bytes(_PAD)), dtype=np.uint8)
        if not data.isascii():
            _replace_wide_spaces(self.text)
        space = _IS_SPACE[self.text[:-_PAD]]
        edges = np.flatnonzero(space[1:] != space[:-1]) + 1
        if not space[0]:
            edges = np.concatenate([[0], edges])
        self.starts = edges[0::2]
        self.lengths = edges[1::2] - self.starts
        line_ends = np.flatnonzero(self.text[:-_PAD] == 10)
        self.words_before = np.searchsorted(self.starts, line_ends)

    def word(self, number: int) -> str:
        """The text of a word."""
        start = int(self.starts[number])
        return self.text[start : start + int(self.lengths[number])].tobytes().decode("utf-8")

    def hashes(self) -> Hashes:
        """The hash of every word."""
        return _hash(self.text, self.starts, self.lengths)

    def line_sizes(self) -> Ids:
        """How many words each line has."""
        return np.diff(self.words_before, prepend=0)


def _replace_wide_spaces(text: Bytes) -> None:
    """Overwrite the whitespace beyond ASCII with spaces."""
    # U+0085 and U+00A0
    for at in _after(text, 0xC2, 1):
        _blank(text, at[(text[at] == 0x85) | (text[at] == 0xA0)], 1)
    # U+1680
    for at in _after(text, 0xE1, 2):
        _blank(text, at[(text[at - 1] == 0x9A) & (text[at] == 0x80)], 2)
    # U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F
    for at in _after(text, 0xE2, 2):
        second, third = text[at - 1], text[at]
        general = (third <= 0x8A) | (third == 0xA8) | (third == 0xA9) | (third == 0xAF)
        found = ((second == 0x80) & general) | ((second == 0x81) & (third == 0x9F))
        _blank(text, at[found], 2)
    # U+3000
    for at in _after(text, 0xE3, 2):
        _blank(text, at[(text[at - 1] == 0x80) & (text[at] == 0x80)], 2)


def _after(text: Bytes, lead: int, distance: int) -> list[Ids]:
    found = np.flatnonzero(text == lead)
    return [found + distance] if len(found) else []


def _blank(text: Bytes, last: Ids, before: int) -> None:
    for distance in range(before + 1):
        text[last - distance] = 32


def _hash(text: Bytes, starts: Ids, lengths: Ids) -> Hashes:
    # Eight bytes from any position on; reading across words is mended by the masks.
    windows: Hashes = np.ndarray((len(text) - 7,), dtype="<u8", buffer=text.data, strides=(1,))
    found: Hashes = (windows[starts] & _MASKS[np.minimum(lengths, 8)]) * _A
    found ^= lengths.astype(np.uint64) * _B
    found ^= found >> np.uint64(32)
    found *= _C
    position = 8
    longer = np.flatnonzero(lengths > position)
    while len(longer):
        mask = _MASKS[np.minimum(lengths[longer] - position, 8)]
        part = found[longer] ^ ((windows[starts[longer] + position] & mask) * _A)
        part ^= part >> np.uint64(29)
        found[longer] = part * _C
        position += 8
        longer = longer[lengths[longer] > position]
    found |= np.uint64(1)  # zero marks an empty slot
    return found


class WordTable:
    """A hash table from words to numbers that answers for whole blocks.

    Args:
        words: the words.
        numbers: the number of each.
    """

    def __init__(self, words: Sequence[str] = (), numbers: Sequence[int] = ()) -> None:
        self._count = 0
        self._resize(1 << 16)
        if words:
            encoded = [w.encode("utf-8") for w in words]
            lengths = np.array([len(w) for w in encoded], dtype=np.int64)
            text = np.frombuffer(b"".join(encoded) + bytes(_PAD), dtype=np.uint8)
            hashes = _hash(text, np.cumsum(lengths) - lengths, lengths)
            self.insert(hashes, np.array(numbers, dtype=np.int64))

    def _resize(self, slots: int) -> None:
        self._keys = np.zeros(slots, dtype=np.uint64)
        self._values = np.full(slots, UNKNOWN, dtype=np.int64)
        self._shift = np.uint64(64 - (slots.bit_length() - 1))
        self._last = slots - 1

    def _slots(self, hashes: Hashes) -> Ids:
        slots: Ids = ((hashes * _B) >> self._shift).astype(np.int64)
        return slots

    def insert(self, hashes: Hashes, numbers: Ids) -> None:
        """Add words that are not in the table, each once."""
        self._count += len(hashes)
        if 4 * self._count > len(self._keys):
            old = self._keys != _EMPTY
            hashes = np.concatenate([self._keys[old], hashes])
            numbers = np.concatenate([self._values[old], numbers])
            self._resize(1 << int(8 * self._count - 1).bit_length())
        slots = self._slots(hashes)
        while len(slots):
            free = np.flatnonzero(self._keys[slots] == _EMPTY)
            # Of those that want the same free slot the first gets it.
            taken, first = np.unique(slots[free], return_index=True)
            winners = free[first]
            self._keys[taken] = hashes[winners]
            self._values[taken] = numbers[winners]
            rest = np.ones(len(slots), dtype=bool)
            rest[winners] = False
            hashes, numbers = hashes[rest], numbers[rest]
            slots = (slots[rest] + 1) & self._last

    def look_up(self, hashes: Hashes) -> Ids:
        """The number of each word, UNKNOWN where there is none."""
        slots = self._slots(hashes)
        keys = self._keys[slots]
        numbers: Ids = self._values[slots]
        # An empty slot already gave UNKNOWN; another word's slot sends us on to the next.
        pending = np.flatnonzero((keys != hashes) & (keys != _EMPTY))
        slots = slots[pending]
        while len(pending):
            slots = (slots + 1) & self._last
            keys = self._keys[slots]
            numbers[pending] = self._values[slots]
            going_on = (keys != hashes[pending]) & (keys != _EMPTY)
            pending, slots = pending[going_on], slots[going_on]
        return numbers


class WordCounter:
    """Counts the words of blocks."""

    def __init__(self) -> None:
        self._table = WordTable()
        self._words: list[str] = []
        self._counts: npt.NDArray[Any] = np.zeros(1024, dtype=np.int64)

    def add(self, block: Block) -> None:
        """Count the words of a block."""
        hashes = block.hashes()
        numbers = self._table.look_up(hashes)
        unknown = np.flatnonzero(numbers == UNKNOWN)
        if len(unknown):
            new, first, which = np.unique(hashes[unknown], return_index=True, return_inverse=True)
            known = len(self._words)
            self._words += [block.word(n) for n in unknown[first]]
            self._table.insert(new, np.arange(known, known + len(new)))
            numbers[unknown] = known + which
        while len(self._counts) < len(self._words):
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        found = np.bincount(numbers)
        self._counts[: len(found)] += found

    def counts(self) -> dict[str, int]:
        """How often each word occurred."""
        return dict(zip(self._words, self._counts.tolist(), strict=False))
