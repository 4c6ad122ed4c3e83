"""A binariser that sets one tensor element a token, the way fairseq's does: what we compare with.

Written for this comparison from the description of that way of working, in its two passes: count
the words of every line; then fill an `IntTensor` for every line, element by element.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

_SPACES = re.compile(r"\s+")


def tokenize(line: str) -> list[str]:
    """Split at whitespace."""
    return _SPACES.sub(" ", line).strip().split()


def count(path: Path) -> Counter[str]:
    """How often each word occurs."""
    counts: Counter[str] = Counter()
    with path.open(encoding="utf-8") as file:
        for line in file:
            counts.update(tokenize(line))
    return counts


def encode_line(line: str, indices: dict[str, int], unk: int, eos: int) -> torch.Tensor:
    """The ids of a line, eos last."""
    words = tokenize(line)
    ids = torch.IntTensor(len(words) + 1)
    for i, word in enumerate(words):
        ids[i] = indices.get(word, unk)
    ids[len(words)] = eos
    return ids


def binarize(path: Path, indices: dict[str, int], unk: int, eos: int, out: Path) -> int:
    """Write the ids of a file, two bytes each; returns the number of lines."""
    sizes: list[int] = []
    with path.open(encoding="utf-8") as file, out.open("wb") as target:
        for line in file:
            ids = encode_line(line, indices, unk, eos)
            sizes.append(ids.numel())
            target.write(ids.numpy().astype(np.uint16).tobytes())
    np.array(sizes, dtype=np.int32).tofile(out.with_suffix(".sizes"))
    return len(sizes)
