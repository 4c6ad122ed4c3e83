"""Clean and split parallel text and cut it into sentencepiece's pieces for flite-preprocess.

    python user_dir/prepare.py --train europarl-v7.de-en commoncrawl.de-en --test newstest2014 \
        --langs de en --out workspace/wmt16_en_de

Reads `PREFIX.LANG`, plain text with a sentence a line, compressed with gzip or xz if the name says
so (`PREFIX.LANG.xz`). The rules, in this order:

1. Space of any kind becomes one space; a pair with an empty side goes.
2. Of the lines of the training text, those whose number, from 1, is a multiple of --valid-every are
   the validation set, the others the training set. With --valid they all are training data.
3. One sentencepiece model is trained on both sides of the training set.
4. Of the training text, a pair goes if a side has fewer than --min or more than --max pieces, or
   one more than --ratio times as many as the other; of the validation set, too, where that comes
   from the training text. Other validation data, and test data, are never cleaned.

Writes `train.LANG`, `valid.LANG`, `test.LANG`, `raw/test.LANG` (the references as they are) and
`spm.model`. With the same input it writes the same files.
"""

from __future__ import annotations

import argparse
import gzip
import html
import lzma
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import sentencepiece

from fairseq_lite.errors import DataError
from fairseq_lite_cli.entry import run_command

Pair = tuple[str, str]

# Files of the test sets of WMT are SGML, one `seg` a sentence.
_SEGMENT = re.compile(r"<seg[^>]*>(.*?)</seg>")


@dataclass(frozen=True)
class Limits:
    """Which pairs are kept, in pieces.

    >>> Limits(1, 250, 1.5).keep(2, 3), Limits(1, 250, 1.5).keep(2, 4)
    (True, False)
    """

    shortest: int
    longest: int
    ratio: float

    def keep(self, source: int, target: int) -> bool:
        """Whether a pair of these lengths is kept."""
        few, many = sorted((source, target))
        return self.shortest <= few and many <= self.longest and many <= self.ratio * few


def lines(prefix: str, lang: str) -> Iterator[str]:
    """The lines of a file, their space normalised.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    for suffix, opener in (("", open), (".gz", gzip.open), (".xz", lzma.open), (".sgm", open)):
        path = Path(f"{prefix}.{lang}{suffix}")
        if not path.is_file():
            continue
        try:
            with opener(path, "rt", encoding="utf-8", newline="\n") as file:
                for line in file:
                    if suffix != ".sgm":
                        yield " ".join(line.split())
                    elif found := _SEGMENT.search(line):
                        yield " ".join(html.unescape(found.group(1)).split())
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as e:
            raise DataError(f"{path}: cannot be read ({e})") from None
        return
    raise DataError(f"{prefix}.{lang}: no such file (nor .gz, .xz, .sgm)")


def pairs(prefixes: Sequence[str], langs: Sequence[str]) -> Iterator[Pair]:
    """The pairs of several texts, one after the other.

    Raises:
        DataError: the two sides of one have unequal numbers of lines.
    """
    for prefix in prefixes:
        sides = [lines(prefix, lang) for lang in langs]
        try:
            yield from zip(*sides, strict=True)
        except ValueError:
            raise DataError(
                f"{prefix}: the sides {langs[0]} and {langs[1]} have unequal numbers of lines"
            ) from None


def write(folder: Path, split: str, langs: Sequence[str], found: Iterator[Pair]) -> int:
    """Write `SPLIT.LANG` for both sides; returns how many pairs there were."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    files: list[TextIO] = []
    try:
        for lang in langs:
            files.append((folder / f"{split}.{lang}").open("w", encoding="utf-8", newline="\n"))
        for count, pair in enumerate(found, start=1):  # noqa: B007
            for file, text in zip(files, pair, strict=True):
                file.write(text + "\n")
    finally:
        for file in files:
            file.close()
    return count


def split(args: argparse.Namespace, raw: Path) -> None:
    """Steps 1 and 2: plain text of the three splits in a folder."""

    def training() -> Iterator[tuple[int, Pair]]:
        for number, pair in enumerate(pairs(args.train, args.langs), start=1):
            if all(pair):
                yield number, pair

    every = 0 if args.valid else args.valid_every
    kept = (pair for number, pair in training() if not every or number % every)
    print(f"train: {write(raw, 'train', args.langs, kept):,} pairs")
    if args.valid:
        held_out = (pair for pair in pairs(args.valid, args.langs) if all(pair))
    else:
        held_out = (pair for number, pair in training() if number % every == 0)
    print(f"valid: {write(raw, 'valid', args.langs, held_out):,} pairs")
    print(f"test: {write(raw, 'test', args.langs, pairs(args.test, args.langs)):,} pairs")


def train_pieces(args: argparse.Namespace, raw: Path) -> sentencepiece.SentencePieceProcessor:
    """Step 3.

    Raises:
        DataError: the text has too few different pieces.
    """
    model = args.out / "spm.model"
    try:
        sentencepiece.SentencePieceTrainer.train(
            input=[str(raw / f"train.{lang}") for lang in args.langs],
            model_prefix=str(model.with_suffix("")),
            vocab_size=args.vocab_size,
            model_type=args.model_type,
            character_coverage=1.0,
            input_sentence_size=args.sentences,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as e:
        why = " ".join(str(e).split())
        raise DataError(f"--vocab-size {args.vocab_size}: sentencepiece: {why}") from None
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def segment(args: argparse.Namespace, raw: Path) -> None:
    """Steps 3 and 4."""
    pieces = train_pieces(args, raw)
    limits = Limits(args.min, args.max, args.ratio)
    cleaned = {"train"} if args.valid else {"train", "valid"}

    def cut(part: str) -> Iterator[Pair]:
        for pair in pairs([str(raw / part)], args.langs):
            source, target = pieces.encode(list(pair), out_type=str)
            if part not in cleaned or limits.keep(len(source), len(target)):
                yield " ".join(source), " ".join(target)

    for part in ("train", "valid", "test"):
        print(f"{part} in pieces: {write(args.out, part, args.langs, cut(part)):,} pairs")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, do the four steps."""
    parser = argparse.ArgumentParser(prog="prepare.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--valid", nargs="+", metavar="PREFIX", help="default: of --train")
    parser.add_argument("--test", nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--langs", nargs=2, default=["de", "en"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--valid-every", type=int, default=100)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--sentences", type=int, default=5_000_000, help="to train the model on")
    parser.add_argument("--min", type=int, default=1)
    parser.add_argument("--max", type=int, default=250)
    parser.add_argument("--ratio", type=float, default=1.5)
    args = parser.parse_args(argv)
    raw = args.out / "raw"
    split(args, raw)
    segment(args, raw)


if __name__ == "__main__":
    sys.exit(run_command("prepare.py", main))
