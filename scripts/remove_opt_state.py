#!/usr/bin/env python
"""Make checkpoints smaller by leaving out the optimizer's state.

    python scripts/remove_opt_state.py checkpoints/checkpoint_last checkpoints
    python scripts/remove_opt_state.py checkpoints/checkpoint_best.pt
    python scripts/remove_opt_state.py model.pt --output small.pt

The first form takes all files of a checkpoint, one or many (`-shard0`; `-shared` and `-expert0`;
`-rank-0`), and writes each to DEST as `checkpoint_eval` with the same ending; without DEST, beside
them. The others take files by their names, and without --output replace them. Such a checkpoint
still translates and can be fine-tuned; a run that goes on from it starts its optimizer anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.training.checkpoint import parts, store
from fairseq_lite_cli.entry import run_command


def remove(path: Path, output: Path) -> tuple[int, int]:
    """Write a file without optimizer state; returns the sizes before and after."""
    before = path.stat().st_size if path.exists() else 0
    store.save(output, parts.without_optimizer(store.load(path)))
    return before, output.stat().st_size


def files_of(prefix: Path) -> dict[str, Path]:
    """The files of a checkpoint by what follows its name.

    Args:
        prefix: its name without `.pt`.

    Raises:
        CheckpointError: there are none, or a part is missing or of another save.
    """
    found = {
        path.name.removeprefix(prefix.name).removesuffix(".pt"): path
        for path in sorted(prefix.parent.glob(f"{prefix.name}-*.pt"))
    }
    whole = parts.with_ending(prefix)
    if whole.is_file():
        found[""] = whole
    if not found:
        raise CheckpointError(f"{prefix}: no checkpoint of this name")
    of_parts = [path for path in found.values() if parts.whole_name(path) == whole]
    if any(path != whole for path in of_parts):
        parts.check_complete(next(path for path in of_parts if path != whole))
    return found


def jobs(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """What to read and where to write it.

    Raises:
        ConfigError: options that contradict one another.
    """
    paths: list[Path] = args.paths
    if all(path.suffix == ".pt" for path in paths) and args.save_dir is None:
        if args.output is not None and len(paths) > 1:
            raise ConfigError("--output takes one checkpoint")
        for path in paths:
            files = [path] if path.is_file() else list(parts.readable_files(path).values())
            if files and files != [path]:
                parts.check_complete(path)
            if args.output is not None and len(files) > 1:
                raise ConfigError(f"--output {args.output}: {path} is several; give PREFIX DEST")
            yield from ((file, args.output or file) for file in files or [path])
        return
    if args.output is not None or len(paths) > 2 or (len(paths) == 2 and args.save_dir):
        raise ConfigError("expected PREFIX DEST, or FILE.pt … with an --output for one of them")
    prefix = paths[0].with_suffix("") if paths[0].suffix == ".pt" else paths[0]
    folder: Path = paths[1] if len(paths) == 2 else args.save_dir or prefix.parent
    folder.mkdir(parents=True, exist_ok=True)
    for ending, path in files_of(prefix).items():
        yield path, folder / f"{args.save_prefix}{ending}.pt"


def work(job: tuple[Path, Path], resume: bool) -> str:
    """Do one job, unless an earlier run has; returns the line to print."""
    path, output = job
    if resume and output != path and output.is_file():
        try:
            store.check(output)
            return f"{output}: is there already"
        except CheckpointError:
            pass  # an unfinished one is made again
    before, after = remove(path, output)
    return f"{output}: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description="Leave out the optimizer state of checkpoints.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PREFIX [DEST] | FILE.pt …")
    parser.add_argument("--output", type=Path, help="write here instead (one FILE.pt only)")
    parser.add_argument("--save-dir", type=Path, help="as DEST (default: PREFIX's own folder)")
    parser.add_argument(
        "--save-prefix", default="checkpoint_eval", help="name in DEST (default: checkpoint_eval)"
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="N files at a time")
    parser.add_argument(
        "--resume-failed", "--rf", action="store_true", help="leave out what is written already"
    )
    args = parser.parse_args(argv)
    if args.nproc < 1:
        raise ConfigError(f"--nproc {args.nproc}: expected 1 or more")
    with ThreadPoolExecutor(args.nproc) as pool:
        for line in pool.map(partial(work, resume=args.resume_failed), list(jobs(args))):
            print(line)


if __name__ == "__main__":
    sys.exit(run_command("remove_opt_state", main, sys.argv[1:]))
