"""Errors that speak to the user: each prints as one line, without a traceback.

Whoever raises one says what was given, what was expected and what to type instead. Anything that is
not a `FliteError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class FliteError(Exception):
    """Base of every error a user can cause and mend."""


class ConfigError(FliteError):
    """A flag, a preset or a configuration file is unknown, contradictory or out of range."""


class PluginError(FliteError):
    """A `--user-dir` folder cannot be imported, or registers a name that is taken."""


class DataError(FliteError):
    """A data file is missing, cut short, of another format, or does not fit its dictionary."""


class CheckpointError(FliteError):
    """A checkpoint is missing, damaged, or does not fit the model it is loaded into."""


class MissingDependency(FliteError):
    """An optional package is needed; the message names the `pip install` command."""


class DistributedError(FliteError):
    """A rank died, hung, or the group of processes could not be formed."""


class TrainingError(FliteError):
    """Training cannot go on: non-finite values, or a loss scale below its minimum."""


class OutputClosed(FliteError):
    """Nobody reads what is printed any more, as in `flite-generate … | head`; said by no line."""
