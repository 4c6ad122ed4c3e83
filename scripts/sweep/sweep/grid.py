"""A grid of hyperparameters, its points, and the names and commands of their runs.

Nothing here looks at files or starts anything.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_lite.errors import ConfigError

# What a folder's name may contain. Elsewhere the rest has a meaning: `:` joins the checkpoints of
# an ensemble, `%` stands in Slurm's file names, and shells read most of the others.
_UNFIT = re.compile(r"[^\w.@+=-]+")
_NUMBER = re.compile(r"-[\d.]+(e[+-]?\d+)?", re.IGNORECASE)
_LONGEST_NAME = 255

TRAIN = "fairseq_lite_cli.train"


class hyperparam:  # noqa: N801 - fairseq's name, which users' grids call
    """One flag of a grid, with the values to try.

    Args:
        name: the flag, as in "--dropout"; of a positional argument any name.
        values: a list of values, or the only one. Left out, the flag takes none and is given. A
            value of None leaves the flag out.
        binary_flag: the flag takes no value; it is given where the value is true.
        save_dir_key: value -> its part in the name of the run; None for no part. Needed where there
            are several values, as two runs would share a folder otherwise.
        positional_arg: the value stands alone.

    Raises:
        ConfigError: several values without a key, no value, or a flag without a dash.
    """

    def __init__(
        self,
        name: str,
        values: Any = None,
        binary_flag: bool = False,
        save_dir_key: Callable[[Any], object] | None = None,
        positional_arg: bool = False,
    ) -> None:
        self.name = name
        self.binary_flag = binary_flag or values is None
        self.values = [True] if values is None else values if isinstance(values, list) else [values]
        self.save_dir_key = save_dir_key
        self.positional_arg = positional_arg
        self.current_value: Any = self.values[0] if self.values else None
        if positional_arg == name.startswith("-"):
            expected = "no dash" if positional_arg else "a dash"
            raise ConfigError(f"hyperparam {name!r}: expected {expected} at the beginning")
        if not self.values:
            raise ConfigError(f"hyperparam {name}: no value; leave it out instead")
        if len(self.values) > 1 and save_dir_key is None:
            raise ConfigError(
                f"hyperparam {name} has {len(self.values)} values and no save_dir_key: their runs "
                'would share a folder; add for example save_dir_key=lambda v: f"x{v}"'
            )

    def with_value(self, value: Any) -> hyperparam:
        """The same flag with one value."""
        other = copy.copy(self)
        other.current_value = value
        return other

    def get_cli_args(self) -> list[str]:
        """The words of the command line."""
        if self.binary_flag:
            return [self.name] if self.current_value else []
        if self.current_value is None:
            return []
        word = str(self.current_value)
        if self.positional_arg:
            return [word]
        if word.startswith("-") and not _NUMBER.fullmatch(word):
            return [f"{self.name}={word}"]  # as a word of its own it would pass for a flag
        return [self.name, word]

    def get_save_dir_key(self) -> str | None:
        """The part of the run's name; None for none."""
        if self.save_dir_key is None or (self.binary_flag and not self.current_value):
            return None
        key = self.save_dir_key(1 if self.binary_flag else self.current_value)
        return None if key is None else str(key)


# The flags of one run, by name, in the order of the grid.
Config = dict[str, hyperparam]


@dataclass(frozen=True)
class Run:
    """A point of the grid, ready to be started.

    Attributes:
        name: of the run, and of its folder.
        save_dir: the folder.
        command: what to execute.
        arguments: the words of it that are flite-train's; empty where something else is executed.
        launcher: words in front of the command: what starts it on other machines.
        post_steps: shell commands to execute afterwards.
        python_path: folder that Python looks for modules in first; None for no other than before.
    """

    name: str
    save_dir: Path
    command: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    post_steps: tuple[str, ...] = ()
    python_path: str | None = None


def points(grid: Iterable[hyperparam], *, seed: int, num_trials: int) -> list[Config]:
    """The points of a grid: all combinations, shuffled, and the first of them.

    Args:
        grid: the flags. Of two with one name the later counts, so that a list can be overridden.
        seed: of the order; the same gives the same order, as in fairseq.
        num_trials: how many; -1 for all.
    """
    flags: Config = {}
    for flag in grid:
        flags[flag.name] = flag
    combinations = list(itertools.product(*(flag.values for flag in flags.values())))
    random.Random(seed).shuffle(combinations)
    if num_trials >= 0:
        combinations = combinations[:num_trials]
    return [
        {
            flag.name: flag.with_value(value)
            for flag, value in zip(flags.values(), values, strict=True)
        }
        for values in combinations
    ]


