"""How the text of a data folder was segmented: `segmentation.yaml` beside its dictionary.

    # How flite-preprocess segmented this folder's text; the other commands do the same.
    format: 1
    tokenizer: {_name: moses}
    bpe: {_name: hf_tokenizer}
    files:
      bpe.hf_tokenizer: segmentation/hf_tokenizer

Only what differs from a default is written. The files that flags named are copied into the folder
`segmentation` beside it, and their paths are relative: the data folder can be moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.config.flags import default_of
from fairseq_lite.config.serial import choice_from_plain, choice_to_plain
from fairseq_lite.data.text.api import BPE, TOKENIZERS, build_bpe, build_tokenizer
from fairseq_lite.data.text.segment import Segmentation
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.registry import Registry

logger = logging.getLogger(__name__)

FILE = "segmentation.yaml"
FOLDER = "segmentation"
_FORMAT = 1
_HEAD = (
    "# How flite-preprocess segmented the text of this folder; the other commands do the same.\n"
)
_SECTIONS = {"tokenizer": TOKENIZERS, "bpe": BPE}


@dataclasses.dataclass(frozen=True)
class Carried:
    """A field of an entry that names a file or a folder which has to travel with data or a model.

    Attributes:
        field: the field.
        name: what its value is in another place: the name of the file or of the folder.
        files: name in that place -> where it is now.
    """

    field: str
    name: str
    files: Mapping[str, Path]


def carried(section: str, choice: Choice) -> list[Carried]:
    """The files an entry needs; of a folder only those it reads.

    Args:
        section: "bpe" or "tokenizer".
        choice: the entry.

    Raises:
        FliteError: the folder is not one that the entry can read.
    """
    found = []
    for field in dataclasses.fields(choice.config):
        value = getattr(choice.config, field.name)
        if not isinstance(value, str) or not value:
            continue
        place = Path(value)
        if place.is_file():
            found.append(Carried(field.name, place.name, {place.name: place}))
        elif place.is_dir():
            codec = build_bpe(choice) if section == "bpe" else build_tokenizer(choice)
            inside = [path for path in codec.files() if place in path.parents] if codec else []
            files = {f"{field.name}/{path.relative_to(place).as_posix()}": path for path in inside}
            if files:
                found.append(Carried(field.name, field.name, files))
    return found


def write(folder: Path, segmentation: Segmentation) -> None:
    """Record a segmentation in a folder, and copy its files there."""
    values: dict[str, Any] = {"format": _FORMAT}
    files: dict[str, str] = {}
    taken: set[str] = set()
    for section in _SECTIONS:
        choice: Choice = getattr(segmentation, section)
        if choice.name is None:
            continue
        plain = _typed(choice)
        for each in carried(section, choice):
            # Two flags may name files that are called alike.
            under = Path(FOLDER, each.field) if each.name in taken else Path(FOLDER)
            taken.add(each.name)
            plain.pop(each.field)
            files[f"{section}.{each.field}"] = (under / each.name).as_posix()
            for name, path in each.files.items():
                copy = folder / under / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        values[section] = plain
    if files:
        values["files"] = files
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    (folder / FILE).write_text(_HEAD + text, encoding="utf-8")


def _typed(choice: Choice) -> dict[str, Any]:
    """The fields that differ from their defaults, and the name."""
    plain = choice_to_plain(choice)
    for field in dataclasses.fields(choice.config):
        if getattr(choice.config, field.name) == default_of(field):
            del plain[field.name]
    return plain


def read(folder: str | Path) -> Segmentation | None:
    """What is recorded in a folder; None for a folder without a record, such as fairseq's.

    Raises:
        DataError: the record is damaged, of a newer version, or a file that it names is missing.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise DataError(f"{path}: cannot be read: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict) or "format" not in values:
        raise DataError(f"{path}: is not a record of flite-preprocess")
    if values["format"] != _FORMAT:
        raise DataError(
            f"{path}: has format {values['format']}, this version reads {_FORMAT}: update "
            "fairseq-lite"
        )
    try:
        files = _files(values.get("files") or {}, path)
        tokenizer, bpe = (
            choice_from_plain(registry, {**(values.get(section) or {}), **files[section]})
            for section, registry in _SECTIONS.items()
        )
    except (ConfigError, AttributeError, TypeError) as e:
        raise DataError(f"{path}: {e}") from None
    return Segmentation(tokenizer, bpe)


def _files(values: Mapping[str, str], record: Path) -> dict[str, dict[str, str]]:
    """Section -> field -> path."""
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for key, name in values.items():
        section, _, field = key.partition(".")
        relative = PurePosixPath(name)
        # A data folder may come from somebody else: what it names lies inside it.
        if section not in found or relative.is_absolute() or ".." in relative.parts:
            raise DataError(f"{record}: {key}: {name}: not a file of this folder")
        path = record.parent / relative
        if not path.exists():
            raise DataError(f"{record}: {name} is missing; copy it here, or preprocess again")
        found[section][field] = str(path)
    return found


def same(first: Segmentation, second: Segmentation) -> bool:
    """Whether two segmentations do the same, wherever their files are."""
    return all(
        _identity(section, getattr(first, section)) == _identity(section, getattr(second, section))
        for section in _SECTIONS
    )


def _identity(section: str, choice: Choice) -> dict[str, Any]:
    values = choice_to_plain(choice)
    for each in carried(section, choice):
        contents = (hashlib.sha256(path.read_bytes()).hexdigest() for path in each.files.values())
        values[each.field] = sorted(contents)
    return values


def adopt(run: RunConfig, registries: Mapping[str, Registry]) -> RunConfig:
    """The run with the segmentation that its data folder records, where none was typed.

    What is typed counts; where it contradicts the record, one line says so. The folder is the first
    one of the task's data, or for flite-preprocess that of --srcdict or --tgtdict.

    Args:
        run: as it was parsed.
        registries: section -> registry.

    Raises:
        DataError: the record is damaged.
    """
    folders = _folders(run)
    found = read(folders[0]) if folders else None
    if found is None:
        return run
    for other in folders[1:]:
        more = read(other)
        if more is None or not same(found, more):
            logger.warning("%s is not segmented as %s is (see their %s)", other, folders[0], FILE)
    tokenizer, bpe = (
        _chosen(section, getattr(run, section), getattr(found, section), folders[0])
        for section in _SECTIONS
    )
    return dataclasses.replace(run, tokenizer=tokenizer, bpe=bpe)


def _chosen(section: str, typed: Choice, recorded: Choice, folder: str) -> Choice:
    if typed.name is None:
        return recorded
    chosen = completed(typed, recorded)
    if _identity(section, chosen) != _identity(section, recorded):
        flag = _SECTIONS[section].flag
        made = f"{flag} {recorded.name}" if recorded.name else f"no {flag}"
        if recorded.name == typed.name:
            made += " of other settings"
        logger.warning(
            "%s %s counts, as it was typed; %s was made with %s", flag, typed.name, folder, made
        )
    return chosen


def completed(typed: Choice, recorded: Choice) -> Choice:
    """What was typed, the fields left at their defaults as they are recorded."""
    if typed.name != recorded.name:
        return typed
    left = {
        field.name: getattr(recorded.config, field.name)
        for field in dataclasses.fields(typed.config)
        if getattr(typed.config, field.name) == default_of(field)
    }
    return Choice(typed.name, dataclasses.replace(typed.config, **left))


def _folders(run: RunConfig) -> list[str]:
    if run.preprocess is not None:
        given = run.preprocess.srcdict or run.preprocess.tgtdict
        return [str(Path(given).parent)] if given else []
    names = {field.name for field in dataclasses.fields(run.task.config)}
    data = run.task.config.data if "data" in names else None
    return [part for part in (data or "").split(":") if part]
