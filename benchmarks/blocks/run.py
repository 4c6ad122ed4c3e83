"""Starting on a very large corpus: seconds until the first batch, and memory, for each break mode.

    python -m benchmarks.blocks.run --folder big --out benchmarks/results/blocks.json

Writes an index of 200 million sentences (2.4 GB; --sentences takes another number), while the
tokens themselves are a file with holes, which takes no room. Then, in a process of its own for each
--sample-break-mode, it is loaded as flite-train does in every rank: the blocks, their batches, the
first batch, then the beginnings of further epochs. Memory is what belongs to the process alone
(RssAnon); pages of the mapped files are shared by all ranks of a machine, and are given back when
others need them.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import machine, record

MODES = ("none", "complete", "complete_doc", "eos")
_STEP = 1 << 22  # sentences written at a time


def write(folder: Path, sentences: int, seed: int = 1) -> int:
    """Write train.{bin,idx} and dict.txt; returns the number of tokens.

    Lines have 2 to 60 tokens; of a hundred, one is empty and ends a document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(996)))
    rng = np.random.default_rng(seed)
    index = folder / "train.idx"
    with index.open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 8, sentences))
        tokens, done = 0, 0
        while done < sentences:
            n = min(_STEP, sentences - done)
            sizes = rng.integers(2, 61, n, dtype=np.int32)
            sizes[rng.integers(0, n, n // 100)] = 1
            offsets = tokens + np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)])
            file.seek(26 + 4 * done)
            file.write(sizes.tobytes())
            file.seek(26 + 4 * sentences + 8 * done)
            file.write((2 * offsets).astype("<i8").tobytes())
            tokens, done = int(offsets[-1] + sizes[-1]), done + n
    with (folder / "train.bin").open("wb") as file:
        file.truncate(2 * tokens)
    return tokens


class Watch:
    """The largest amount of memory that belonged to this process alone, looked at now and then."""

    def __init__(self) -> None:
        self.peak = self.now()
        self._ended = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:"))

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, self.now())


def one(folder: str, mode: str, tokens_per_sample: int) -> dict[str, Any]:
    """Load the corpus in this process."""
    from fairseq_lite.builtins import load_builtins
    from fairseq_lite.config.parse import parse
    from fairseq_lite.tasks.api import BatchLimits, build_task

    words = [folder, "--task", "language_modeling", "--arch", "transformer_lm_gpt2_tiny"]
    words += ["--sample-break-mode", mode, "--tokens-per-sample", str(tokens_per_sample)]
    words += ["--batch-size", "16", "--optimizer", "adam", "--cpu"]
    run = parse("flite-train", words, load_builtins())
    task = build_task(run)
    watch = Watch()
    before, start = watch.now(), time.perf_counter()
    task.load_dataset("train")
    indexed = time.perf_counter() - start
    limits = BatchLimits(max_sentences=16, max_positions=task.max_positions(), skip_invalid=True)
    data = task.batch_iterator("train", limits, seed=1, world_size=8, rank=3, num_workers=1)
    next(data.next_epoch_itr())
    first = time.perf_counter() - start
    epochs = [watch.now() - before]
    for epoch in range(2, 6):
        data = task.batch_iterator(
            "train", limits, seed=1, epoch=epoch, world_size=8, rank=3, num_workers=1
        )
        steps = data.next_epoch_itr()
        for _ in range(50):
            next(steps)
        steps.close()
        epochs.append(watch.now() - before)
    return {
        "seconds_to_index": round(indexed, 2),
        "seconds_to_first_batch": round(first, 2),
        "batches": len(data),
        "peak_bytes": watch.peak - before,
        "bytes_in_epochs": epochs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=200_000_000)
    parser.add_argument("--tokens-per-sample", type=int, default=512)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--folder", type=Path, help="where the corpus goes, and stays")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(*json.loads(args.one))))
        return
    if args.folder is None:
        parser.error("--folder is needed: 2.4 GB for 200 million sentences")
    start = time.perf_counter()
    tokens = write(args.folder, args.sentences)
    print(f"written in {time.perf_counter() - start:.0f} s: {tokens:,} tokens", flush=True)
    results = {}
    for mode in args.modes:
        job = json.dumps([str(args.folder), mode, args.tokens_per_sample])
        command = [sys.executable, "-m", "benchmarks.blocks.run", "--one", job]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        results[mode] = json.loads(done.stdout.splitlines()[-1])
        print(f"{mode}: {results[mode]}", flush=True)
    about = {"sentences": args.sentences, "tokens": tokens, "block": args.tokens_per_sample}
    record({"machine": machine(), **about, "modes": results}, args.out)


if __name__ == "__main__":
    main()
