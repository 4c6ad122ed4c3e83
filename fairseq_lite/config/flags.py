"""Dataclass fields as command-line flags: one field, one flag, both ways.

A config is a frozen dataclass. `flag()` gives a field its help text and the few things a type
cannot say (aliases, a value for the bare flag). `add_flags` turns the fields into argparse options
that set nothing when absent, so a typed value can be told from a default even when equal.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from fairseq_lite.errors import ConfigError

_UNSET: Any = object()


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, and never guesses abbreviations."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog=prog, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class FlagInfo:
    """What a field's type does not say about its flag."""

    help: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    const: Any = _UNSET
    positional: bool = False
    metavar: str | None = None
    typed: bool = True


def flag(
    default: Any,
    help: str,
    *,
    aliases: Iterable[str] = (),
    choices: Iterable[str] | None = None,
    const: Any = _UNSET,
    positional: bool = False,
    metavar: str | None = None,
    typed: bool = True,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: the value when neither preset, YAML nor command line sets it.
        help: one sentence for `--help`.
        aliases: other spellings, for example ("-s",).
        choices: the values allowed, where the type is not a Literal.
        const: the value of the flag typed without one (`--remove-bpe`).
        positional: typed without dashes (the data folder).
        metavar: the placeholder shown in `--help`.
        typed: False for a field that only checkpoints and YAML files set: it has no flag.
    """
    info = FlagInfo(
        help,
        tuple(aliases),
        None if choices is None else tuple(choices),
        const,
        positional,
        metavar,
        typed,
    )
    if isinstance(default, (dict, list)):
        return dataclasses.field(
            default_factory=functools.partial(type(default), default), metadata={"flag": info}
        )
    return dataclasses.field(default=default, metadata={"flag": info})


def info_of(field: dataclasses.Field[Any]) -> FlagInfo:
    """The flag information of a field; an undecorated field is a flag without help."""
    info = field.metadata.get("flag")
    return info if isinstance(info, FlagInfo) else FlagInfo()


def flag_names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """All spellings of a field's flag, the main one first; none for a field without one."""
    info = info_of(field)
    if not info.typed:
        return ()
    if info.positional:
        return (field.name, *info.aliases)
    return ("--" + field.name.replace("_", "-"), *info.aliases)


@functools.cache
def field_types(config: type) -> Mapping[str, Any]:
    """The resolved type of each field of a config."""
    return typing.get_type_hints(config)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default value."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _optional(tp: Any) -> tuple[Any, bool]:
    if get_origin(tp) in (Union, types.UnionType):
        rest = [a for a in get_args(tp) if a is not type(None)]
        if len(rest) < len(get_args(tp)):
            return (rest[0] if len(rest) == 1 else Union[tuple(rest)]), True  # noqa: UP007
    return tp, False


def _parse_bool(text: str) -> bool:
    low = text.lower()
    if low in ("true", "1", "yes", "on"):
        return True
    if low in ("false", "0", "no", "off"):
        return False
    raise ValueError("expected True or False")


def _parse_dict(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        try:  # fairseq's users also type Python dictionaries: {'beam': 4}
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"expected JSON; column {e.colno}: {e.msg}") from None
    if not isinstance(value, dict):
        raise ValueError('expected a JSON object such as {"beam": 4}')
    return value


def _parse_tuple(text: str, item: Callable[[str], Any]) -> tuple[Any, ...]:
    text = text.strip()
    if text[:1] in "([" and text[-1:] in ")]" and len(text) >= 2:
        text = text[1:-1]
    return tuple(item(part.strip().strip("'\"")) for part in text.split(",") if part.strip())


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return _whole(float(text))  # "1e6" is a usual way to write a number of updates
    except ValueError:
        raise ValueError("expected a whole number") from None


def _whole(value: float) -> int:
    if not value.is_integer():  # infinity and NaN are none either
        raise ValueError("expected a whole number")
    return int(value)


def converter(tp: Any) -> Callable[[str], Any]:
    """A function from the typed text to a value of type `tp`; ValueError says what was expected."""
    inner, optional = _optional(tp)
    if optional:
        convert = converter(inner)
        if inner is str:
            return convert
        return lambda text: None if text in ("None", "none", "null") else convert(text)
    origin = get_origin(tp)
    if origin is Literal:
        return _literal(get_args(tp))
    if origin is tuple:
        item = converter(get_args(tp)[0])
        return lambda text: _parse_tuple(text, item)
    if origin is dict or tp is dict:
        return _parse_dict
    if tp is bool:
        return _parse_bool
    if tp is int:
        return _parse_int
    if tp in (float, str):
        return typing.cast("Callable[[str], Any]", tp)
    raise TypeError(f"no flag can be made for the type {tp!r}")


def _literal(values: tuple[Any, ...]) -> Callable[[str], Any]:
    by_text = {str(v): v for v in values}

    def convert(text: str) -> Any:
        if text not in by_text:
            raise ValueError(f"expected one of {', '.join(by_text)}")
        return by_text[text]

    return convert


def coerce(config: type, name: str, value: Any, where: str) -> Any:
    """Check a value from YAML or a checkpoint against a field's type, converting lists and text.

    Raises:
        ConfigError: the value does not fit; the message names `where` it stands.
    """
    tp, optional = _optional(field_types(config)[name])
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{where}: {name} must not be empty")
    try:
        if isinstance(value, str):
            return converter(tp)(value) if tp is not str else value
        if get_origin(tp) is tuple:
            item = get_args(tp)[0]
            values = value if isinstance(value, (list, tuple)) else (value,)
            return tuple(item(v) if item in (int, float, str) else v for v in values)
        if tp is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if tp is int and isinstance(value, float):
            return _whole(value)
        if tp is str and isinstance(value, (int, float)):
            return str(value)
        expected = dict if get_origin(tp) is dict else tp
        if get_origin(expected) is Literal:
            if value in get_args(expected):
                return value
            raise ValueError(f"expected one of {', '.join(map(str, get_args(expected)))}")
        if isinstance(expected, type) and isinstance(value, expected):
            if expected is int and isinstance(value, bool):
                raise ValueError("expected a number")
            return value
        raise ValueError(f"expected {getattr(expected, '__name__', expected)}")
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{where}: {name} = {value!r}: {e}") from None


def add_flags(
    parser: argparse._ActionsContainer, config: type, owner: str, owners: dict[str, str]
) -> None:
    """Add one option for every field of `config`.

    Args:
        parser: an argparse parser or group.
        config: the dataclass.
        owner: who declares these flags, for the error about two owners ("--task translation").
        owners: flag -> owner of all flags added so far; updated.

    Raises:
        ConfigError: another owner declares one of the flags already.
    """
    hints = field_types(config)
    for field in dataclasses.fields(config):
        names = flag_names(field)
        for name in names:
            if name in owners:
                raise ConfigError(f"{name} is declared by {owners[name]} and again by {owner}")
            owners[name] = owner
        info = info_of(field)
        if not info.typed:
            continue
        tp, _ = _optional(hints[field.name])
        options: dict[str, Any] = {
            "help": _help_text(field, info),
            "default": argparse.SUPPRESS,
        }
        if info.positional:
            parser.add_argument(
                field.name, nargs="?", metavar=info.metavar or field.name.upper(), **options
            )
            if len(names) > 1:
                parser.add_argument(*names[1:], dest=field.name, **options)
            continue
        options["dest"] = field.name
        if tp is bool and not default_of(field) and info.const is _UNSET:
            parser.add_argument(*names, action="store_true", **options)
            continue
        convert = converter(tp)
        if info.choices is not None:
            convert = _literal(info.choices)
        options["type"] = _argparse_type(convert)
        options["metavar"] = info.metavar or _metavar(tp, info.choices)
        if info.const is not _UNSET:
            options.update(nargs="?", const=info.const)
        elif tp is bool:
            # fairseq turns a flag that defaults to True off when it is typed bare.
            options.update(nargs="?", const=False)
        parser.add_argument(*names, **options)


def _argparse_type(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def typed(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, TypeError) as e:
            raise argparse.ArgumentTypeError(f"{text!r}: {e}") from None

    return typed


def _help_text(field: dataclasses.Field[Any], info: FlagInfo) -> str:
    default = default_of(field)
    if default is None or default is False or info.positional:
        text = info.help
    else:
        text = f"{info.help} (default: {render(default)})"
    return text.replace("%", "%%")


def _metavar(tp: Any, choices: tuple[str, ...] | None) -> str:
    if choices is not None:
        return "{" + ",".join(choices) + "}"
    if get_origin(tp) is Literal:
        return "{" + ",".join(str(a) for a in get_args(tp)) + "}"
    if get_origin(tp) is tuple:
        return f"{get_args(tp)[0].__name__.upper()},…"
    if get_origin(tp) is dict or tp is dict:
        return "JSON"
    return {bool: "True|False", int: "N", float: "X", str: "STR"}.get(tp, "VALUE")


def render(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, tuple):
        return ",".join(render(v) for v in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value)


def to_argv(config: Any) -> list[str]:
    """The command-line words that set every field of `config` that differs from its default."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == default_of(field) or value is None or not info_of(field).typed:
            continue
        if info_of(field).positional:
            words.insert(0, render(value))
            continue
        name = flag_names(field)[0]
        if value is True and info_of(field).const is _UNSET:
            words.append(name)
        else:
            words.append(f"{name}={render(value)}")
    return words
