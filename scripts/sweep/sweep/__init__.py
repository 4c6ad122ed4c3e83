"""Sweeps: a grid of hyperparameters, a training run for each of its points, a table of results.

A sweep is a script that says what its grid is:

    import sweep
    from sweep import hyperparam

    def get_grid(args):
        return [
            hyperparam("--task", "language_modeling"),
            hyperparam("--lr", [1e-3, 5e-4], save_dir_key=lambda v: f"lr{v}"),
        ]

    def postprocess_hyperparams(args, config):
        pass

    if __name__ == "__main__":
        sweep.main(get_grid, postprocess_hyperparams)

This is the form of fairseq's `fb_sweep`, whose scripts work with their imports changed to these.
docs/sweeps.md says how to use it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fairseq_lite_cli.entry import run_command

from .control import Grid, Postprocess, conduct
from .grid import Config, hyperparam
from .options import AddOptions

__all__ = ["Config", "hyperparam", "main"]


def main(
    get_grid: Grid | Mapping[str, Grid],
    postprocess_hyperparams: Postprocess | None = None,
    add_extra_options_func: AddOptions | None = None,
    scheduler_args: Sequence[str] | None = None,
    *,
    prepare: Callable[[argparse.Namespace], object] | None = None,
    about: str | None = None,
) -> None:
    """Run a sweep as its command line says.

    Args:
        get_grid: the options -> the flags of the grid; or several such functions by the name that
            `--grid` gives.
        postprocess_hyperparams: changes the flags of one point in place, before it is named.
        add_extra_options_func: adds flags of the script's own.
        scheduler_args: the words of the command line; those the script was called with by default.
        prepare: called before the first run is started, never for `--dry-run`.
        about: what `--help` says first.

    Raises:
        SystemExit: with status 1 when a run failed, 2 after a user's error, 130 and 143 when the
            sweep was interrupted.
    """
    sweep = partial(
        conduct,
        get_grid=get_grid,
        postprocess=postprocess_hyperparams,
        add_options=add_extra_options_func,
        prepare=prepare,
        about=about,
    )
    status = run_command(Path(sys.argv[0]).name, sweep, scheduler_args)
    if status:
        sys.exit(status)
