"""Configurations as plain values: to YAML and back, and into a checkpoint's `cfg`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fairseq_lite.config import core
from fairseq_lite.config.flags import coerce
from fairseq_lite.errors import ConfigError
from fairseq_lite.registry import NoConfig, Registry

if TYPE_CHECKING:
    from fairseq_lite.config.commands import Command


def plain(value: Any) -> Any:
    """A value as None, bool, int, float, str, list or dict only."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def to_plain(run: core.RunConfig) -> dict[str, Any]:
    """A run as nested plain values; the entry chosen for a section stands under `_name`."""
    result: dict[str, Any] = {"command": run.command}
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        if isinstance(value, core.Choice):
            if value.name is not None:
                result[field.name] = choice_to_plain(value)
        elif dataclasses.is_dataclass(value):
            result[field.name] = plain(value)
    return result


def choice_to_plain(choice: core.Choice) -> dict[str, Any]:
    """An entry's fields as plain values, its name under `_name`; nothing of an empty choice."""
    return {} if choice.name is None else {"_name": choice.name, **plain(choice.config)}


def choice_from_plain(registry: Registry, values: Mapping[str, Any]) -> core.Choice:
    """A `Choice` from its plain form.

    Raises:
        ConfigError: an unknown name or field, or a value of another type.
    """
    name = values.get("_name")
    if name is None:
        return core.Choice(None, NoConfig())
    config = registry.get(name).config
    return core.Choice(name, section_from_plain(config, values, f"{registry.kind} {name}"))


def section_from_plain(config: type, values: Mapping[str, Any], where: str) -> Any:
    """A config dataclass from its plain form; missing fields keep their defaults."""
    known = {f.name for f in dataclasses.fields(config)}
    unknown = sorted(set(values) - known - {"_name"})
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}")
    return config(**{k: coerce(config, k, v, where) for k, v in values.items() if k in known})


def from_plain(values: Mapping[str, Any], registries: Mapping[str, Registry]) -> core.RunConfig:
    """The run whose `to_plain` is `values`.

    Raises:
        ConfigError: an unknown section, entry or field, or a value of another type.
    """
    sections: dict[str, Any] = {}
    defaults = core.RunConfig(command=str(values.get("command", "")))
    optional = {"preprocess": core.PreprocessConfig, "score": core.ScoreConfig}
    for name, value in values.items():
        if name == "command":
            continue
        if name in registries:
            sections[name] = choice_from_plain(registries[name], value)
        elif name in optional:
            sections[name] = section_from_plain(optional[name], value, name)
        elif dataclasses.is_dataclass(getattr(defaults, name, None)):
            sections[name] = section_from_plain(type(getattr(defaults, name)), value, name)
        else:
            raise ConfigError(f"unknown section {name!r} of a configuration")
    return dataclasses.replace(defaults, **sections)


def dump_yaml(run: core.RunConfig) -> str:
    """The effective configuration as YAML text, ready for `--config`."""
    head = f"# The effective configuration; `{run.command} --config THIS` reruns it.\n"
    return head + str(yaml.safe_dump(to_plain(run), sort_keys=False, allow_unicode=True))


def save_yaml(run: core.RunConfig, path: str | Path) -> None:
    """Write the effective configuration to a file."""
    Path(path).write_text(dump_yaml(run), encoding="utf-8")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--config {path}: cannot be read: {e}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(e).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected `flag: value` lines or sections of them")
    return {str(k): v for k, v in values.items()}


SECTIONS = tuple(f.name for f in dataclasses.fields(core.RunConfig) if f.name != "command")


def flatten(values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Sections or flat flags to one mapping: `section.field` and `flag_name` keys.

    A selector (`task: translation`, or `task: {_name: translation, …}`) becomes `task._name`.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = key.lstrip("-").replace("-", "_")
        section = "model" if name == "arch" else name
        if name == "command":
            continue
        if section in SECTIONS and isinstance(value, dict):
            flat.update({f"{section}.{k.replace('-', '_')}": v for k, v in value.items()})
        elif section in SECTIONS:
            flat[f"{section}._name"] = value
        else:
            flat[name] = value
    if flat.get("common.user_dir"):
        flat["user_dir"] = flat.pop("common.user_dir")
    return flat


def is_foreign(key: str, command: Command, chosen: set[str]) -> bool:
    """Whether a flattened key belongs to a section that `command` does not take."""
    section = key.partition(".")[0]
    return "." in key and section in SECTIONS and section not in {*command.sections, *chosen}
