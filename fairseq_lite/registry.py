"""One registry class for every kind of plugin: tasks, architectures, criteria, backends and more.

A registry maps a name the user types to an `Entry`: what to build and the frozen dataclass its
flags come from. A preset is another name for an entry with other defaults; it is data, checked when
it is registered, so a misspelled field fails at import and not in the middle of a run.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar

from fairseq_lite.errors import ConfigError, PluginError

F = TypeVar("F", bound=Callable[..., Any])
PresetFunction = Callable[[SimpleNamespace], None]


@dataclasses.dataclass(frozen=True)
class NoConfig:
    """The configuration of an entry that has no flags of its own."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a registered name stands for.

    Attributes:
        name: the name as registered.
        factory: the class or function that builds the thing.
        config: the frozen dataclass whose fields are its flags.
        overrides: a preset's values, which replace the defaults of `config`.
        of: the entry this preset is made from, or None.
        adjust: a preset given as a function in fairseq's style, or None.
    """

    name: str
    factory: Callable[..., Any]
    config: type
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of: str | None = None
    adjust: PresetFunction | None = None

    def preset_values(self, explicit: Mapping[str, Any]) -> dict[str, Any]:
        """The preset's values, given what the user set explicitly.

        A preset function sees the explicit values on its namespace, as fairseq's do through
        `getattr(args, "field", default)`, so a default may follow another field.
        """
        values = {k: v for k, v in self.overrides.items() if k not in explicit}
        if self.adjust is None:
            return values
        namespace = SimpleNamespace(**{**self.overrides, **explicit})
        self.adjust(namespace)
        _check_fields(self.name, self.config, vars(namespace))
        return {k: v for k, v in vars(namespace).items() if k not in explicit}


def near(name: str, names: Iterable[str]) -> str:
    """A clause that suggests the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _check_fields(name: str, config: type, values: Mapping[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(config)}
    for field in values:
        if field not in known:
            raise PluginError(
                f"preset {name!r} sets {field!r}, which {config.__name__} does not have"
                + near(field, known)
            )


class Registry:
    """Names of one kind and what they build.

    Args:
        kind: the noun used in messages, for example "task".
        flag: the flag that selects an entry, for example "--task".
    """

    def __init__(self, kind: str, flag: str) -> None:
        self.kind = kind
        self.flag = flag
        self._entries: dict[str, Entry] = {}

    def register(
        self, name: str, *, config: type = NoConfig, aliases: Iterable[str] = ()
    ) -> Callable[[F], F]:
        """Decorate the class or function that builds `name`; `config` gives its flags."""
        if not (dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise PluginError(f"{self.kind} {name!r}: its config must be a frozen dataclass")

        def decorate(factory: F) -> F:
            for each in (name, *aliases):
                self._add(Entry(each, factory, config, of=None if each == name else name))
            return factory

        return decorate

    def preset(self, name: str, *, of: str, **overrides: Any) -> None:
        """Register `name` as the entry `of` with other defaults.

        Raises:
            PluginError: a field the entry's config does not have, or a name that is taken.
        """
        base = self._base(name, of)
        merged = {**base.overrides, **overrides}
        _check_fields(name, base.config, merged)
        self._add(dataclasses.replace(base, name=name, overrides=MappingProxyType(merged), of=of))

    def preset_function(self, name: str, *, of: str) -> Callable[[PresetFunction], PresetFunction]:
        """Register a preset as a function that fills in a namespace, in fairseq's style."""
        base = self._base(name, of)

        def decorate(function: PresetFunction) -> PresetFunction:
            self._add(dataclasses.replace(base, name=name, adjust=function, of=of))
            return function

        return decorate

    def get(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            ConfigError: no such name; the message suggests near ones.
        """
        try:
            return self._entries[name]
        except KeyError:
            hint = near(name, self._entries) or f"; known: {', '.join(self.names())}"
            raise ConfigError(f"{self.flag} {name}: unknown {self.kind}{hint}") from None

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _base(self, name: str, of: str) -> Entry:
        if of not in self._entries:
            raise PluginError(
                f"preset {name!r}: there is no {self.kind} {of!r}{near(of, self._entries)}"
            )
        return self._entries[of]

    def _add(self, entry: Entry) -> None:
        old = self._entries.get(entry.name)
        if old is not None:
            # The same source imported again (a worker, a reload) defines equal things: a no-op.
            same = (old.factory.__module__, old.factory.__qualname__) == (
                entry.factory.__module__,
                entry.factory.__qualname__,
            )
            if not (same and old.overrides == entry.overrides and old.of == entry.of):
                raise PluginError(
                    f"{self.kind} {entry.name!r} is already registered by "
                    f"{old.factory.__module__}.{old.factory.__qualname__}"
                )
        self._entries[entry.name] = entry
