"""One parse in three visible passes: plugins, selectors, then everything.

1. `--user-dir` and `--config` only; the plugin is imported, so its names exist.
2. The selectors (`--task`, `--arch`, …) only; each names an entry of a registry.
3. One strict parser made of the shared sections and the chosen entries' configs.

Precedence: dataclass default < preset < YAML < command line, even when the typed value equals the
default. The result is one frozen `RunConfig`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from fairseq_lite import __version__
from fairseq_lite.config import core, serial
from fairseq_lite.config.commands import COMMANDS, Command, Selector
from fairseq_lite.config.fairseq_flags import (
    COMING,
    FAIRSEQ_FLAGS,
    FORMER,
    IDLE,
    NO_EFFECT,
    REFUSED,
)
from fairseq_lite.config.flags import (
    Parser,
    add_flags,
    coerce,
    default_of,
    flag_names,
    info_of,
)
from fairseq_lite.config.idle import without_effect
from fairseq_lite.errors import ConfigError
from fairseq_lite.plugins import import_user_dir
from fairseq_lite.registry import Entry, NoConfig, Registry, near

logger = logging.getLogger(__name__)


@runtime_checkable
class ChecksTyped(Protocol):
    """A configuration that refuses what only a command line can get wrong, not a stored value."""

    def check_typed(self, names: Collection[str]) -> None:
        """Look at the fields that were typed.

        Raises:
            ConfigError: one of them cannot be meant.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Chosen:
    selector: Selector
    entry: Entry


def parse(
    command_name: str, argv: Sequence[str], registries: Mapping[str, Registry]
) -> core.RunConfig:
    """Read a command line.

    Args:
        command_name: a key of `COMMANDS`, for example "flite-train".
        argv: the words after the command's name.
        registries: section name -> registry, from `builtins.load_builtins()`.

    Raises:
        ConfigError: an unknown or contradictory flag; one line that says what to type.
        SystemExit: for `--help` and `--version`.
    """
    command = COMMANDS[command_name]
    argv = _with_suffix_joined(argv)
    yaml_values = _first_pass(command, argv)
    chosen = _second_pass(command, argv, yaml_values, registries)
    return _third_pass(command, argv, yaml_values, chosen, registries)


def _with_suffix_joined(argv: Sequence[str]) -> list[str]:
    """`--checkpoint-suffix -shard0` as one word: argparse would take the value for a flag."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] == "--checkpoint-suffix" and word.startswith("-"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _first_pass(command: Command, argv: list[str]) -> dict[str, Any]:
    parser = Parser(command.name, add_help=False)
    parser.add_argument("--user-dir")
    parser.add_argument("--config")
    args, _ = parser.parse_known_args(argv)
    values = serial.flatten(serial.load_yaml(args.config), args.config) if args.config else {}
    user_dir = args.user_dir or values.get("user_dir")
    if user_dir:
        import_user_dir(user_dir)
    return values


def _second_pass(
    command: Command,
    argv: list[str],
    yaml_values: Mapping[str, Any],
    registries: Mapping[str, Registry],
) -> list[_Chosen]:
    parser = Parser(command.name, add_help=False)
    for selector in command.selectors:
        parser.add_argument(selector.flag, *selector.aliases, dest=selector.section)
    args, _ = parser.parse_known_args(argv)
    wants_help = bool({"-h", "--help", "--version"} & set(argv))
    chosen = []
    for selector in command.selectors:
        name = getattr(args, selector.section)
        if name is None:
            name = yaml_values.get(f"{selector.section}._name", selector.default)
        if name is not None:
            chosen.append(_Chosen(selector, registries[selector.section].get(name)))
        elif selector.required and not wants_help:
            known = ", ".join(registries[selector.section].names())
            raise ConfigError(f"{selector.flag} is needed; one of: {known}")
    return chosen


def _third_pass(
    command: Command,
    argv: list[str],
    yaml_values: dict[str, Any],
    chosen: list[_Chosen],
    registries: Mapping[str, Registry],
) -> core.RunConfig:
    parser, inert = _build_parser(command, chosen, registries)
    namespace, unknown = parser.parse_known_args(argv)
    _refuse_unknown(command, unknown, chosen, registries)
    typed = vars(namespace)
    _settle_inert(command, typed, inert)

    sections: dict[str, Any] = {}
    used: set[str] = {"user_dir"}
    for name, config in command.sections.items():
        sections[name] = _build(config, None, typed, yaml_values, used, name)
    for each in chosen:
        section = each.selector.section
        used.add(f"{section}._name")
        built = _build(each.entry.config, each.entry, typed, yaml_values, used, section)
        if isinstance(built, ChecksTyped):
            built.check_typed(typed.keys())
        sections[section] = core.Choice(each.entry.name, built)
    for key in yaml_values:
        if key not in used and not serial.is_foreign(key, command, chosen_sections(chosen)):
            known = {f.name for c in command.sections.values() for f in dataclasses.fields(c)}
            known |= {f.name for c in chosen for f in dataclasses.fields(c.entry.config)}
            raise ConfigError(f"--config: unknown key {key!r}" + near(key.split(".")[-1], known))
    run = core.RunConfig(command=command.name, **sections)
    for name, why in without_effect(command.name, typed, _values(run)):
        logger.warning("%s has no effect: %s", name, why)
    return run


def _values(run: core.RunConfig) -> dict[str, Any]:
    """Every field of the run's sections and entries."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(run):
        section = getattr(run, field.name)
        config = section.config if isinstance(section, core.Choice) else section
        if dataclasses.is_dataclass(config):
            values.update(vars(config))
    return values