def name_of(config: Config, *, prefix: str, num_gpus: int) -> str:
    """The name of a run: `PREFIX.KEY.KEY….ngpuN`.

    What is unfit for a folder becomes an underscore; that two runs get one name is found later.

    Raises:
        ConfigError: the name is longer than file systems allow.
    """
    keys = [flag.get_save_dir_key() for flag in config.values()]
    parts = [prefix, *(key for key in keys if key), f"ngpu{num_gpus}"]
    name = _UNFIT.sub("_", ".".join(parts))
    length = len(name.encode())
    if length > _LONGEST_NAME:
        raise ConfigError(
            f"the name {name[:40]}… has {length} bytes, and file systems take {_LONGEST_NAME}: "
            "shorten --prefix, or leave out the save_dir_key of what does not differ"
        )
    return name


def runs_of(
    get_grid: Callable[[argparse.Namespace], Sequence[hyperparam]],
    postprocess: Callable[[argparse.Namespace, Config], object] | None,
    args: argparse.Namespace,
) -> list[Run]:
    """All runs of a sweep.

    Args:
        get_grid: the options -> the flags.
        postprocess: changes the flags of one point, in place, before it is named.
        args: the options.

    Raises:
        ConfigError: two points have one name, or a flag is the sweep's own.
    """
    runs: dict[str, Run] = {}
    for config in points(get_grid(args), seed=args.seed, num_trials=args.num_trials):
        if postprocess is not None:
            postprocess(args, config)
        if args.no_wandb:
            config.pop("--wandb-project", None)
        run = _run(args, config)
        if run.name in runs:
            raise ConfigError(
                f"two points of the grid are called {run.name}: give what differs between them a "
                "save_dir_key with a value of its own for each"
            )
        runs[run.name] = run
    return list(runs.values())


def _run(args: argparse.Namespace, config: Config) -> Run:
    for name in ("--save-dir", "--distributed-world-size"):
        if name in config:
            raise ConfigError(
                f"the grid has {name}, which the sweep itself gives: -n, -g, --prefix and "
                "--checkpoints-dir decide it"
            )
    num_gpus = args.num_nodes * args.num_gpus
    name = name_of(config, prefix=args.prefix, num_gpus=num_gpus)
    save_dir = Path(args.checkpoints_dir, name)
    words = [] if args.data is None else [str(args.data)]
    words += ["--save-dir", str(save_dir), "--distributed-world-size", str(num_gpus)]
    if args.tensorboard_logdir is not None:
        words += ["--tensorboard-logdir", str(Path(args.tensorboard_logdir, name))]
    if args.baseline_model is not None:
        words += ["--continue-once", args.baseline_model]
    for flag in config.values():
        words += flag.get_cli_args()
    if "--log-format" not in config:
        words += ["--log-format", "json"]  # the table of results reads it
    program = ["-m", TRAIN] if args.script is None else [args.script]
    python_path = None
    if args.snapshot_code:
        copied = snapshot_folder(save_dir)
        # A file, not a module: `-m` would look in the current folder first.
        program = [str(copied.joinpath(*TRAIN.split(".")).with_suffix(".py"))]
        python_path = str(copied.absolute())
    return Run(
        name=name,
        save_dir=save_dir,
        command=(args.python or sys.executable, *program, *words),
        arguments=tuple(words) if args.script is None else (),
        launcher=_step(args) if args.salloc else (),
        post_steps=tuple(step.replace("{job_dir}", str(save_dir)) for step in args.post_steps),
        python_path=python_path,
    )


def _step(args: argparse.Namespace) -> tuple[str, ...]:
    """A step of salloc's allocation: a task on each machine, which starts a process for each GPU.

    It has all cores and GPUs that the machines have in the allocation.
    """
    nodes = args.num_nodes
    return (
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        *("--cpu-bind=none", "--kill-on-bad-exit=1"),
    )


def snapshot_folder(save_dir: Path) -> Path:
    """Where --snapshot-code copies the code of a run."""
    return save_dir / "code"
