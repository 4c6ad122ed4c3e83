"""The table of a dense run against one with experts, from their logs.

    python examples/moe/table.py --dense work/dense.log --moe work/moe.log --experts 8

Reads logs of flite-train with `--log-format json`. Speeds are medians over the intervals that were
logged, so that validations in between do not count; the comparable BLEU is the lower of the two
best ones, and its steps are those after which a run first had it or more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from fairseq_lite.errors import DataError
from fairseq_lite_cli.entry import run_command

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import plot_log

Record = plot_log.Record


@dataclass
class Run:
    """What a log says of a run.

    Attributes:
        inner: the records within epochs, in order.
        valid: updates and the record of each validation with BLEU, in order.
    """

    inner: list[Record]
    valid: list[tuple[int, Record]]

    @classmethod
    def of(cls, path: Path) -> Run:
        """Read a log.

        Raises:
            DataError: it is no log of a training with BLEU in validation.
        """
        log = plot_log.read(plot_log.lines_of(path))
        valid = [(u, r) for u, r in sorted(log.valid.get("valid", {}).items()) if "bleu" in r]
        inner = [record for _, record in sorted(log.inner.items())]
        if not valid or not inner:
            raise DataError(
                f"{path}: expected the log of a training with --eval-bleu, --log-format json and "
                "--log-interval shorter than it was"
            )
        # An interval that begins with the start of the processes, or holds a validation, is slow.
        return cls(inner[1:] or inner, valid)

    @property
    def best(self) -> tuple[int, Record]:
        """The first of the best validations."""
        return max(self.valid, key=lambda each: each[1]["bleu"])

    def reached(self, bleu: float) -> tuple[int, Record]:
        """The first validation with at least so much."""
        return next(each for each in self.valid if each[1]["bleu"] >= bleu)


def rows(dense: Run, moe: Run, experts: int) -> list[tuple[str, str, str]]:
    """The lines of the table: what, dense, with experts."""
    comparable = min(dense.best[1]["bleu"], moe.best[1]["bleu"])

    def row(name: str, value: Callable[[Run], str]) -> tuple[str, str, str]:
        return name, value(dense), value(moe)

    return [
        row("Train ntokens/batch", lambda run: f"{mean(r['wpb'] for r in run.inner):,.0f}"),
        row("Train tokens/sec", lambda run: f"{median(r['wps'] for r in run.inner):,.0f}"),
        row("Val tokens/sec", lambda run: f"{median(r['wps'] for _, r in run.valid):,.0f}"),
        row("Best valid BLEU", lambda run: f"{run.best[1]['bleu']:.2f}"),
        row("Steps to Best", lambda run: f"{run.best[0]:,}"),
        row("Epochs to Best", lambda run: f"{run.best[1]['epoch']:.0f}"),
        row(
            "Comparable Valid BLEU",
            lambda run: f"{run.reached(comparable)[1]['bleu']:.2f}",
        ),
        row("Steps to Comparable", lambda run: f"{run.reached(comparable)[0]:,}"),
        ("N Experts", "1", str(experts)),
        row("seconds/update", lambda run: f"{median(r['wpb'] / r['wps'] for r in run.inner):.3f}"),
        row("Updates in all", lambda run: f"{run.inner[-1]['num_updates']:,.0f}"),
    ]


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="table.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dense", type=Path, required=True, help="log of the dense run")
    parser.add_argument("--moe", type=Path, required=True, help="log of the run with experts")
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--test", type=Path, nargs=2, metavar="FILE", help="sacrebleu.sh's output")
    args = parser.parse_args(argv)
    found = rows(Run.of(args.dense), Run.of(args.moe), args.experts)
    if args.test:
        scores = [path.read_text(encoding="utf-8").split("=")[1].split()[0] for path in args.test]
        found.append(("Test BLEU, best checkpoint", *scores))
    print(f"| Metric | Dense | MoE x{args.experts} |\n|---|---|---|")
    for name, dense, moe in found:
        print(f"| {name} | {dense} | {moe} |")


if __name__ == "__main__":
    sys.exit(run_command("table.py", main))
