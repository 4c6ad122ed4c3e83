"""From sequences of unequal length to one padded matrix, without a loop over rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def pad_sequences(
    tokens: Ids,
    sizes: Ids,
    pad: int,
    *,
    left_pad: bool = False,
    multiple: int = 1,
    length: int = 0,
) -> Ids:
    """Lay sequences out as the rows of a matrix.

    Args:
        tokens: the sequences, one after another; shape (sum(sizes),).
        sizes: their lengths; shape (B,).
        pad: what fills the rest of a row.
        left_pad: put the padding before the sequence.
        multiple: round the number of columns up to a multiple of this.
        length: at least so many columns.

    Returns:
        int64, shape (B, T).
    """
    columns = max(int(sizes.max(initial=0)), length)
    columns = -(-columns // multiple) * multiple
    out = np.full((len(sizes), columns), pad, dtype=np.int64)
    position = np.arange(columns)
    # Boolean indexing walks row by row, which is the order of `tokens`.
    if left_pad:
        out[position >= (columns - sizes)[:, None]] = tokens
    else:
        out[position < sizes[:, None]] = tokens
    return out


def eos_to_beginning(tokens: Ids, sizes: Ids, eos: int) -> Ids:
    """Shift every sequence right by one and put eos first: what a decoder reads.

    The last token of a sequence, which is eos, drops out.
    """
    out = np.empty_like(tokens)
    out[1:] = tokens[:-1]
    starts = np.cumsum(sizes) - sizes
    out[starts[sizes > 0]] = eos
    return out


def drop_last(tokens: Ids, sizes: Ids, token: int) -> tuple[Ids, Ids]:
    """Remove `token` from the end of the sequences that end with it."""
    last, ends_with = _ends_with(tokens, sizes, token)
    keep = np.ones(len(tokens), dtype=bool)
    keep[last[ends_with]] = False
    return tokens[keep], sizes - ends_with


def append_missing(tokens: Ids, sizes: Ids, token: int) -> tuple[Ids, Ids]:
    """Add `token` to the end of the sequences that do not end with it."""
    _, ends_with = _ends_with(tokens, sizes, token)
    ends = np.cumsum(sizes)[~ends_with]
    return np.insert(tokens, ends, token), sizes + ~ends_with


def prepend_missing(tokens: Ids, sizes: Ids, token: int) -> tuple[Ids, Ids]:
    """Put `token` before the sequences that do not begin with it."""
    starts = np.cumsum(sizes) - sizes
    begins = np.zeros(len(sizes), dtype=bool)
    filled = sizes > 0
    begins[filled] = tokens[starts[filled]] == token
    return np.insert(tokens, starts[~begins], token), sizes + ~begins


def _ends_with(tokens: Ids, sizes: Ids, token: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
    last = np.cumsum(sizes) - 1
    found = np.zeros(len(sizes), dtype=bool)
    filled = sizes > 0
    found[filled] = tokens[last[filled]] == token
    return last, found
