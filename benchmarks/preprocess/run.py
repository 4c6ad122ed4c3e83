"""Lines a second of flite-preprocess against a binariser that sets one tensor element a token.

    python benchmarks/preprocess/run.py [--text FILE] [--lines N] [--workers 1,2] [--repeat 3]

Without `--text` it makes up a corpus: words drawn from a Zipf distribution, as in language. Every
method runs in turn, `--repeat` times over, in this one process on the same file; the best time of
each counts. CPU time is reported beside wall time, for machines that others use too.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fairseq_lite.config.core import PreprocessConfig
from fairseq_lite.data import binarize, preprocess
from fairseq_lite.data.dictionary import Dictionary

sys.path.insert(0, str(Path(__file__).resolve().parent))
import per_element


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


def cpu() -> float:
    """CPU seconds of this process and its ended children."""
    usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usages)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - wall, cpu() - used


def main() -> None:
    """Run the comparison and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--repeat", type=int, default=3)
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
        best: dict[str, list[float]] = {m: [float("inf")] * 2 for m in methods}
        for _ in range(args.repeat):
            for method, work in methods.items():
                best[method] = [min(a, b) for a, b in zip(best[method], timed(work), strict=True)]
        same = (folder / "peer.bin").read_bytes() == Path(out + ".bin").read_bytes()
        report = {
            "machine": f"{platform.machine()}, Python {platform.python_version()}, "
            f"numpy {np.__version__}, torch {torch.__version__}",
            "lines": lines,
            "same token files": same,
            "lines per second (wall, CPU)": {
                m: [round(lines / s) for s in seconds] for m, seconds in best.items()
            },
            "times the peer (wall, CPU)": _ratios(best),
        }
        print(json.dumps(report, indent=2))


def _ratios(best: dict[str, list[float]]) -> dict[str, list[float]]:
    peers = {m.split(":")[0]: s for m, s in best.items() if "fl" not in m and "fairseq" not in m}
    return {
        m: [round(p / s, 2) for p, s in zip(peers[m.split(":")[0]], seconds, strict=True)]
        for m, seconds in best.items()
        if seconds is not peers[m.split(":")[0]]
    }


if __name__ == "__main__":
    main()
