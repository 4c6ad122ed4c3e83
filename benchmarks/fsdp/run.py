"""Memory and speed of spreading a model: legacy_ddp and fully_sharded on 1, 2 and 4 ranks.

    python -m benchmarks.fsdp.run --out benchmarks/results/fsdp.json
    python -m benchmarks.fsdp.report benchmarks/results/fsdp.json     # table and picture

Each run is the trainer of flite-train in processes of its own. Bytes of parameters, gradients and
optimizer state are counted on the tensors that a rank holds; its peak is that of the process (or
of its GPU) above what it had before the model was built; of all ranks the largest counts. Speed is
that of all ranks together, so ranks of one machine share its cores: what is quoted is the ratio to
legacy_ddp on as many ranks, in the same round, and its median over rounds.

Ends with status 1 if the state that a rank of fully_sharded holds does not fall as 1 / ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fsdp.measure import Job, measure
from benchmarks.random_text import data_folder
from benchmarks.timing import machine, record
from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.parallel.launch import launch

SHARDED = ("--ddp-backend", "fully_sharded", "--min-params-to-wrap", "1")
WAYS: dict[str, tuple[str, ...]] = {
    "legacy_ddp": (),
    "fully_sharded": SHARDED,
    "fully_sharded, no reshard": (*SHARDED, "--no-reshard-after-forward"),
    "fully_sharded, CPU offload": (*SHARDED, "--cpu-offload"),
    "legacy_ddp, activation checkpointing": ("--checkpoint-activations",),
    "fully_sharded, activation checkpointing": (*SHARDED, "--checkpoint-activations"),
}
STATE = ("parameters", "gradients", "optimizer")
TOLERANCE = 0.1


def flags(args: argparse.Namespace, data: Path) -> list[str]:
    """The model and the optimizer."""
    words = [data, "--task", "language_modeling", "--arch", "transformer_lm_gpt3_small"]
    words += ["--decoder-embed-dim", args.width, "--decoder-layers", args.layers]
    words += ["--decoder-attention-heads", args.heads, "--tokens-per-sample", args.length]
    words += ["--batch-size", args.batch, "--required-batch-size-multiple", 1]
    words += ["--optimizer", "adam", "--lr", "1e-4", "--clip-norm", "1.0", "--disable-validation"]
    words += ["--no-save"] + ([] if args.gpu else ["--cpu"]) + (["--bf16"] if args.bf16 else [])
    return [str(word) for word in words]


def one(words: list[str], job: Job) -> None:
    """Be a run: the ranks are this process's children, as flite-train's are."""
    run = parse("flite-train", words, load_builtins())
    launch(partial(measure, job), run, setup=load_builtins)


def start(words: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Have a run of its own; returns its result, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        job = json.dumps([words, args.updates, args.warm_up, str(out)])
        command = [sys.executable, "-m", "benchmarks.fsdp.run", "--one", job]
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
        if done.returncode or not out.exists():
            return {"error": (done.stderr.strip() or "no result").splitlines()[-1]}
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def measure_all(args: argparse.Namespace, data: Path) -> list[dict[str, Any]]:
    """Every way on every number of ranks: memory of the first round, speeds of all."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for round_number in range(args.rounds):
        for ranks in args.ranks:
            for name, more in WAYS.items():
                if args.only and args.only not in name:
                    continue
                words = [*flags(args, data), *more, "--distributed-world-size", str(ranks)]
                result = start(words, args)
                row = rows.setdefault((name, ranks), {"way": name, "ranks": ranks, "speeds": []})
                row["speeds"].append(result.pop("tokens_per_second", None))
                row.update(result if round_number == 0 or "error" in result else {})
                speed = row["speeds"][-1]
                said = row.get("error") or f"{speed:8.0f} tokens/s"
                print(f"round {round_number + 1}: {ranks} rank(s), {name}: {said}", flush=True)
    return list(rows.values())


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Speed over that of legacy_ddp on as many ranks; state over that of fully_sharded on one."""
    found = {(row["way"], row["ranks"]): row for row in rows}
    for row in rows:
        if "error" in row:
            continue
        row["state"] = sum(row["bytes"][name] for name in STATE)
        row["tokens_per_second"] = round(statistics.median(row["speeds"]), 1)
        plain = found.get(("legacy_ddp", row["ranks"]), {})
        if plain.get("speeds") and None not in plain["speeds"]:
            pairs = zip(row["speeds"], plain["speeds"], strict=True)
            row["times_legacy_ddp"] = round(statistics.median(a / b for a, b in pairs), 3)
        alone = found.get((row["way"], 1), {})
        if row["way"].startswith("fully_sharded") and "bytes" in alone:
            whole = sum(alone["bytes"][name] for name in STATE)
            row["state_times_ranks"] = round(row["state"] * row["ranks"] / whole, 4)


def unequal(rows: list[dict[str, Any]]) -> list[str]:
    """The runs whose state does not fall as 1 / ranks."""
    return [
        f"{row['way']} on {row['ranks']} ranks: state x ranks is {row['state_times_ranks']} of "
        "what one rank holds"
        for row in rows
        if abs(row.get("state_times_ranks", 1.0) - 1.0) > TOLERANCE
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=256, help="tokens in a block")
    parser.add_argument("--batch", type=int, default=4, help="blocks in a batch of one rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="ways whose name contains this")
    parser.add_argument("--gpu", action="store_true", help="a GPU a rank")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        words, updates, warm_up, out = json.loads(args.one)
        one(words, Job(updates, warm_up, out))
        return
    if args.gpu:
        args.ranks = [n for n in args.ranks if n <= torch.cuda.device_count()]
    with tempfile.TemporaryDirectory() as folder:
        steps = args.updates + args.warm_up
        tokens = 2 * steps * max(args.ranks) * args.batch * args.length
        data = data_folder(Path(folder), args.vocabulary, tokens)
        rows = measure_all(args, data)
    add_ratios(rows)
    shape = {name: getattr(args, name) for name in ("width", "layers", "heads", "vocabulary")}
    about = {"shape": shape, "batch": [args.batch, args.length], "bf16": args.bf16}
    record({"machine": machine(), **about, "rounds": args.rounds, "runs": rows}, args.out)
    wrong = unequal(rows)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
