"""From raw text to BLEU in a few minutes on a CPU: what `make quickstart` runs.

Makes the corpus, segments it with sentencepiece, then calls `flite-preprocess`, `flite-train` and
`flite-generate` as a user would type them; every command line is printed before it runs.

    python examples/quickstart/run.py [--out quickstart-run]
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import make_corpus
import sentencepiece

PIECES = 800

# Small enough for two cores: three quarters of a million parameters.
MODEL = """
    --arch transformer --share-all-embeddings
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256
    --encoder-attention-heads 4
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256
    --decoder-attention-heads 4
"""
TRAINING = """
    --optimizer adam --adam-betas 0.9,0.98 --clip-norm 1.0
    --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 300 --dropout 0.05
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --max-tokens 1000 --max-update 1400 --seed 1
    --no-epoch-checkpoints --log-format simple --log-interval 100
"""


class Step:
    """Prints what is done and how long it took."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, title: str) -> None:
        print(f"\n== {title}  [{time.monotonic() - self.start:.0f} s]", flush=True)


def run(command: str, *args: object, log: Path, show: str = "") -> list[str]:
    """Run one of the commands, showing it as one would type it.

    Args:
        command: its name after `flite-`.
        args: its arguments.
        log: a file for all it prints.
        show: a pattern; the lines that contain it are printed here, too.

    Returns:
        The lines it printed.
    """
    words = [str(arg) for arg in args]
    print(f"$ flite-{command} {shlex.join(words)}", flush=True)
    call = [sys.executable, "-m", f"fairseq_lite_cli.{command}", *words]
    lines = []
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            file.write(line)
            if show and re.search(show, line):
                print(line, end="", flush=True)
    if process.returncode:
        print(*lines[-20:], sep="\n")
        sys.exit(f"flite-{command} failed with status {process.returncode}; see {log}")
    return lines


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


def show(generated: list[str], samples: int = 8) -> None:
    """Print the first translations that flite-generate made, then BLEU and its signature."""
    by_kind: dict[str, dict[int, str]] = {"S": {}, "T": {}, "H": {}}
    for line in generated:
        kind, _, rest = line.partition("-")
        if kind in by_kind and "\t" in rest:
            number, *fields = rest.split("\t")
            by_kind[kind].setdefault(int(number), fields[-1])
    for number in range(samples):
        source, target, output = (by_kind[kind].get(number, "") for kind in "STH")
        verdict = "" if output == target else f"   (reference: {target})"
        print(f"  {source}\n    -> {output}{verdict}")
    print()
    for line in generated:
        if line.startswith("Generate test") or "signature: " in line:
            print(line.rpartition(" | ")[2])


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
    # Batches this small gain little from a second thread, and on a busy machine each thread waits
    # for the other at every operation.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    step = Step()
    step("Making a corpus: dates, numbers, amounts, units and names from the Unicode CLDR")
    make_corpus.write(make_corpus.make(train=30_000, valid=500, test=1_000, seed=1), raw)
    segment(raw, text, out / "spm.model")
    print(f"30,000 pairs to train on, 500 to validate, 1,000 to test, in {raw}")

    step("Preprocessing: text to dictionary and binary data")
    prefixes = [f"--{split}pref={text / split}" for split in ("train", "valid", "test")]
    languages = ["--source-lang", "en", "--target-lang", "de"]
    preprocess = [*languages, *prefixes, "--joined-dictionary", "--destdir", data]
    run("preprocess", *preprocess, log=out / "preprocess.log", show="Dictionary|sents")

    step("Training a small Transformer; its loss and perplexity on sentences it has not seen")
    updates = ["--max-update", args.max_update] if args.max_update else []
    train = [*MODEL.split(), *TRAINING.split(), *updates, "--save-dir", save]
    train += ["--tensorboard-logdir", out / "tensorboard"]
    run("train", data, *train, log=out / "train.log", show=r"params: \d|\| (train_inner|valid) \|")

    step("Translating the test set")
    search = ["--beam", 5, "--batch-size", 64, "--max-len-a", 1.2, "--max-len-b", 10]
    scoring = ["--remove-bpe", "sentencepiece", "--scoring", "sacrebleu"]
    best = save / "checkpoint_best.pt"
    generate = ["--path", best, *search, *scoring]
    generated = run("generate", data, *generate, log=out / "test.txt", show="Translated")

    step("The first sentences of the test set, none of which was in the training data")
    show(generated)
    print(f"\ncheckpoints   {save}")
    print(f"logs          {out / 'train.log'}, and tensorboard --logdir {out / 'tensorboard'}")
    print(f"translations  {out / 'test.txt'}")
    print(f"all in        {time.monotonic() - step.start:.0f} seconds")


if __name__ == "__main__":
    main()
