"""The table and the picture of a recorded run of `benchmarks.fsdp.run`.

    python -m benchmarks.fsdp.report benchmarks/results/fsdp.json [--out benchmarks/fsdp]

Writes `table.md` and `memory.png` (needs matplotlib: pip install 'fairseq-lite[plot]').
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STATE = ("parameters", "gradients", "optimizer")
MIB = 1 << 20


def table(found: dict[str, Any]) -> str:
    """A row for every way and number of ranks; memory is a rank's, in MiB."""
    heads = [
        "",
        "ranks",
        *STATE,
        "state",
        "x ranks / one rank's",
        "peak",
        "tokens/s",
        "x legacy_ddp",
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in sorted(found["runs"], key=lambda r: (r["way"], r["ranks"])):
        cells = [row["way"], str(row["ranks"])]
        if "error" in row:
            cells += ["–"] * (len(heads) - 3) + [row["error"]]
        else:
            cells += [f"{row['bytes'][name] / MIB:.1f}" for name in STATE]
            cells += [f"**{row['state'] / MIB:.1f}**", _number(row.get("state_times_ranks"))]
            cells += [f"{row['bytes']['peak'] / MIB:.0f}", f"{row['tokens_per_second']:.0f}"]
            cells += [_number(row.get("times_legacy_ddp"))]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def picture(found: dict[str, Any], out: Path) -> None:
    """Bars of state for each way, a group for each number of ranks; dots are peaks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in found["runs"] if "error" not in row]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    sizes = sorted({row["ranks"] for row in rows})
    colours = dict(zip(STATE, ("#4c72b0", "#dd8452", "#55a868"), strict=True))
    figure, axes = pyplot.subplots(
        1, len(sizes), figsize=(3.2 * len(sizes) + 1.5, 4.6), sharey=True, layout="constrained"
    )
    for axis, ranks in zip(figure.axes or [axes], sizes, strict=True):
        here = {row["way"]: row for row in rows if row["ranks"] == ranks}
        for place, way in enumerate(ways):
            if way not in here:
                continue
            below = 0.0
            for name in STATE:
                height = here[way]["bytes"][name] / MIB
                label = name if place == 0 else None
                axis.bar(place, height, bottom=below, color=colours[name], label=label)
                below += height
            peak = here[way]["bytes"]["peak"] / MIB
            label = "peak of the process" if place == 0 else None
            axis.plot(place, peak, "kD", markersize=4, label=label)
        axis.set_title(f"{ranks} rank{'s' if ranks > 1 else ''}")
        axis.set_xticks(range(len(ways)), [way.replace(", ", ",\n") for way in ways], rotation=90)
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("MiB of a rank")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize="small")
    figure.suptitle(f"{_parameters(rows)} parameters", x=0.01, ha="left", fontsize="medium")
    figure.savefig(out, dpi=150)


def _parameters(rows: list[dict[str, Any]]) -> str:
    return f"{rows[0]['model'] / 1e6:.1f} million"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    found = json.loads(args.result.read_text(encoding="utf-8"))
    (args.out / "table.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    picture(found, args.out / "memory.png")


if __name__ == "__main__":
    main()
