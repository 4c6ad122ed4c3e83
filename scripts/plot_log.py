#!/usr/bin/env python
"""Draw the curves of training logs, or print them as a table.

    python scripts/plot_log.py train.log --out curve.png
    python scripts/plot_log.py a.log b.log --key loss --out compare.png
    python scripts/plot_log.py train.log --table

Reads what flite-train (or fairseq-train) writes with `--log-format json`, on standard output or to
`--log-file`: a line for every `--log-interval` updates, one for every epoch, one for every
validation. Drawing needs matplotlib (`pip install 'fairseq-lite[plot]'`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_lite.errors import DataError
from fairseq_lite_cli.drawing import lines_of, pyplot
from fairseq_lite_cli.entry import run_command
from fairseq_lite_cli.logs import Log, Record, read


def table(log: Log) -> str:
    """Every validation with the epoch it ended, as a Markdown table (losses in base 2)."""
    splits = list(log.valid)
    heads = ["epoch", "updates", "train loss"]
    heads += [f"{split} {what}" for split in splits for what in ("loss", "perplexity")]
    rows = [heads, ["---"] * len(heads)]
    for updates in sorted({u for records in log.valid.values() for u in records}):
        train = log.epochs.get(updates, {})
        epoch = next(r[updates]["epoch"] for r in log.valid.values() if updates in r)
        row = [f"{epoch:g}", f"{updates:,}", _shown(train, "loss")]
        for split in splits:
            record = log.valid[split].get(updates, {})
            row += [_shown(record, "loss"), _shown(record, "ppl")]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(record: Record, key: str) -> str:
    return f"{record[key]:.2f}" if key in record else "–"


def draw(logs: dict[str, Log], key: str, out: Path) -> None:
    """A curve of `key` over updates for training and every validation split of every log."""
    figure, axes = pyplot("; or --table").subplots(figsize=(7, 4.2), layout="constrained")
    for name, log in logs.items():
        prefix = f"{name}: " if len(logs) > 1 else ""
        curves = {"train": log.inner or log.epochs, **log.valid}
        for split, records in curves.items():
            points = [(u, r[key]) for u, r in sorted(records.items()) if key in r]
            if points:
                style = {"linewidth": 1.0} if split == "train" else {"marker": "o", "markersize": 3}
                axes.plot(*zip(*points, strict=True), label=prefix + split, **style)
    if not axes.lines:
        raise DataError(f"no log has {key!r}; write logs with --log-format json")
    if key == "ppl":
        axes.set_yscale("log")
    axes.set(xlabel="updates", ylabel={"ppl": "perplexity", "loss": "loss (bits)"}.get(key, key))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--key", default="ppl", help="what to draw: ppl (default), loss, gnorm, …")
    parser.add_argument("--out", type=Path, default=Path("curve.png"), help="the picture to write")
    parser.add_argument("--table", action="store_true", help="print a table instead")
    args = parser.parse_args(argv)
    logs = {}
    for path in args.logs:
        logs[str(path)] = read(lines_of(path))
        if not logs[str(path)].inner and not logs[str(path)].epochs:
            raise DataError(f"{path}: no record in JSON; train with --log-format json")
    if args.table:
        print("\n\n".join(map(table, logs.values())))
    else:
        draw(logs, args.key, args.out)


if __name__ == "__main__":
    sys.exit(run_command("plot_log", main))
