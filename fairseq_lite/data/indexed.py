"""Token files: `PREFIX.idx` says where each item of `PREFIX.bin` lies; both are memory-mapped.

The layout is fairseq's, byte for byte. Items are read in batches (`gather`), which costs a tenth of
reading them one by one. Nothing but the sizes (4 bytes an item) is copied into a process, and these
only where `sizes` is used; a pickled dataset is its path, so ranks and workers share one copy of
the data.

Source: fairseq's `indexed_dataset` formats: mmap ("MMIDIDX"), cached and lazy ("TNTIDX"), raw text.
"""

from __future__ import annotations

import functools
import os
import struct
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.dictionary import Dictionary, PathLike
from fairseq_lite.errors import DataError

MMAP_MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
_MMAP_HEADER = struct.Struct("<9sQBQ")
_LEGACY_HEADER = struct.Struct("<8sQQQQQ")
_VERSION = 1
_TYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float64,
    8: np.uint16,
    9: np.uint32,
    10: np.uint64,
}
_CODES = {np.dtype(t): code for code, t in _TYPES.items() if code != 6}
_SIZES_PER_STEP = 1 << 20  # items; what the index is written and checked in
_SCAN_LIMIT = 1 << 24  # tokens; what check_vocabulary reads at once
_LONG = 64  # tokens; from this mean length on, ranges are read as slices

Ids = npt.NDArray[np.int64]


