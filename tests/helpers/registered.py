"""Names that a test registers, and that no other test is to find."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from fairseq_lite.registry import Registry


@contextmanager
def registered(*entries: tuple[Registry, str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each registry has the name besides its own."""
    registries = {id(registry): registry for registry, _, _ in entries}
    kept = [patch.dict(registry._entries) for registry in registries.values()]
    for each in kept:
        each.start()
    try:
        for registry, name, factory in entries:
            registry.register(name)(factory)
        yield
    finally:
        for each in kept:
            each.stop()


def of_tests() -> list[str]:
    """What is registered, anywhere, by a module of tests."""
    return [
        f"{registry.flag} {name}, of {entry.factory.__module__}"
        for registry in gc.get_objects()
        if issubclass(type(registry), Registry)
        for name, entry in registry._entries.items()
        if entry.factory.__module__.split(".")[0] == "tests"
    ]