def chosen_sections(chosen: list[_Chosen]) -> set[str]:
    """The sections of the entries that were chosen."""
    return {c.selector.section for c in chosen}


def _build(
    config: type,
    entry: Entry | None,
    typed: Mapping[str, Any],
    yaml_values: Mapping[str, Any],
    used: set[str],
    section: str,
) -> Any:
    explicit: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        for key in (field.name, f"{section}.{field.name}"):
            if key in yaml_values:
                used.add(key)
                where = f"--config {section}"
                explicit[field.name] = coerce(config, field.name, yaml_values[key], where)
        if field.name in typed:
            explicit[field.name] = typed[field.name]
    values = {**(entry.preset_values(explicit) if entry else {}), **explicit}
    for field in dataclasses.fields(config):
        if info_of(field).positional and not values.get(field.name, default_of(field)):
            raise ConfigError(
                f"the {field.name} argument is missing: type it first, for example data-bin/…"
            )
    return config(**values)


def _build_parser(
    command: Command, chosen: list[_Chosen], registries: Mapping[str, Registry]
) -> tuple[Parser, dict[str, str]]:
    """The strict parser, and dest -> flag of the flags that are known but own no field."""
    parser = Parser(
        command.name,
        description=command.about,
        epilog="Flags of other tasks, architectures, … show once they are chosen.",
    )
    parser.add_argument("--version", action="version", version=f"fairseq-lite {__version__}")
    parser.add_argument(
        "--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="values from a YAML file"
    )
    owners = {"--help": command.name, "-h": command.name, "--config": command.name}
    group = parser.add_argument_group("what to use")
    for selector in command.selectors:
        names = (selector.flag, *selector.aliases)
        owners.update(dict.fromkeys(names, command.name))
        group.add_argument(
            *names,
            dest="selector:" + selector.section,
            metavar="NAME",
            default=argparse.SUPPRESS,
            help=_selector_help(selector, registries[selector.section]),
        )
    for name, config in command.sections.items():
        add_flags(parser.add_argument_group(name), config, f"the {name} section", owners)
    for each in chosen:
        if dataclasses.fields(each.entry.config):
            owner = f"{each.selector.flag} {each.entry.name}"
            add_flags(parser.add_argument_group(owner), each.entry.config, owner, owners)
    return parser, _add_inert(parser, command, owners)


def _selector_help(selector: Selector, registry: Registry) -> str:
    names = registry.names()
    shown = ", ".join(names) if len(names) <= 16 else f"{', '.join(names[:14])}, …"
    default = f" (default: {selector.default})" if selector.default else ""
    return f"{selector.help}: {shown}{default}".replace("%", "%%")


def _add_inert(parser: Parser, command: Command, owners: Mapping[str, str]) -> dict[str, str]:
    """Hidden options for fairseq's flags that no section or chosen entry owns."""
    idle = IDLE.get(command.fairseq_name, frozenset())
    inert: dict[str, str] = {}
    for name, row in FAIRSEQ_FLAGS.items():
        if name != row.names[0]:
            continue
        spare = [n for n in row.names if n not in owners]
        coming = name in COMING and command.fairseq_name in row.commands
        settled = name in REFUSED or name in NO_EFFECT or coming or name in idle
        if not settled or len(spare) < len(row.names):
            continue
        dest = "fairseq:" + name
        inert[dest] = name
        options: dict[str, Any] = {
            "dest": dest,
            "help": argparse.SUPPRESS,
            "default": argparse.SUPPRESS,
        }
        if row.kind == "switch":
            parser.add_argument(*spare, action="store_true", **options)
        else:
            nargs: dict[str, Any] = {"nargs": "?"} if row.kind == "optional" else {}
            parser.add_argument(*spare, **nargs, **options)
    return inert


