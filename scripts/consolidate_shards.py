#!/usr/bin/env python
r"""Make one checkpoint file of several: of shards, or of a model with experts.

    python scripts/consolidate_shards.py checkpoints/checkpoint_last
    python scripts/consolidate_shards.py checkpoints/checkpoint_best --output best.pt \
        --no-optimizer-state

Takes what --use-sharded-state wrote (-shardN), what training a mixture of experts wrote (-shared
and -expertN), and the same of fairseq's FSDP (-shardN) and gshard (-shared and -rank-N). Every
tensor is compared with the hash it was written with; a file that is missing, damaged or of another
save ends the script with one line and status 2, and nothing is written. Tensors are put together in
a file beside the output, so memory need not hold the model. Of fairseq's files the weights are
taken; their optimizer state has no names and is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.api import MAIN_PART
from fairseq_lite.training.checkpoint import parts, store
from fairseq_lite.training.checkpoint.scratch import Scratch
from fairseq_lite_cli.entry import run_command


def consolidate(path: Path, output: Path, *, optimizer: bool = True) -> tuple[int, int]:
    """Write the parts of a checkpoint as one file.

    Args:
        path: the checkpoint's name, as `checkpoint_last.pt`.
        output: the file to write.
        optimizer: whether to write the optimizer's state.

    Returns:
        How many parts and how many tensors of the model there were.

    Raises:
        CheckpointError: there are none, or one is missing, damaged or of another save.
    """
    names = parts.readable_files(path)
    if not names:
        raise CheckpointError(f"{path}: no such checkpoint")
    if MAIN_PART in names:
        raise CheckpointError(f"{path}: is one file already")
    scratch = Scratch(output.parent)
    state = parts.whole_state(path, optimizer=optimizer, allocate=scratch.allocate)
    store.save(output, state)
    store.check(output)
    return len(names), len(state["model"])


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description="Make one checkpoint file of several.")
    parser.add_argument(
        "prefix", type=Path, help="the checkpoint: checkpoints/checkpoint_last, with or without .pt"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="(default: PREFIX_consolidated.pt)"
    )
    parser.add_argument(
        "--no-optimizer-state", action="store_true", help="leave out the optimizer's state"
    )
    args = parser.parse_args(argv)
    path = parts.with_ending(args.prefix)
    whole = parts.whole_name(path)
    output = args.output or whole.with_name(f"{whole.stem}_consolidated{whole.suffix}")
    # The name of a part, so that a whole file beside them does not come first.
    of_parts = [file for file in parts.part_files(whole).values() if file != whole]
    count, tensors = consolidate(
        of_parts[0] if of_parts else path, output, optimizer=not args.no_optimizer_state
    )
    print(f"{output}: {count} files, {tensors} tensors of the model")


if __name__ == "__main__":
    sys.exit(run_command("consolidate_shards", main, sys.argv[1:]))
