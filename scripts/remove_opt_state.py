#!/usr/bin/env python
"""Make checkpoints smaller by leaving out the optimizer's state.

    python scripts/remove_opt_state.py checkpoints/checkpoint_best.pt
    python scripts/remove_opt_state.py model.pt --output small.pt

Without --output each file is replaced, atomically. Such a file still translates and can be
fine-tuned; a run that goes on from it starts its optimizer anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_lite.errors import ConfigError
from fairseq_lite.training.checkpoint import store
from fairseq_lite_cli.entry import run_command


def remove(path: Path, output: Path) -> tuple[int, int]:
    """Write a checkpoint without optimizer state; returns the sizes before and after."""
    before = path.stat().st_size if path.exists() else 0
    state = store.load(path)
    state.pop("last_optimizer_state", None)
    store.save(output, state)
    return before, output.stat().st_size


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description="Leave out the optimizer state of checkpoints.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE.pt")
    parser.add_argument("--output", type=Path, help="write here instead (one FILE.pt only)")
    args = parser.parse_args(argv)
    if args.output is not None and len(args.paths) > 1:
        raise ConfigError("--output takes one checkpoint")
    for path in args.paths:
        before, after = remove(path, args.output or path)
        print(f"{args.output or path}: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(run_command("remove_opt_state", main, sys.argv[1:]))
