"""Split texts of several languages and train one tokenizer for all, ready for flite-preprocess.

    python examples/language_model/prepare_multilingual.py --texts udhr2 --langs eng deu fra \
        --out work/udhr

Reads `TEXTS/LANG.txt`, plain text, and writes `OUT/LANG/{train,valid,test}.txt` (of ten lines, one
validates and one tests), all training text together as `OUT/train.txt`, and `OUT/tokenizer.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tokenizers


def split(text: Path, out: Path) -> list[str]:
    """Deal the lines of one language to its splits; returns those to train on."""
    lines = [line.strip() for line in text.read_text(encoding="utf-8").split("\n")]
    lines = [line for line in lines if line]
    valid, test = lines[8::10], lines[9::10]
    train = [line for i, line in enumerate(lines) if i % 10 < 8]
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("valid", valid), ("test", test)):
        text_of = "".join(f"{line}\n" for line in part)
        (out / f"{name}.txt").write_text(text_of, encoding="utf-8", newline="\n")
    return train


def main() -> None:
    """Split every language, then train the tokenizer on all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of LANG.txt files")
    parser.add_argument("--langs", nargs="+", required=True)
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = [
        line for lang in args.langs for line in split(args.texts / f"{lang}.txt", args.out / lang)
    ]
    everything = args.out / "train.txt"
    everything.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train([str(everything)], vocab_size=args.vocab_size, show_progress=False)
    bpe.save(str(args.out / "tokenizer.json"))
    print(f"written: {args.out} ({len(args.langs)} languages, {bpe.get_vocab_size()} pieces)")


if __name__ == "__main__":
    main()