def best_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The type that fairseq stores ids of a vocabulary in; None: not a vocabulary."""
    if vocab_size is not None and vocab_size < 65500:
        return np.dtype(np.uint16)
    if vocab_size is None or vocab_size < 4294967295:
        return np.dtype(np.uint32)
    return np.dtype(np.int64)


def ranges(starts: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> Ids:
    """The positions start, start + 1, … of every item, one after another; shape (sum(sizes),)."""
    sizes = sizes.astype(np.int64, copy=False)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(total, dtype=np.int64)


class TokenDataset(ABC):
    """A sequence of token sequences.

    Attributes:
        sizes: length of every item in tokens, int32; what batches are made of.
    """

    sizes: npt.NDArray[Any]
    _limit: int | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def sizes_of(self, which: slice | Ids) -> Ids:
        """Lengths of some items, int64; does not need `sizes` as a whole where files have them."""
        lengths: Ids = self.sizes[which].astype(np.int64)
        return lengths

    @abstractmethod
    def _gather(self, indices: Ids) -> tuple[Ids, Ids]: ...

    def gather(self, indices: Sequence[int] | npt.NDArray[Any]) -> tuple[Ids, Ids]:
        """Read items.

        Returns:
            Their tokens, one item after another, and the length of each; both int64.

        Raises:
            DataError: an id beyond the vocabulary given to `check_vocabulary`.
        """
        tokens, sizes = self._gather(np.asarray(indices, dtype=np.int64))
        if self._limit is not None and len(tokens):
            self._check(tokens)
        return tokens, sizes

    def __getitem__(self, index: int) -> Ids:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self.gather([index % len(self)])[0]

    def check_vocabulary(self, size: int) -> None:
        """Make sure that no id is `size` or more: the first part now, the rest as it is read.

        Raises:
            DataError: an id does not fit, so the data was made with another dictionary.
        """
        self._limit = size
        if len(self):
            # A prefix of the items, so that a start costs the same for any size of corpus.
            ends = np.cumsum(self.sizes_of(slice(0, _SCAN_LIMIT)))
            count = int(np.searchsorted(ends, _SCAN_LIMIT)) + 1
            self.gather(np.arange(min(count, len(self))))

    def _check(self, tokens: Ids) -> None:
        largest = int(tokens.max())
        if self._limit is not None and (largest >= self._limit or int(tokens.min()) < 0):
            raise DataError(
                f"{self}: token id {largest} does not fit the dictionary of {self._limit} symbols; "
                "use the dict.txt that the data was preprocessed with"
            )


class MemoryDataset(TokenDataset):
    """Items held in memory.

    Args:
        tokens: all tokens, one item after another.
        sizes: the length of each item.
        name: what to call it in messages.
    """

    def __init__(
        self, tokens: npt.NDArray[Any], sizes: npt.NDArray[Any], name: str = "<memory>"
    ) -> None:
        self._tokens = tokens
        self.sizes = sizes.astype(np.int32)
        self._starts = np.cumsum(sizes, dtype=np.int64) - sizes
        self._name = name

    @classmethod
    def of(cls, items: Sequence[Sequence[int] | npt.NDArray[Any]]) -> MemoryDataset:
        """From a list of id sequences."""
        arrays = [np.asarray(item, dtype=np.int64) for item in items]
        sizes = np.array([len(a) for a in arrays], dtype=np.int64)
        return cls(np.concatenate(arrays) if arrays else np.zeros(0, np.int64), sizes)

    def __str__(self) -> str:
        return self._name

    def _gather(self, indices: Ids) -> tuple[Ids, Ids]:
        sizes = self.sizes[indices].astype(np.int64)
        return self._tokens[ranges(self._starts[indices], sizes)].astype(np.int64), sizes


class IndexedDataset(TokenDataset):
    """The items of `PREFIX.bin`, memory-mapped; reads the mmap, cached and lazy formats.

    Raises:
        DataError: a file is missing, cut short, or of another format.
    """

    def __init__(self, prefix: PathLike) -> None:
        self.prefix = os.fspath(prefix)
        index_path = self.prefix + ".idx"
        magic = _read_magic(index_path)
        index = _map(index_path)
        if magic.startswith(MMAP_MAGIC):
            self._read_mmap_index(index, index_path)
        elif magic.startswith(LEGACY_MAGIC):
            self._read_legacy_index(index, index_path)
        else:
            raise DataError(
                f"{index_path}: not an index file ({magic[:8]!r} at its start); expected what "
                "flite-preprocess or fairseq-preprocess writes; is --dataset-impl right?"
            )
        self._tokens = _map(self.prefix + ".bin", self.dtype)
        self._check_length()

    def __str__(self) -> str:
        return self.prefix

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.prefix,), {"_limit": self._limit}

    def __len__(self) -> int:
        return len(self._lengths)

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int32]:  # type: ignore[override]
        """Length of every item; a copy, as they are unaligned in the file, which costs each use."""
        return self._lengths.astype(np.int32)

    def sizes_of(self, which: slice | Ids) -> Ids:
        lengths: Ids = self._lengths[which].astype(np.int64)
        return lengths

    def _read_mmap_index(self, index: npt.NDArray[np.uint8], path: str) -> None:
        if len(index) < _MMAP_HEADER.size:
            raise DataError(f"{path}: cut short: {len(index)} bytes, the header alone has 26")
        _, version, code, count = _MMAP_HEADER.unpack(index[: _MMAP_HEADER.size].tobytes())
        _check_version(path, version)
        expected = _MMAP_HEADER.size + 12 * count
        if len(index) != expected:
            fault = "cut short" if len(index) < expected else "longer than it should be"
            raise DataError(f"{path}: {fault}: {len(index)} bytes, {count} items need {expected}")
        self.dtype = _type_of(path, code)
        sizes_end = _MMAP_HEADER.size + 4 * count
        self._lengths: npt.NDArray[Any] = index[_MMAP_HEADER.size : sizes_end].view("<i4")
        self._offsets = index[sizes_end:].view("<i8")
        self._scale = self.dtype.itemsize
        self._shift = 0

    def _read_legacy_index(self, index: npt.NDArray[np.uint8], path: str) -> None:
        if len(index) < _LEGACY_HEADER.size:
            raise DataError(f"{path}: cut short: {len(index)} bytes, the header alone has 48")
        header = _LEGACY_HEADER.unpack(index[: _LEGACY_HEADER.size].tobytes())
        _, version, code, element_size, count, num_sizes = header
        _check_version(path, version)
        expected = _LEGACY_HEADER.size + 8 * (2 * (count + 1) + num_sizes)
        if len(index) < expected:
            raise DataError(f"{path}: cut short: {len(index)} bytes, {count} items need {expected}")
        self.dtype = np.dtype(np.float32) if code == 6 else _type_of(path, code)
        if self.dtype.itemsize != element_size or num_sizes != count:
            raise DataError(f"{path}: expected one-dimensional items of {self.dtype}")
        numbers = index[_LEGACY_HEADER.size : expected].view("<i8")
        self._offsets = numbers[count + 1 : 2 * count + 1]
        self._lengths = numbers[2 * (count + 1) :]
        self._scale = 1
        self._shift = 1  # these formats store id + 1, as Lua counts from one

    def _check_length(self) -> None:
        expected = self.num_tokens
        if len(self._tokens) < expected:
            raise DataError(
                f"{self.prefix}.bin: cut short: {len(self._tokens)} tokens, "
                f"its index expects {expected}"
            )

    def _gather(self, indices: Ids) -> tuple[Ids, Ids]:
        sizes, starts = self.sizes_of(indices), self.starts(indices)
        if _consecutive(starts, sizes):
            starts, sizes_read = starts[:1], sizes.sum(keepdims=True)
        else:
            sizes_read = sizes
        return self._read(starts, sizes_read), sizes

    # -- the file as one stream of tokens ----------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Where the last item ends, in tokens from the beginning of the file."""
        if not len(self):
            return 0
        return int(self._offsets[-1]) // self._scale + int(self._lengths[-1])

    def adjacent(self) -> bool:
        """Whether the items fill the file from its beginning, one after another, without gaps."""
        if not len(self):
            return True
        total = int(self._lengths.sum(dtype=np.int64))
        return int(self._offsets[0]) == 0 and self.num_tokens == total

    def starts(self, which: slice | Ids) -> Ids:
        """Where some items begin, in tokens from the beginning of the file."""
        begin: Ids = self._offsets[which] // self._scale
        return begin

    def read(self, starts: Ids, sizes: Ids) -> Ids:
        """Tokens of ranges of the file, whatever items they belong to.

        Raises:
            DataError: an id beyond the vocabulary given to `check_vocabulary`.
        """
        tokens = self._read(starts, sizes)
        if self._limit is not None and len(tokens):
            self._check(tokens)
        return tokens

    def _read(self, starts: Ids, sizes: Ids) -> Ids:
        if len(starts) == 1:
            first = int(starts[0])
            tokens = self._tokens[first : first + int(sizes[0])].astype(np.int64)
        elif sizes.sum() >= _LONG * len(sizes):
            # Slices of long ranges are copied at the memory's speed, their positions one by one.
            parts = [
                self._tokens[first : first + size]
                for first, size in zip(starts.tolist(), sizes.tolist(), strict=True)
            ]
            tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        else:
            tokens = self._tokens[ranges(starts, sizes)].astype(np.int64)
        return tokens - self._shift if self._shift else tokens


