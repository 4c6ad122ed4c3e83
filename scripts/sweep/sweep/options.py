"""The command line that all sweeps share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fairseq_lite.config import flags
from fairseq_lite.errors import ConfigError
from fairseq_lite.registry import near

AddOptions = Callable[[argparse.ArgumentParser], object]

# Flags that speak to Slurm's queue, which has no part in --local and --salloc.
_SLURM = (
    *("partition", "constraint", "mem", "comment", "reservation", "exclusive"),
    *("dep", "sequential"),
)
# Slurm's forms of a duration, in the order in which it tries them.
_TIMES = (
    r"(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<minutes>\d+)(?::(?P<seconds>\d+))?",
)


class Parser(flags.Parser):
    """A parser whose complaints say where to look."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all flags)")


def parser(description: str | None = None) -> Parser:
    """The flags of every sweep."""
    new = Parser(
        prog=Path(sys.argv[0]).name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = new.add_argument_group("what to run").add_argument
    add("-d", "--data", help="the data folder")
    add("-p", "--prefix", required=True, help="a run is called PREFIX.KEYS.ngpuN")
    add(
        *("-t", "--num-trials"),
        required=True,
        type=int,
        metavar="N",
        help="runs: the first N points of the shuffled grid; -1: all",
    )
    add(
        *("-g", "--num-gpus"),
        required=True,
        type=int,
        metavar="N",
        help="GPUs of a machine, or processes where there are no GPUs",
    )
    add("-n", "--num-nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--seed", type=int, default=1234, help="of the order of the grid (default: 1234)")
    add("--grid", metavar="NAME", help="which grid, of a script that has several")
    add(
        "--checkpoints-dir",
        default="checkpoints",
        metavar="DIR",
        help="runs go to DIR/PREFIX.KEYS.ngpuN (default: checkpoints)",
    )
    add("--baseline-model", metavar="FILE", help="the checkpoint new runs start from")
    add("--tensorboard-logdir", metavar="DIR", help="write TensorBoard events to DIR/RUN")
    add("--no-tensorboard", action="store_true", help="write none, as without --tensorboard-logdir")
    add("--no-wandb", action="store_true", help="leave out the grid's --wandb-project")
    add("--script", help="a script to execute instead of flite-train, with the same flags")
    add("--python", help="the interpreter (default: the one of the sweep)")
    add("--snapshot-code", action="store_true", help="run from a copy of the code, RUN/code")
    add(
        "--post-steps",
        nargs="+",
        default=[],
        metavar="STEP",
        help="shell commands after a run that ended well, or a file of them; {job_dir} is its "
        "folder",
    )
    add = new.add_argument_group("what of it").add_argument
    add("--dry-run", action="store_true", help="print what would be done, and do nothing")
    add("--resume-failed", action="store_true", help="go on with runs that failed")
    add("--resume-finished", action="store_true", help="start runs that finished once more")
    add = new.add_argument_group("where").add_argument
    add("--local", action="store_true", help="here, one run after another; otherwise on Slurm")
    add(
        "--salloc",
        action="store_true",
        help="on the machines of salloc's allocation, one run after another",
    )
    add("--partition", metavar="NAME", help="Slurm's partition")
    add("--time", default="4320", help="limit: minutes, or as Slurm writes it (default: 4320)")
    add("--mem", metavar="SIZE", help="memory of a machine, as in 400G")
    add("--constraint", metavar="NAME", help="features the machines must have")
    add("--comment", help="a remark for Slurm")
    add("--reservation", metavar="NAME", help="Slurm's reservation")
    add("--exclusive", action="store_true", help="share no machine")
    add("--dep", metavar="JOB", type=int, help="wait until this job has ended")
    add("--sequential", action="store_true", help="each run waits until the one before has ended")
    return new


def read(
    argv: Sequence[str], add_options: AddOptions | None, about: str | None
) -> argparse.Namespace:
    """Read and check the command line.

    Args:
        argv: the words.
        add_options: adds a script's own flags.
        about: what `--help` says first.

    Raises:
        ConfigError: a flag is unknown, or flags contradict one another.
    """
    new = parser(about)
    if add_options is not None:
        add_options(new)
    args, unknown = new.parse_known_args(list(argv))
    if unknown:
        word = unknown[0].split("=")[0]
        known = [name for action in new._actions for name in action.option_strings]
        raise ConfigError(f"unknown flag {word}" + near(word, known))
    _check(args)
    args.post_steps = [_step(step) for step in args.post_steps]
    args.time_minutes = minutes(args.time)
    args.here = args.local or args.salloc
    return args


def _check(args: argparse.Namespace) -> None:
    if args.num_trials == 0 or args.num_trials < -1:
        raise ConfigError(f"-t {args.num_trials}: expected a number of runs, or -1 for all")
    for flag, value in (("-g", args.num_gpus), ("-n", args.num_nodes)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: expected 1 or more")
    if args.local and args.num_nodes > 1:
        raise ConfigError(
            f"--local -n {args.num_nodes}: --local is this machine alone: -n 1; or --salloc, for "
            "the machines of an allocation"
        )
    if args.local and args.salloc:
        raise ConfigError(
            "--local is this machine, and --salloc those of an allocation: leave one of them out"
        )
    if not re.fullmatch(r"[\w@+=][\w.@+=-]*", args.prefix):
        raise ConfigError(
            f"--prefix {args.prefix}: expected letters, digits and ._@+=-; a folder goes into "
            "--checkpoints-dir"
        )
    if args.script is not None and args.snapshot_code:
        raise ConfigError("--snapshot-code copies flite-train's code, and --script runs another")
    if args.no_tensorboard and args.tensorboard_logdir is not None:
        raise ConfigError("--no-tensorboard and --tensorboard-logdir: leave one of them out")


def without_part(args: argparse.Namespace) -> list[str]:
    """Flags that were typed for Slurm's queue, which has no part in --local and --salloc."""
    if not args.here:
        return []
    typed = [name for name in _SLURM if getattr(args, name) not in (None, False)]
    if args.time != "4320":
        typed.append("time")
    return [f"--{name}" for name in typed]


def minutes(text: str) -> int:
    """A duration in one of Slurm's forms, in minutes, rounded up.

    >>> [minutes(text) for text in ("90", "2:30", "1:30:00", "3-0", "1-12:30")]
    [90, 3, 90, 4320, 2190]

    Raises:
        ConfigError: it is none.
    """
    for form in _TIMES:
        found = re.fullmatch(form, text)
        if found is not None:
            parts = {name: int(value or 0) for name, value in found.groupdict().items()}
            whole = 24 * parts.get("days", 0) + parts.get("hours", 0)
            return max(1, 60 * whole + parts.get("minutes", 0) + (parts.get("seconds", 0) > 0))
    raise ConfigError(f"--time {text}: expected minutes, HH:MM:SS or D-HH:MM:SS")


def _step(text: str) -> str:
    """A step of --post-steps: what a file of this name contains, or the words themselves."""
    if os.path.isfile(text):
        return Path(text).read_text(encoding="utf-8").strip()
    return text.strip()
