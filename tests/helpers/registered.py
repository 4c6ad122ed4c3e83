"""Names that tests register, and that no other module of tests is to find."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from fairseq_lite.registry import Registry

PLUGIN = (
    "flite_user_"  # what the name of a plugin's module begins with, as of `plugins.module_name`
)


@contextmanager
def registered(*entries: tuple[Registry, str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each registry has the name besides its own."""
    with _kept({registry for registry, _, _ in entries}):
        for registry, name, factory in entries:
            registry.register(name)(factory)
        yield


@contextmanager
def plugins_forgotten() -> Iterator[None]:
    """At the end, what plugins registered inside is not there; importing them does it again."""
    _load_what_ships()  # what ships and was not yet loaded would be forgotten, too
    known = set(sys.modules)
    with _kept(set(_registries())):
        yield
    new = sys.modules.keys() - known
    plugins = {name: sys.modules[name] for name in new if name.startswith(PLUGIN)}
    aliases = {name for name in new if any(sys.modules[name] is each for each in plugins.values())}
    for name in new:
        if name in plugins or name.split(".")[0] in aliases:
            del sys.modules[name]


def of_tests() -> list[str]:
    """What is registered, anywhere, by a module of tests."""
    return [
        f"{registry.flag} {name}, of {entry.factory.__module__}"
        for registry in _registries()
        for name, entry in registry._entries.items()
        if entry.factory.__module__.split(".")[0] == "tests"
    ]


@contextmanager
def _kept(registries: set[Registry]) -> Iterator[None]:
    with ExitStack() as stack:
        for registry in registries:
            stack.enter_context(patch.dict(registry._entries))
        yield


def _load_what_ships() -> None:
    for name in ("fairseq_lite", "examples.few_shot"):
        if any(each.startswith(f"{name}.") and each.endswith(".api") for each in sys.modules):
            importlib.import_module(f"{name}.builtins").load_builtins()


def _registries() -> list[Registry]:
    """Those of the modules that have been imported."""
    ours = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("fairseq_lite", "examples")
    ]
    return [each for module in ours for each in vars(module).values() if type(each) is Registry]
