"""Symbols and their ids: fairseq's `dict.txt`, read and written byte for byte.

The four special symbols come first and are never written to the file; then one `TOKEN COUNT` line a
symbol, most frequent first, ties in code-point order, padded with `madeupwordNNNN` to a multiple.
This module imports no torch, so that the processes that binarise text start quickly.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.postprocess import post_process
from fairseq_lite.errors import DataError

OVERWRITE = "#fairseq:overwrite"
_FORMAT = "expected '<token> <cnt> [flags]'"

PathLike = str | os.PathLike[str]


class Dictionary:
    """A mapping from symbols to consecutive ids.

    Args:
        bos, pad, eos, unk: the special symbols, which get the ids 0 to 3 in this order.
        extra_special_symbols: more symbols that precede those of a file.

    Attributes:
        symbols: the symbol of each id.
        count: how often each symbol was seen.
        nspecial: how many special symbols there are.
    """

    def __init__(
        self,
        *,
        bos: str = "<s>",
        pad: str = "<pad>",
        eos: str = "</s>",
        unk: str = "<unk>",
        extra_special_symbols: Iterable[str] = (),
    ) -> None:
        self.bos_word, self.pad_word, self.eos_word, self.unk_word = bos, pad, eos, unk
        self.symbols: list[str] = []
        self.count: list[int] = []
        self.indices: dict[str, int] = {}
        self._bos, self._pad, self._eos, self._unk = (
            self.add_symbol(word) for word in (bos, pad, eos, unk)
        )
        for word in extra_special_symbols:
            self.add_symbol(word)
        self.nspecial = len(self.symbols)

    # -- look-up -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, index: int) -> str:
        """The symbol of an id; the unknown word for an id beyond the dictionary."""
        return self.symbols[index] if index < len(self.symbols) else self.unk_word

    def __contains__(self, symbol: object) -> bool:
        return symbol in self.indices

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.indices == other.indices

    __hash__ = None  # type: ignore[assignment]  # mutable

    def index(self, symbol: str) -> int:
        """The id of a symbol, or that of the unknown word."""
        return self.indices.get(symbol, self._unk)

    def bos(self) -> int:
        """Id of the symbol that begins a sentence."""
        return self._bos

    def pad(self) -> int:
        """Id of padding."""
        return self._pad

    def eos(self) -> int:
        """Id of the symbol that ends a sentence."""
        return self._eos

    def unk(self) -> int:
        """Id of the unknown word."""
        return self._unk

    # -- making ------------------------------------------------------------------------------------

    def add_symbol(self, symbol: str, n: int = 1, overwrite: bool = False) -> int:
        """Add `n` occurrences of a symbol and return its id.

        Args:
            symbol: the text of the symbol.
            n: how many times it was seen.
            overwrite: give a known symbol a new id, which takes precedence from now on.
        """
        index = self.indices.get(symbol)
        if index is not None and not overwrite:
            self.count[index] += n
            return index
        index = len(self.symbols)
        self.indices[symbol] = index
        self.symbols.append(symbol)
        self.count.append(n)
        return index

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Add the occurrences of many symbols, in code-point order."""
        for symbol in sorted(counts):
            self.add_symbol(symbol, counts[symbol])

    def update(self, other: Dictionary) -> None:
        """Add the symbols of another dictionary and sum the counts of those in both."""
        for symbol, count in zip(other.symbols, other.count, strict=True):
            self.add_symbol(symbol, count)

    def finalize(self, threshold: int = -1, nwords: int = -1, padding_factor: int = 8) -> None:
        """Sort by frequency, drop rare symbols, pad the size.

        Args:
            threshold: keep symbols seen at least so often.
            nwords: keep so many symbols, the special ones included; 0 or less keeps all.
            padding_factor: append made-up words until the size is a multiple; 0 or 1: none.
        """
        special = self.nspecial
        found = sorted(
            zip(self.symbols[special:], self.count[special:], strict=True),
            key=lambda item: (-item[1], item[0]),
        )
        if nwords > 0:
            found = found[: max(nwords - special, 0)]
        kept = [(symbol, count) for symbol, count in found if count >= threshold]
        self.symbols = self.symbols[:special] + [symbol for symbol, _ in kept]
        self.count = self.count[:special] + [count for _, count in kept]
        self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.pad_to_multiple_(padding_factor)

    def pad_to_multiple_(self, padding_factor: int) -> None:
        """Append `madeupwordNNNN` symbols until the size is a multiple of `padding_factor`."""
        number = 0
        while padding_factor > 1 and len(self) % padding_factor:
            self.add_symbol(f"madeupword{number:04d}", n=0)
            number += 1

    def truncated(self, size: int) -> Dictionary:
        """The first `size` symbols, special ones included, as a dictionary of their own."""
        other = copy.copy(self)
        other.symbols, other.count = self.symbols[:size], self.count[:size]
        other.indices = {symbol: i for symbol, i in self.indices.items() if i < size}
        return other

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: PathLike, **special: Any) -> Dictionary:
        """Read a `dict.txt`.

        Raises:
            DataError: no such file, bytes that are not UTF-8, a line of another form, or a symbol
                given twice; the message names the file and the line.
        """
        dictionary = cls(**special)
        dictionary.add_from_file(path)
        return dictionary

    def add_from_file(self, path: PathLike) -> None:
        """Append the symbols of a `dict.txt` (see `load`)."""
        try:
            # Universal newlines, as everywhere; splitlines() would also cut at U+0085 and U+2028.
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            raise DataError(f"no dictionary {os.fspath(path)}: expected a dict.txt") from None
        except UnicodeDecodeError as e:
            fault = e.object[: e.start].count(b"\n") + 1
            raise DataError(f"{os.fspath(path)}:{fault}: not UTF-8: {e.reason}") from None
        except OSError as e:
            raise DataError(f"cannot read the dictionary {os.fspath(path)}: {e.strerror}") from None
        if lines[-1] == "":
            lines.pop()
        for number, line in enumerate(lines, start=1):
            self._add_line(line, f"{os.fspath(path)}:{number}")

    def _add_line(self, line: str, where: str) -> None:
        rest, space, field = line.rstrip().rpartition(" ")
        overwrite = field == OVERWRITE
        if overwrite:
            rest, space, field = rest.rpartition(" ")
        try:
            count = int(field if space else "")
        except ValueError:
            raise DataError(f"{where}: {_FORMAT}, found {line!r}") from None
        if rest in self.indices and not overwrite:
            raise DataError(
                f"{where}: {rest!r} is in the dictionary already; remove the line, or end it with "
                f"{OVERWRITE!r} to let it replace the earlier one"
            )
        self.add_symbol(rest, count, overwrite)

    def save(self, path: PathLike) -> None:
        """Write a `dict.txt`: every symbol but the special ones, with its count."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(self._lines())

    def _lines(self) -> Iterable[str]:
        seen = set(self.symbols[: self.nspecial])
        rows = zip(self.symbols[self.nspecial :], self.count[self.nspecial :], strict=True)
        for symbol, count in rows:
            # A symbol given twice needs its mark again, or the file could not be read back.
            yield f"{symbol} {count} {OVERWRITE}\n" if symbol in seen else f"{symbol} {count}\n"
            seen.add(symbol)

    # -- text --------------------------------------------------------------------------------------

    def encode_line(self, line: str, append_eos: bool = True) -> npt.NDArray[np.int64]:
        """The ids of a line's words, split at any Unicode whitespace; shape (length,)."""
        get, unk = self.indices.get, self._unk
        ids = [get(word, unk) for word in line.split()]
        if append_eos:
            ids.append(self._eos)
        return np.array(ids, dtype=np.int64)

    def unk_string(self, escape: bool = False) -> str:
        """The unknown word, in a form that no text contains when escaped."""
        return f"<{self.unk_word}>" if escape else self.unk_word

    def string(
        self,
        ids: Sequence[int] | npt.NDArray[Any] | Any,
        bpe_symbol: str | None = None,
        escape_unk: bool = False,
        extra_symbols_to_ignore: Iterable[int] | None = None,
        unk_string: str | None = None,
        include_eos: bool = False,
        separator: str = " ",
    ) -> str:
        """Turn ids back into a line of text; rows of a matrix become lines.

        Args:
            ids: a sequence, array or tensor of ids, or a matrix of them.
            bpe_symbol: how to join subwords, see `post_process`.
            escape_unk: write the unknown word as `<<unk>>`.
            extra_symbols_to_ignore: ids left out, besides bos and (unless `include_eos`) eos.
            unk_string: what to write for the unknown word.
            include_eos: keep eos.
            separator: what stands between symbols.
        """
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if values and isinstance(values[0], list):
            options = (bpe_symbol, escape_unk, extra_symbols_to_ignore, unk_string, include_eos)
            return "\n".join(self.string(row, *options, separator) for row in values)
        ignored = {self._bos, *(extra_symbols_to_ignore or ())}
        if not include_eos:
            ignored.add(self._eos)
        unknown = self.unk_string(escape_unk) if unk_string is None else unk_string
        words = (unknown if i == self._unk else self[i] for i in values if i not in ignored)
        return post_process(separator.join(words), bpe_symbol)