class ConcatDataset(TokenDataset):
    """Several datasets one after another, each a number of times.

    Args:
        parts: the datasets.
        repeats: how many times each occurs; once when None.

    Attributes:
        parts, repeats: as given.
    """

    def __init__(self, parts: Sequence[TokenDataset], repeats: Sequence[int] | None = None) -> None:
        self.parts = list(parts)
        times = [1] * len(self.parts) if repeats is None else list(repeats)
        self.repeats = times
        lengths = [len(p) * n for p, n in zip(self.parts, times, strict=True)]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int32]:  # type: ignore[override]
        """Length of every item."""
        return np.concatenate(
            [np.tile(p.sizes, n) for p, n in zip(self.parts, self.repeats, strict=True)]
        )

    def __str__(self) -> str:
        return ", ".join(map(str, self.parts))

    def _gather(self, indices: Ids) -> tuple[Ids, Ids]:
        which = np.searchsorted(self._starts, indices, side="right") - 1
        sizes = np.zeros(len(indices), dtype=np.int64)
        found = []
        for number in np.unique(which):
            rows = np.flatnonzero(which == number)
            part = self.parts[number]
            tokens, sizes[rows] = part.gather((indices[rows] - self._starts[number]) % len(part))
            found.append((rows, tokens))
        starts = np.cumsum(sizes) - sizes
        out = np.zeros(int(sizes.sum()), dtype=np.int64)
        for rows, tokens in found:
            out[ranges(starts[rows], sizes[rows])] = tokens
        return out, sizes


