"""The modules that register what ships."""

from __future__ import annotations

import functools
import importlib
import pkgutil

_FOLDERS = ("tasks", "templates", "metrics", "predictors")


@functools.cache  # planning asks for it thousands of times
def load_builtins() -> None:
    """Import every module of the folders of entries: a new task is a new file there. No torch."""
    for folder in _FOLDERS:
        package = importlib.import_module(f"examples.few_shot.{folder}")
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{found.name}")
