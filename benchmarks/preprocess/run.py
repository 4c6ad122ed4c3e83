"""Lines a second of flite-preprocess against a binariser that sets one tensor element a token.

    python -m benchmarks.preprocess.run [--text FILE] [--lines N] [--workers 1,2] [--rounds 3]

Without `--text` it makes up a corpus: words drawn from a Zipf distribution, as in language.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks.preprocess import per_element
from benchmarks.timing import machine, ratios, record, take_turns
from fairseq_lite.config.core import PreprocessConfig
from fairseq_lite.data import binarize, preprocess
from fairseq_lite.data.dictionary import Dictionary


def make_text(path: Path, lines: int, words: int = 31, vocabulary: int = 30_000) -> None:
    """A corpus of `lines` lines of about `words` words."""
    rng = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    names = np.array(
        ["".join(rng.choice(letters, n)) for n in rng.integers(2, 10, vocabulary)], dtype=object
    )
    with path.open("w", encoding="utf-8") as file:
        for _ in range(0, lines, 10_000):
            draws = np.minimum(rng.zipf(1.2, 10_000 * words), vocabulary) - 1
            rows = names[draws].reshape(10_000, words)
            file.writelines(" ".join(row) + "\n" for row in rows)


def main() -> None:
    """Run the comparison and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "corpus.txt"
        if args.text:
            text.write_bytes(args.text.read_bytes())
        else:
            make_text(text, args.lines)
        lines = binarize.count_lines(text)
        dictionary = Dictionary()
        dictionary.add_counts(per_element.count(text))
        dictionary.finalize(nwords=32_000)
        indices, unk, eos = dictionary.indices, dictionary.unk(), dictionary.eos()
        encoder = binarize.Encoder.of(dictionary)
        span = binarize.spans(text, 1)[0]
        made = iter(range(10**6))

        def whole(workers: int) -> None:
            preprocess.run(
                PreprocessConfig(
                    only_source=True,
                    trainpref=str(text),
                    nwordssrc=32_000,
                    destdir=str(folder / f"out{next(made)}"),
                    workers=workers,
                )
            )

        def peer() -> None:
            found = Dictionary()
            found.add_counts(per_element.count(text))
            found.finalize(nwords=32_000)
            per_element.binarize(text, found.indices, unk, eos, folder / "peer.bin")

        out = str(folder / "ours")
        methods: dict[str, Callable[[], object]] = {
            "binarise: one element a token": lambda: per_element.binarize(
                text, indices, unk, eos, folder / "peer.bin"
            ),
            "binarise: fairseq-lite": lambda: binarize.encode_span(span, encoder, out),
            "count: line by line": lambda: per_element.count(text),
            "count: fairseq-lite": lambda: binarize.count_words(span),
            "both passes: one element a token": peer,
        }
        for workers in map(int, args.workers.split(",")):
            methods[f"both passes: flite-preprocess --workers {workers}"] = lambda w=workers: whole(
                w
            )
        seconds = take_turns(methods, args.rounds, warm_up=False)
        same = (folder / "peer.bin").read_bytes() == Path(out + ".bin").read_bytes()
        record(
            {
                "machine": machine(1),
                "lines": lines,
                "same token files": same,
                "lines per second": {
                    method: round(lines / statistics.median(times))
                    for method, times in seconds.items()
                },
                "times faster than the peer": {
                    method: ratios(seconds[_peer(method, seconds)], times)
                    for method, times in seconds.items()
                    if method != _peer(method, seconds)
                },
            },
            args.out,
        )


def _peer(method: str, methods: Iterable[str]) -> str:
    """The first method of the same pass."""
    return next(m for m in methods if m.split(":")[0] == method.split(":")[0])


if __name__ == "__main__":
    main()
