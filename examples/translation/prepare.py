"""Cut a folder of parallel text into joint subword pieces, ready for flite-preprocess.

    python examples/translation/prepare.py --text multi30k --langs en de \
        --splits train valid test2016 --vocab-size 6000 --out work/multi30k

Reads `SPLIT.LANG` files (plain text, a sentence a line), trains one sentencepiece model on both
sides of the first split, and writes `OUT/SPLIT.LANG` in pieces and `OUT/spm.model`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sentencepiece


def main() -> None:
    """Train the model, then segment every file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of SPLIT.LANG files")
    parser.add_argument("--langs", nargs=2, required=True)
    parser.add_argument("--splits", nargs="+", default=["train", "valid", "test"])
    parser.add_argument("--vocab-size", type=int, default=6000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=[str(args.text / f"{args.splits[0]}.{lang}") for lang in args.langs],
        model_prefix=str(args.out / "spm"),
        vocab_size=args.vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "spm.model"))
    for split in args.splits:
        for lang in args.langs:
            with (
                open(args.text / f"{split}.{lang}", encoding="utf-8", newline="\n") as source,
                open(args.out / f"{split}.{lang}", "w", encoding="utf-8", newline="\n") as target,
            ):
                for line in source:
                    target.write(" ".join(pieces.encode(line.strip(), out_type=str)) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
