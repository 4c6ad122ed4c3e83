"""Train a subword tokenizer on plain text and lay out the splits, ready for flite-preprocess.

    python examples/language_model/prepare.py --books books --out work/books

Reads `train.txt` (or `train.txt.xz`), `valid.txt` and `test.txt`, a paragraph a line, trains a
byte-level BPE on the training text and writes `OUT/tokenizer.json` and `OUT/SPLIT.txt`. The text
itself is not changed: flite-preprocess segments it with the tokenizer.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
from pathlib import Path

import tokenizers

SPLITS = ("train", "valid", "test")


def unpack(folder: Path, split: str, target: Path) -> None:
    """Copy a split, decompressed where it is stored compressed."""
    plain, packed = folder / f"{split}.txt", folder / f"{split}.txt.xz"
    opened = open(plain, "rb") if plain.exists() else lzma.open(packed)  # noqa: SIM115
    with opened as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy)


def main() -> None:
    """Unpack the text, then train the tokenizer on its first split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of SPLIT.txt[.xz]")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        unpack(args.books, split, args.out / f"{split}.txt")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train([str(args.out / "train.txt")], vocab_size=args.vocab_size, show_progress=False)
    bpe.save(str(args.out / "tokenizer.json"))
    print(f"written: {args.out} ({bpe.get_vocab_size()} pieces)")


if __name__ == "__main__":
    main()