class TruncatedDataset(TokenDataset):
    """Items cut to a number of tokens, eos kept at the end (`--truncate-source`).

    `sizes` counts one token too many for items that are not cut: so does fairseq, and batches are
    made from these numbers.
    """

    def __init__(self, dataset: TokenDataset, length: int, eos: int) -> None:
        self.dataset = dataset
        self._length = length
        self._eos = eos
        self.sizes = np.minimum(dataset.sizes, length - 1) + np.int32(1)

    def __str__(self) -> str:
        return str(self.dataset)

    def _gather(self, indices: Ids) -> tuple[Ids, Ids]:
        tokens, sizes = self.dataset.gather(indices)
        starts = np.cumsum(sizes) - sizes
        ends_in_eos = np.zeros(len(sizes), dtype=bool)
        filled = sizes > 0
        ends_in_eos[filled] = tokens[(starts + sizes - 1)[filled]] == self._eos
        kept = np.minimum(sizes - ends_in_eos, self._length - 1)
        new_sizes = kept + 1
        out = np.full(int(new_sizes.sum()), self._eos, dtype=np.int64)
        out[ranges(np.cumsum(new_sizes) - new_sizes, kept)] = tokens[ranges(starts, kept)]
        return out, new_sizes


class IndexedWriter:
    """Writes `PREFIX.bin` and, in `finalize`, `PREFIX.idx`; memory does not grow with the data.

    Args:
        prefix: path without suffix.
        dtype: the type of a stored token, see `best_dtype`.
    """

    def __init__(self, prefix: PathLike, dtype: npt.DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        folder = os.path.dirname(self.prefix) or "."
        self._bin = open(self.prefix + ".bin", "wb")  # noqa: SIM115
        # Unnamed and beside the output: gone with the process however it ends.
        self._sizes: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append one item."""
        tokens = np.asarray(ids, dtype=self.dtype)
        self.add_block(tokens, np.array([len(tokens)]))

    def add_block(self, tokens: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> None:
        """Append items given as their tokens, one item after another, and their lengths."""
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._sizes.write(np.ascontiguousarray(sizes, dtype="<i4").data)

    def append(self, prefix: PathLike) -> None:
        """Append the items of another dataset of the same type, copying bytes.

        Raises:
            DataError: the other dataset is damaged or of another type.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(f"{other}: holds {other.dtype}, expected {self.dtype}")
        _copy(other.prefix + ".bin", 0, None, self._bin)
        _copy(other.prefix + ".idx", _MMAP_HEADER.size, 4 * len(other), self._sizes)

    def finalize(self) -> None:
        """Write the index; the dataset is complete after this."""
        self._bin.close()
        count = self._sizes.tell() // 4
        with open(self.prefix + ".idx", "wb") as file:
            code = _CODES[self.dtype]
            file.write(_MMAP_HEADER.pack(MMAP_MAGIC, _VERSION, code, count))
            for sizes in self._blocks_of_sizes():
                file.write(sizes.data)
            offset = 0
            for sizes in self._blocks_of_sizes():
                lengths = sizes.astype(np.int64) * self.dtype.itemsize
                ends = np.cumsum(lengths) + offset
                file.write(np.ascontiguousarray(ends - lengths, dtype="<i8").data)
                offset = int(ends[-1])
        self._sizes.close()

    def close(self) -> None:
        """Give up: close the files without writing an index."""
        self._bin.close()
        self._sizes.close()

    def _blocks_of_sizes(self) -> Any:
        self._sizes.seek(0)
        while block := self._sizes.read(4 * _SIZES_PER_STEP):
            yield np.frombuffer(block, dtype="<i4")


def dataset_exists(prefix: PathLike, impl: str | None = None) -> bool:
    """Whether there is a dataset at `prefix`."""
    path = os.fspath(prefix)
    indexed = os.path.exists(path + ".idx")
    return os.path.isfile(path) if impl == "raw" else indexed or os.path.isfile(path)


def open_dataset(
    prefix: PathLike, impl: str | None = None, dictionary: Dictionary | None = None
) -> TokenDataset:
    """Open the dataset at `prefix`.

    Args:
        prefix: path without suffix.
        impl: "mmap", "cached", "lazy" or "raw"; None finds out.
        dictionary: what raw text is encoded with, and what ids must fit.

    Raises:
        DataError: nothing there, damaged, of another format, or made with a larger dictionary.
    """
    path = os.fspath(prefix)
    dataset: TokenDataset
    if impl == "raw" or (
        impl is None and not os.path.exists(path + ".idx") and os.path.isfile(path)
    ):
        if dictionary is None:
            raise DataError(f"{path}: raw text needs a dictionary")
        return read_raw(path, dictionary)
    if impl is not None and os.path.exists(path + ".idx"):
        expected = MMAP_MAGIC if impl == "mmap" else LEGACY_MAGIC
        if not _read_magic(path + ".idx").startswith(expected):
            raise DataError(
                f"{path}.idx: not in the format of --dataset-impl {impl}; "
                "leave the flag out to have the format recognised"
            )
    dataset = IndexedDataset(path)
    if dictionary is not None:
        dataset.check_vocabulary(len(dictionary))
    return dataset


def read_raw(path: PathLike, dictionary: Dictionary) -> MemoryDataset:
    """Encode a text file in memory (`--dataset-impl raw`)."""
    try:
        with open(path, encoding="utf-8") as file:
            items = [dictionary.encode_line(line) for line in file]
    except FileNotFoundError:
        raise DataError(f"no dataset {os.fspath(path)}: expected a text file") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{os.fspath(path)}: not UTF-8: {e.reason}") from None
    sizes = np.array([len(item) for item in items], dtype=np.int64)
    tokens = np.concatenate(items) if items else np.zeros(0, dtype=np.int64)
    return MemoryDataset(tokens.astype(best_dtype(len(dictionary))), sizes, os.fspath(path))


def _copy(path: str, start: int, length: int | None, target: BinaryIO) -> None:
    with open(path, "rb") as file:
        file.seek(start)
        left = os.path.getsize(path) - start if length is None else length
        while left > 0 and (block := file.read(min(1 << 22, left))):
            target.write(block)
            left -= len(block)


def _consecutive(starts: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> bool:
    return bool(len(starts)) and bool((starts[1:] == starts[:-1] + sizes[:-1]).all())


def _read_magic(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(len(MMAP_MAGIC))
    except FileNotFoundError:
        raise DataError(
            f"no dataset {path.removesuffix('.idx')}: {path} does not exist; "
            "run flite-preprocess first, or check the data folder and the languages"
        ) from None
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None


def _map(path: str, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
    """A file as a read-only array, shared by all processes that map it."""
    kind = np.dtype(dtype)
    try:
        length = os.path.getsize(path) // kind.itemsize
        if length == 0:  # nothing can be mapped of an empty file
            return np.zeros(0, dtype=kind)
        return np.memmap(path, dtype=kind, mode="r", shape=(length,)).view(np.ndarray)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, though its index does") from None
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None


def _check_version(path: str, version: int) -> None:
    if version != _VERSION:
        raise DataError(f"{path}: version {version} of the format; expected {_VERSION}")


def _type_of(path: str, code: int) -> np.dtype[Any]:
    if code not in _TYPES:
        raise DataError(f"{path}: unknown type code {code}; expected 1 to 10")
    return np.dtype(_TYPES[code])
