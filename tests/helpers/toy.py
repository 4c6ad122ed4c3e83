"""Tiny data for tests that drive the commands: letters, "translated" by reversing them."""

from __future__ import annotations

import random
from pathlib import Path

LETTERS = "abcdefghijkl"

# A model that trains in milliseconds.
TINY_MODEL = [
    *("--arch", "transformer_tiny", "--share-all-embeddings", "--dropout", "0.1"),
    *("--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32", "--encoder-layers", "1"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32", "--decoder-layers", "1"),
]
ADAM = ["--optimizer", "adam", "--lr", "1e-3"]


def write_text(folder: Path, sizes: dict[str, int], seed: int = 1) -> Path:
    """Write `{split}.src` and `{split}.tgt`; the same seed gives the same text.

    Args:
        folder: made if need be.
        sizes: split -> number of sentences.
        seed: of the sentences.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, size in sizes.items():
        sources = [rng.choices(LETTERS, k=rng.randrange(2, 9)) for _ in range(size)]
        for suffix, lines in (("src", sources), ("tgt", [line[::-1] for line in sources])):
            text = "".join(" ".join(line) + "\n" for line in lines)
            (folder / f"{split}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def preprocess_args(text: Path, data: Path) -> list[str]:
    """The arguments of flite-preprocess for what `write_text` wrote."""
    prefixes = [f"--{split}pref={text / split}" for split in ("train", "valid", "test")]
    languages = ["--source-lang", "src", "--target-lang", "tgt", "--joined-dictionary"]
    return [*languages, *prefixes, "--destdir", str(data)]
