#!/usr/bin/env python3
"""Collect the results of many evaluations: a TSV, and tables and plots for the eye.

python examples/few_shot/scripts/collect_results.py -i RESULTS_DIR -o results.tsv \
        --view by_run_params_simple --markdown results.md --html results.html
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from examples.few_shot import collecting, report
from examples.few_shot.builtins import load_builtins
from examples.few_shot.tasks.api import task_names
from fairseq_lite.config.flags import Parser
from fairseq_lite_cli.entry import run_command
from fairseq_lite_cli.writing import write_atomically


def get_argparser() -> Parser:
    """The flags."""
    parser = Parser("collect_results", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("-i", "--input", nargs="+", required=True, metavar="DIR",
        help="folders of results (and one level down), patterns, or results files")  # fmt: skip
    add("-o", "--output", type=Path, metavar="FILE.tsv",
        help="the table; FILE.tsv.raw.jsonl gets everything")  # fmt: skip
    add("--overwrite-output", action="store_true", help="do not append to what is there")
    add("-v", "--view", default="preferred_metrics", choices=tuple(collecting.VIEWS),
        help="what the table shows (default: %(default)s)")  # fmt: skip
    add("-t", "--tasks", nargs="+", help="these tasks and groups only")
    add("-m", "--models", nargs="+", help="these models only")
    add("-r", "--recalculate", action="store_true",
        help="also accuracies of every scoring and of ensembles, from predictions: a column each,"
        " or a row each where models are columns")  # fmt: skip
    add("--predictions-dir", type=Path, metavar="DIR",
        help="where these are (default: beside the results)")  # fmt: skip
    add("--markdown", type=Path, metavar="FILE.md", help="models side by side")
    add("--html", type=Path, metavar="FILE.html", help="likewise, with plots inside")
    add("--plots", type=Path, metavar="DIR", help="plots of metric against shots")
    add("--watch", type=float, metavar="SECONDS", help="again and again, until Ctrl-C")
    return parser


def collect(args: argparse.Namespace) -> int:
    """Collect once; returns the number of evaluations."""
    rows = collecting.load(collecting.results_files(args.input))
    tasks = None if args.tasks is None else task_names(args.tasks)
    rows = collecting.select(rows, tasks=tasks, models=args.models)
    if args.recalculate:
        rows = collecting.recalculate(rows, args.predictions_dir)
    found = collecting.VIEWS[args.view](rows)
    if args.output is None:
        columns = collecting.columns_of(found)
        print("\n".join(["\t".join(columns), *collecting.tsv_lines(found, columns)]))
    else:
        collecting.write_tsv(args.output, found, append=not args.overwrite_output)
        raw = args.output.with_name(args.output.name + ".raw.jsonl")
        write_atomically(raw, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pictures = report.plots(rows) if args.plots or args.html else {}
    if args.markdown:
        files = report.save_plots(pictures, args.plots) if args.plots else {}
        base = args.markdown.parent.resolve()
        near = {name: Path(os.path.relpath(file.resolve(), base)) for name, file in files.items()}
        write_atomically(args.markdown, [report.markdown(rows, near)])
    elif args.plots:
        report.save_plots(pictures, args.plots)
    if args.html:
        write_atomically(args.html, [report.page(rows, pictures)])
    return len(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and collect."""
    args = get_argparser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s | %(message)s", stream=sys.stderr)
    load_builtins()
    while True:
        count = collect(args)
        if args.output is not None:
            print(f"{count} evaluations in {args.output}", file=sys.stderr)
        if args.watch is None:
            return
        time.sleep(args.watch)


if __name__ == "__main__":
    sys.exit(run_command("collect_results", main))
