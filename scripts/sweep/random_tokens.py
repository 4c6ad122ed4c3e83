"""Data for benchmarks: tokens at random, as frequent as words are."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedWriter, best_dtype
from fairseq_lite.errors import ConfigError

_AT_ONCE = 1 << 20


def make_random_tokens(
    folder: Path, *, symbols: int, train: int, valid: int, line: int, seed: int = 1
) -> None:
    """Write a data folder whose n-th word has a share of 1/n, and which says nothing else.

    Args:
        folder: to make; it appears when it is complete.
        symbols: words of the dictionary.
        train: tokens of the split `train`.
        valid: tokens of the split `valid`.
        line: tokens of a sentence, its end included.
        seed: of the tokens.

    Raises:
        ConfigError: there are no words.
    """
    if symbols < 1:
        raise ConfigError(f"--dict-size {symbols}: expected 1 or more")
    dictionary = Dictionary()
    first = len(dictionary)
    for number in range(symbols):
        dictionary.add_symbol(f"w{number}", symbols // (number + 1) + 1)
    shares = np.cumsum(1.0 / np.arange(1, symbols + 1))
    shares /= shares[-1]
    generator = np.random.default_rng(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        dictionary.save(part / "dict.txt")
        for split, total in (("train", train), ("valid", valid)):
            writer = IndexedWriter(part / split, best_dtype(len(dictionary)))
            left = max(1, total // line)
            while left:
                lines = min(left, max(1, _AT_ONCE // line))
                drawn = np.searchsorted(shares, generator.random((lines, line))) + first
                drawn[:, -1] = dictionary.eos()
                writer.add_block(drawn.ravel(), np.full(lines, line))
                left -= lines
            writer.finalize()
        part.chmod(0o755)
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
