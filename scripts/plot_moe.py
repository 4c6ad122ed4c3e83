#!/usr/bin/env python
"""Draw how busy each expert was over time, a picture for each layer of experts.

    python scripts/plot_moe.py train.log --out experts.png
    python scripts/plot_moe.py train.log --split valid --layer decoder.layers.5
    python scripts/plot_moe.py train.log --key wanted

Reads what flite-train writes with `--log-format json`, on standard output or to `--log-file`:
beside every line of figures one for each layer of experts (see docs/moe.md). A row of a picture is
an expert, its colour the share of the rows that it computed since the line before (with `--key
wanted`, of those that were sent to it, dropped ones included), 1 being an equal share. Below stands
the share of what was dropped. Needs matplotlib (`pip install 'fairseq-lite[plot]'`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_lite.errors import DataError
from fairseq_lite_cli.drawing import lines_of, pyplot
from fairseq_lite_cli.entry import run_command

Record = dict[str, Any]
# By split, layer and number of updates; what was logged twice counts once, as it was last.
Records = dict[str, dict[str, dict[int, Record]]]
_HEIGHT = 2.6


def read(lines: Iterable[str]) -> Records:
    """Find the records of layers of experts among the lines of a log."""
    found: Records = {}
    for line in lines:
        start = line.find('{"split"')
        if start < 0 or '"load"' not in line:
            continue
        try:
            record = json.loads(line[start:])
        except ValueError:  # cut by a kill
            continue
        layers = found.setdefault(str(record["split"]), {})
        layers.setdefault(str(record["layer"]), {})[int(record["updates"])] = record
    return found


def draw(layers: Mapping[str, Mapping[int, Record]], key: str, out: Path) -> None:
    """A picture of what the experts of each layer had to do.

    Args:
        layers: records by layer and number of updates.
        key: "load" or "wanted".
        out: the file.
    """
    plots = pyplot()
    figure, rows = plots.subplots(
        2 * len(layers),
        figsize=(8, _HEIGHT * len(layers)),
        height_ratios=[3, 1] * len(layers),
        layout="constrained",
        squeeze=False,
    )
    for i, (name, by_update) in enumerate(layers.items()):
        records = [by_update[updates] for updates in sorted(by_update)]
        above, below = rows[2 * i][0], rows[2 * i + 1][0]
        mesh = _draw_shares(above, records, key)
        figure.colorbar(mesh, ax=above, label=f"{key} x experts", extend="max")
        above.set_title(name)
        above.tick_params(labelbottom=False)
        ends = [record["updates"] for record in records]
        below.plot(ends, [100.0 * record["dropped"] for record in records], linewidth=1.0)
        below.set(xlabel="updates", ylabel="% drop", ylim=(0, None), xlim=above.get_xlim())
        below.grid(alpha=0.3)
    figure.savefig(out, dpi=150)


def _draw_shares(axes: Any, records: Sequence[Record], key: str) -> Any:
    shares = [record[key] for record in records]
    ends = [record["updates"] for record in records]
    experts = len(shares[0])
    # A record stands for the updates from the one before it on.
    begin = ends[0] - (ends[1] - ends[0] if len(ends) > 1 else 1)
    mesh = axes.pcolormesh(
        [begin, *ends],
        [e - 0.5 for e in range(experts + 1)],
        [[share[e] * experts for share in shares] for e in range(experts)],
        vmin=0.0,
        vmax=2.0,
        cmap="RdBu_r",
    )
    axes.set(ylabel="expert", xlim=(begin, ends[-1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    return mesh


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--split", help="train_inner (default), train, valid, …")
    parser.add_argument(
        "--key", choices=("load", "wanted"), default="load", help="computed rows, or also dropped"
    )
    parser.add_argument("--layer", help="only this one, as in decoder.layers.1")
    parser.add_argument("--out", type=Path, default=Path("moe.png"), help="the picture to write")
    args = parser.parse_args(argv)
    found = read(lines_of(args.log))
    if not found:
        raise DataError(
            f"{args.log}: no line about layers of experts: train with --log-format json and "
            "--criterion moe_cross_entropy or another that balances experts"
        )
    split = args.split or ("train_inner" if "train_inner" in found else next(iter(found)))
    if split not in found:
        raise DataError(f"--split {split}: {args.log} has {', '.join(found)}")
    layers = found[split]
    if args.layer is not None:
        if args.layer not in layers:
            raise DataError(f"--layer {args.layer}: {args.log} has {', '.join(layers)}")
        layers = {args.layer: layers[args.layer]}
    draw(layers, args.key, args.out)


if __name__ == "__main__":
    sys.exit(run_command("plot_moe", main))
