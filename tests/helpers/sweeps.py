"""The sweeps of scripts/sweep as modules, and their command lines without starting anything."""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

from tests.helpers.commands import REPOSITORY

FOLDER = REPOSITORY / "scripts" / "sweep"
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))  # where Python looks first when a script of it is executed

from sweep import attempt, control, grid, hyperparam, main, options, results, slurm, state

__all__ = [
    "attempt",
    "control",
    "grid",
    "hyperparam",
    "main",
    "options",
    "results",
    "slurm",
    "state",
]


def script(name: str) -> ModuleType:
    """One of the scripts."""
    return importlib.import_module(name)


def options_of(module: ModuleType, *words: object) -> argparse.Namespace:
    """A script's command line, read."""
    typed = [str(word) for word in words]
    return options.read(typed, getattr(module, "add_options", None), None)


def runs_of(module: ModuleType, *words: object) -> list[grid.Run]:
    """The runs that a script's command line asks for."""
    return grid.runs_of(module.get_grid, None, options_of(module, *words))
