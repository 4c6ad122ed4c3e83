#!/usr/bin/env python
"""Draw how busy each expert was over time, a picture for each layer of experts.

    python scripts/plot_moe.py train.log --out experts.png
    python scripts/plot_moe.py train.log --split valid --layer decoder.layers.5

Reads what flite-train writes with `--log-format json`, on standard output or to `--log-file`:
beside every line of figures one for each layer of experts (see docs/moe.md). A row of a picture is
an expert, its colour the share of the rows that it computed since the line before, 1 being an equal
share; below it stands the share of what was dropped. Needs matplotlib (`pip install
'fairseq-lite[plot]'`).
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


def draw(layers: Mapping[str, Mapping[int, Record]], out: Path) -> None:
    """A picture of the load of each layer.

    Args:
        layers: records by layer and number of updates.
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
        updates = sorted(by_update)
        _draw_load(figure, rows[2 * i][0], name, updates, [by_update[u]["load"] for u in updates])
        _draw_dropped(rows[2 * i + 1][0], updates, [by_update[u]["dropped"] for u in updates])
    figure.savefig(out, dpi=150)


def _draw_load(
    figure: Any, axes: Any, name: str, updates: Sequence[int], shares: Sequence[Sequence[float]]
) -> None:
    experts = len(shares[0])
    # A record stands for the updates from the one before it on.
    edges = [updates[0] - (updates[1] - updates[0] if len(updates) > 1 else 1), *updates]
    mesh = axes.pcolormesh(
        edges,
        [e - 0.5 for e in range(experts + 1)],
        [[share[e] * experts for share in shares] for e in range(experts)],
        vmin=0.0,
        vmax=2.0,
        cmap="RdBu_r",
    )
    axes.set(title=name, ylabel="expert", xlim=(edges[0], edges[-1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelbottom=False)
    figure.colorbar(mesh, ax=axes, label="share x experts", extend="max")


def _draw_dropped(axes: Any, updates: Sequence[int], dropped: Sequence[float]) -> None:
    axes.plot(updates, [100.0 * share for share in dropped], linewidth=1.0)
    axes.set(xlabel="updates", ylabel="dropped %", ylim=(0, None))
    axes.grid(alpha=0.3)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--split", help="train_inner (default), train, valid, …")
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
    draw(layers, args.out)


if __name__ == "__main__":
    sys.exit(run_command("plot_moe", main))