def _settle_inert(command: Command, typed: dict[str, Any], inert: Mapping[str, str]) -> None:
    for dest, name in inert.items():
        if dest not in typed:
            continue
        if name in REFUSED:
            raise ConfigError(f"{name}: {REFUSED[name]}")
        if name in COMING and name not in IDLE.get(command.fairseq_name, ()):
            raise ConfigError(f"{name}: not there yet: {COMING[name]}")
        why = NO_EFFECT.get(name, f"{command.name} does not use it")
        logger.warning("%s has no effect: %s", name, why)


def _other_owners(
    chosen: list[_Chosen], registries: Mapping[str, Registry]
) -> dict[str, list[str]]:
    """Flag -> the entries (of any registry) that would own it, chosen ones left out."""
    taken = {(c.selector.section, c.entry.name) for c in chosen}
    owners: dict[str, list[str]] = {}
    for section, registry in registries.items():
        for name in registry.names():
            entry = registry.get(name)
            if (section, name) in taken or entry.of is not None:
                continue
            for field in dataclasses.fields(entry.config):
                for flag_name in flag_names(field):
                    owners.setdefault(flag_name, []).append(f"{registry.flag} {name}")
    return owners


def _refuse_unknown(
    command: Command,
    unknown: list[str],
    chosen: list[_Chosen],
    registries: Mapping[str, Registry],
) -> None:
    if not unknown:
        return
    word = next((w for w in unknown if w.startswith("-")), unknown[0])
    name = word.split("=")[0]
    owners = _other_owners(chosen, registries).get(name)
    before = f"in fairseq's older recipes: {FORMER[name]}" if name in FORMER else ""
    if owners:
        flag = owners[0].split()[0]
        yours = [c.entry.name for c in chosen if c.selector.flag == flag]
        choice = f"you chose {flag} {yours[0]}" if yours else f"you chose no {flag}"
        also = f"; {before}" if before else ""
        raise ConfigError(f"{name} belongs to {' or '.join(owners[:3])}; {choice}{also}")
    if before:
        raise ConfigError(f"{name}: {before}")
    if not name.startswith("-"):
        raise ConfigError(f"unexpected argument {name!r}; flags start with --")
    elsewhere = _commands_with(name, registries)
    if elsewhere:
        raise ConfigError(f"{name} is no flag of {command.name}, but of {', '.join(elsewhere)}")
    known = set(FAIRSEQ_FLAGS)
    for each in chosen:
        known |= {f for fld in dataclasses.fields(each.entry.config) for f in flag_names(fld)}
    raise ConfigError(f"unknown flag {name}" + near(name, known))


def _commands_with(name: str, registries: Mapping[str, Registry]) -> list[str]:
    """The commands that have this flag, of those all of whose entries are known here."""
    return [
        command.name
        for command in COMMANDS.values()
        if all(s.section in registries for s in command.selectors)
        and name in owned_flags(command.name, registries)
    ]


def owned_flags(command_name: str, registries: Mapping[str, Registry]) -> frozenset[str]:
    """Every spelling of every flag that a command, or an entry it can choose, really uses."""
    command = COMMANDS[command_name]
    names = {n for s in command.selectors for n in (s.flag, *s.aliases)}
    configs = list(command.sections.values())
    for selector in command.selectors:
        registry = registries[selector.section]
        configs += [registry.get(n).config for n in registry.names()]
    for config in configs:
        names |= {n for f in dataclasses.fields(config) for n in flag_names(f)}
    return frozenset(names)


def describe_flags(command_name: str, registries: Mapping[str, Registry]) -> list[str]:
    """Every flag of a command and of its registries' entries with its default, one a line.

    The golden file of the tests is made of these lines, so a renamed flag or a changed default is a
    one-line difference in review.
    """
    command = COMMANDS[command_name]
    lines = [f"{command.name} {s.flag} = {s.default}" for s in command.selectors]
    for section, config in command.sections.items():
        lines += _describe(f"{command.name} [{section}]", config)
    for selector in command.selectors:
        registry = registries[selector.section]
        for name in registry.names():
            entry = registry.get(name)
            if entry.of is None and entry.config is not NoConfig:
                lines += _describe(f"{command.name} [{selector.flag} {name}]", entry.config)
    return lines


def _describe(owner: str, config: type) -> list[str]:
    return [
        f"{owner} {' '.join(names)} = {default_of(f)!r}"
        for f in dataclasses.fields(config)
        if (names := flag_names(f))
    ]
