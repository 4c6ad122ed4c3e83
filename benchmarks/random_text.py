"""A data folder of random words: for speed and memory it does not matter what a text says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

_LINE = 64  # words


def data_folder(folder: Path, vocabulary: int, tokens: int, seed: int = 1) -> Path:
    """Make a folder of language model data, with flite-preprocess, unless it is there.

    Args:
        folder: where; its name should say what is in it.
        vocabulary: the size of the dictionary, the four specials included, a multiple of 8.
        tokens: how many, about.
        seed: of the text.
    """
    data = folder / "data-bin"
    if (data / "train.idx").exists():
        return data
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary - 4
    draws = np.random.default_rng(seed).integers(words, size=max(tokens, _LINE))
    every = np.arange(words)  # each word at least once
    text = folder / "train.txt"
    with text.open("w", encoding="utf-8") as out:
        for ids in (every, draws):
            for start in range(0, len(ids), _LINE):
                print(*(f"w{i}" for i in ids[start : start + _LINE]), file=out)
    command = [sys.executable, "-m", "fairseq_lite_cli.preprocess", "--only-source"]
    command += ["--trainpref", str(text), "--destdir", str(data)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return data
