"""Which value an evaluation is given where several places name one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from examples.few_shot.options import flag_owner

Values = Mapping[str, Any]

# Weakest first.
LEVELS = (
    "command line",
    "custom_base_run_args",
    "model setting",
    "task setting",
    "custom_override_run_args",
)
COMMAND_LINE, CUSTOM_BASE, MODEL, TASK, CUSTOM_OVERRIDE = LEVELS
# The first level's, where nobody typed it.
DEFAULT = "default"


@dataclass(frozen=True)
class Merged:
    """Values with where they come from.

    Attributes:
        values: by name.
        sources: of each name the level that gave its value.
    """

    values: Values
    sources: Mapping[str, str]


def merge_run_args(
    base: Values, custom_base: Values, model: Values, task: Values, custom_override: Values
) -> Merged:
    """Merge the five levels of arguments; a later one wins wherever it names a value.

    Args:
        base: built-in values and those of the command line.
        custom_base: `custom_base_run_args`.
        model: of the model setting.
        task: of the task setting.
        custom_override: `custom_override_run_args`.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    levels = (base, custom_base, model, task, custom_override)
    for source, level in zip(LEVELS, levels, strict=True):
        values.update(level)
        sources.update(dict.fromkeys(level, source))
    return Merged(values, sources)


def canonical(values: Values) -> dict[str, Any]:
    """The same values by one spelling of each name: `pawsx_language` is `pawsx_languages`.

    Two spellings of one name would not meet in `merge_run_args`. Only registered tasks have names.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        owner = flag_owner(name)
        found[name if owner is None else "_".join(owner)] = value
    return found


def gave_way(base: Values, typed: Iterable[str], merged: Merged) -> list[tuple[str, Any, str]]:
    """Values typed on the command line that another level replaced: name, new value, level."""
    return [
        (name, merged.values[name], merged.sources[name])
        for name in typed
        if name in base and merged.sources[name] != COMMAND_LINE
        and merged.values[name] != base[name]
    ]  # fmt: skip
