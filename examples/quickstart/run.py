"""From raw text to BLEU in a few minutes on a CPU: what `make quickstart` runs.

Makes the corpus, segments it with sentencepiece, then calls `flite-preprocess`, `flite-train` and
`flite-generate` as a user would type them; every command line is printed before it runs.

    python examples/quickstart/run.py [--out quickstart-run]
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import make_corpus
import sentencepiece

PIECES = 800

# Small enough for two cores: about two million parameters.
MODEL = """
    --arch transformer --share-all-embeddings
    --encoder-layers 2 --encoder-embed-dim 192 --encoder-ffn-embed-dim 576
    --encoder-attention-heads 4
    --decoder-layers 2 --decoder-embed-dim 192 --decoder-ffn-embed-dim 576
    --decoder-attention-heads 4
"""
TRAINING = """
    --optimizer adam --adam-betas 0.9,0.98 --clip-norm 1.0 --weight-decay 0.0001
    --lr 4e-3 --lr-scheduler inverse_sqrt --warmup-updates 200 --dropout 0.1
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --max-tokens 4000 --max-update 1200 --seed 1
    --no-epoch-checkpoints --log-format simple --log-interval 100
"""


class Step:
    """Prints what is done and how long it took."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, title: str) -> None:
        print(f"\n== {title}  [{time.monotonic() - self.start:.0f} s]", flush=True)


def run(command: str, *args: object, output: Path | None = None) -> None:
    """Run one of the commands, showing it as one would type it.

    Args:
        command: its name after `flite-`.
        args: its arguments.
        output: a file for what it prints; the terminal when None.
    """
    words = [str(arg) for arg in args]
    print("$ flite-" + command, shlex.join(words) + (f" > {output}" if output else ""), flush=True)
    call = [sys.executable, "-m", f"fairseq_lite_cli.{command}", *words]
    if output is None:
        done = subprocess.run(call)
    else:
        with output.open("w", encoding="utf-8") as stream:
            done = subprocess.run(call, stdout=stream)
    if done.returncode:
        sys.exit(f"flite-{command} failed with status {done.returncode}")


def segment(raw: Path, out: Path, model: Path) -> None:
    """Train one sentencepiece model on both languages and cut all texts into pieces.

    Digits are pieces of their own, so a number is translated digit by digit.
    """
    sentencepiece.SentencePieceTrainer.train(
        input=[str(raw / f"train.{language}") for language in make_corpus.LOCALES],
        model_prefix=str(model.with_suffix("")),
        vocab_size=PIECES,
        model_type="unigram",
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    out.mkdir(exist_ok=True)
    for path in sorted(raw.iterdir()):
        lines = path.read_text(encoding="utf-8").splitlines()
        pieces = processor.encode(lines, out_type=str)
        (out / path.name).write_text(
            "".join(" ".join(line) + "\n" for line in pieces), encoding="utf-8", newline="\n"
        )


def show(generated: Path, samples: int = 8) -> str:
    """Print the first translations of a generation file; return its last line, the score."""
    lines = generated.read_text(encoding="utf-8").splitlines()
    by_kind: dict[str, dict[int, str]] = {"S": {}, "T": {}, "H": {}}
    for line in lines:
        kind, _, rest = line.partition("-")
        if kind in by_kind and "\t" in rest:
            number, *fields = rest.split("\t")
            by_kind[kind].setdefault(int(number), fields[-1])
    for number in range(samples):
        source, target, output = (by_kind[kind].get(number, "") for kind in "STH")
        verdict = "" if output == target else f"   (reference: {target})"
        print(f"  {source}\n    -> {output}{verdict}")
    return lines[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("quickstart-run"), help="folder to write")
    parser.add_argument("--max-update", type=int, help="train for so many updates instead")
    args = parser.parse_args()
    out: Path = args.out
    raw, text, data, save = (out / name for name in ("raw", "pieces", "data-bin", "checkpoints"))
    out.mkdir(parents=True, exist_ok=True)
    for old in (*data.glob("*"), *save.glob("*")):  # what an earlier run left: start afresh
        old.unlink()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")

    step = Step()
    step("Making a corpus: dates, numbers, amounts, units and names from the Unicode CLDR")
    make_corpus.write(make_corpus.make(train=30_000, valid=500, test=1_000, seed=1), raw)
    segment(raw, text, out / "spm.model")
    print(f"30,000 pairs to train on, 500 to validate, 1,000 to test, in {raw}")

    step("Preprocessing: text to dictionary and binary data")
    prefixes = [f"--{split}pref={text / split}" for split in ("train", "valid", "test")]
    languages = ["--source-lang", "en", "--target-lang", "de"]
    run("preprocess", *languages, *prefixes, "--joined-dictionary", "--destdir", data)

    step("Training a small Transformer")
    updates = ["--max-update", args.max_update] if args.max_update else []
    logs = ["--log-file", out / "train.log", "--tensorboard-logdir", out / "tensorboard"]
    train = [*MODEL.split(), *TRAINING.split(), *updates, "--save-dir", save, *logs]
    run("train", data, *train)

    step("Translating the test set")
    generated = out / "test.txt"
    search = ["--beam", 5, "--batch-size", 64, "--max-len-a", 1.2, "--max-len-b", 10]
    scoring = ["--remove-bpe", "sentencepiece", "--scoring", "sacrebleu"]
    best = save / "checkpoint_best.pt"
    run("generate", data, "--path", best, *search, *scoring, output=generated)

    step("The first sentences of the test set, none of which was in the training data")
    score = show(generated)
    print(f"\n{score}")
    print(f"\ncheckpoints   {save}")
    print(f"logs          {out / 'train.log'}, tensorboard --logdir {out / 'tensorboard'}")
    print(f"translations  {generated}")
    print(f"all in        {time.monotonic() - step.start:.0f} seconds")


if __name__ == "__main__":
    main()
