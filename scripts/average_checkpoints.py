#!/usr/bin/env python
r"""Average the weights of several checkpoints into one.

    python scripts/average_checkpoints.py --inputs checkpoints --num-epoch-checkpoints 5 \
        --output avg.pt
    python scripts/average_checkpoints.py --inputs a.pt b.pt c.pt --output avg.pt

Reads fairseq's checkpoints as well as ours, in one file, in shards or in the parts of a mixture of
experts, one at a time. The output is one file; everything but the weights is the first one's.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.training.checkpoint import parts, store
from fairseq_lite_cli.entry import run_command


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """The first checkpoint with the mean of all weights.

    Half precision is summed and returned in float32; whole numbers are divided and rounded down, as
    fairseq's own script does.

    Raises:
        CheckpointError: two files have weights of other names or shapes.
    """
    first: dict[str, Any] = {}
    sums: OrderedDict[str, torch.Tensor] = OrderedDict()
    for path in paths:
        state = parts.whole_state(path, optimizer=not sums)
        weights = state.get("model")
        if not isinstance(weights, dict):
            raise CheckpointError(f"{path}: holds no model weights")
        if not sums:
            first = state
            sums.update((name, _widened(tensor)) for name, tensor in weights.items())
            continue
        if weights.keys() != sums.keys():
            odd = sorted(weights.keys() ^ sums.keys())[0]
            raise CheckpointError(f"{path}: is another model than {paths[0]}: they differ in {odd}")
        for name, tensor in weights.items():
            if tensor.shape != sums[name].shape:
                raise CheckpointError(f"{path}: {name} has another shape than in {paths[0]}")
            sums[name] += tensor
    count = len(paths)
    first["model"] = OrderedDict(
        (name, total / count if total.is_floating_point() else total // count)
        for name, total in sums.items()
    )
    return first


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor.clone()


def last_checkpoints(
    folders: Sequence[Path], count: int, pattern: str, upper_bound: int | None = None
) -> list[Path]:
    """The `count` checkpoints of a folder whose number is largest.

    Raises:
        ConfigError: several folders, or fewer checkpoints than asked for.
    """
    if len(folders) != 1:
        raise ConfigError("--num-*-checkpoints takes one folder in --inputs")
    found = []
    for name in _checkpoints(folders[0]):
        match = re.fullmatch(pattern, name)
        if match and (upper_bound is None or float(match.group(1)) <= upper_bound):
            found.append((float(match.group(1)), folders[0] / name))
    if len(found) < count:
        raise ConfigError(
            f"{folders[0]}: has {len(found)} such checkpoints, {count} were asked for"
        )
    return [path for _, path in sorted(found, reverse=True)[:count]]


def _checkpoints(folder: Path) -> list[str]:
    """The checkpoints in a folder, those in several files by the name they have together."""
    return parts.whole_names(path.name for path in folder.glob("*.pt"))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, average, write."""
    parser = argparse.ArgumentParser(description="Average the weights of several checkpoints.")
    parser.add_argument(
        "--inputs", nargs="+", required=True, type=Path, help="files, or one folder"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="file to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--num-epoch-checkpoints", type=int, metavar="N", help="the last N epochs")
    which.add_argument(
        "--num-update-checkpoints", type=int, metavar="N", help="the last N saved in mid-epoch"
    )
    which.add_argument("--num-best-checkpoints", type=int, metavar="N", help="the N best")
    parser.add_argument(
        "--checkpoint-upper-bound", type=int, metavar="N", help="leave out later epochs or updates"
    )
    parser.add_argument(
        "--metric", default="loss", help="of --num-best-checkpoints (default: loss)"
    )
    parser.add_argument("--maximize", action="store_true", help="the largest metric is best")
    args = parser.parse_args(argv)
    if args.num_epoch_checkpoints:
        paths = last_checkpoints(
            args.inputs,
            args.num_epoch_checkpoints,
            r"checkpoint(\d+)\.pt",
            args.checkpoint_upper_bound,
        )
    elif args.num_update_checkpoints:
        paths = last_checkpoints(
            args.inputs,
            args.num_update_checkpoints,
            r"checkpoint_\d+_(\d+)\.pt",
            args.checkpoint_upper_bound,
        )
    elif args.num_best_checkpoints:
        paths = best_checkpoints(args.inputs, args.num_best_checkpoints, args.metric, args.maximize)
    else:
        paths = args.inputs
    print("averaging:", *paths, sep="\n  ")
    store.save(args.output, average(paths))
    print(f"written: {args.output}")


def best_checkpoints(
    folders: Sequence[Path], count: int, metric: str, maximize: bool
) -> list[Path]:
    """The `count` best of what --keep-best-checkpoints left."""
    pattern = rf"checkpoint\.best_{re.escape(metric)}_(-?\d+\.?\d*)\.pt"
    total = sum(re.fullmatch(pattern, name) is not None for name in _checkpoints(folders[0]))
    ranked = last_checkpoints(folders, max(total, count), pattern)
    return ranked[:count] if maximize else ranked[::-1][:count]


if __name__ == "__main__":
    sys.exit(run_command("average_checkpoints", main, sys.argv[1:]))
