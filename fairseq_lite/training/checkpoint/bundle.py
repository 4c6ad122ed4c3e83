"""Files that travel inside a checkpoint: dictionaries and the models of tokenizers and subwords.

One `.pt` alone is enough to translate on another machine. The files are stored compressed, as byte
tensors, under our own key; fairseq's loader passes over it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.data.text.recorded import carried
from fairseq_lite.errors import CheckpointError
from fairseq_lite.training.checkpoint import parts

# Sections whose text fields may name a file that belongs to the model.
_SECTIONS = ("bpe", "tokenizer")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The files of a trained model.

    Attributes:
        files: name -> content; a name may have a folder before it, `folder/name`.
        fields: `section.field` -> the name of the file or folder that field pointed to.
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        """Plain values and byte tensors."""
        packed = {name: zlib.compress(data) for name, data in self.files.items()}
        return {
            "files": {
                name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
                for name, data in packed.items()
            },
            "fields": dict(self.fields),
        }

    def write(self, folder: Path) -> None:
        """Put the files into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def collect(run: RunConfig, task_files: Mapping[str, Path]) -> Bundle:
    """Read the files that belong to a run.

    Args:
        run: its `bpe` and `tokenizer` entries are searched for fields that name a file.
        task_files: the task's: name -> where it is now.

    Raises:
        CheckpointError: one cannot be read.
    """
    files: dict[str, bytes] = {name: _read(path) for name, path in task_files.items()}
    fields: dict[str, str] = {}
    for section in _SECTIONS:
        for each in carried(section, getattr(run, section)):
            found = {name: _read(path) for name, path in each.files.items()}
            if each.name in found:
                name = _free_name(each.name, files, found[each.name])
                found = {name: found[each.name]}
            else:
                name = each.name  # a folder, called like its flag
            files.update(found)
            fields[f"{section}.{each.field}"] = name
    return Bundle(files, fields)


def _read(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise CheckpointError(
            f"{path}: belongs into the checkpoint and cannot be read: {e.strerror or e}"
        ) from e


def _free_name(name: str, files: Mapping[str, bytes], data: bytes) -> str:
    candidate, number = name, 1
    while candidate in files and files[candidate] != data:
        candidate, number = f"{number}.{name}", number + 1
    return candidate


def read(state: Mapping[str, Any], path: str | Path) -> Bundle:
    """The files inside a loaded checkpoint; none for a file of fairseq's.

    Raises:
        CheckpointError: a name that would leave its folder, or a content that is damaged.
    """
    stored = parts.own(state).get("bundle")
    if not isinstance(stored, Mapping):
        return Bundle()
    files: dict[str, bytes] = {}
    for name, data in stored.get("files", {}).items():
        if not _stays_inside(name):
            raise CheckpointError(f"{path}: holds a file with the name {name!r}: not unpacked")
        try:
            files[name] = zlib.decompress(data.numpy().tobytes())
        except (zlib.error, AttributeError) as e:
            raise CheckpointError(f"{path}: its file {name} is damaged: {e}") from e
    known = {*files, *(name.partition("/")[0] for name in files)}
    fields = {str(k): str(v) for k, v in stored.get("fields", {}).items() if v in known}
    return Bundle(files, fields)


def _stays_inside(name: object) -> bool:
    """Whether a name leads into the folder: it comes from a file that somebody may have sent."""
    parts = name.split("/") if isinstance(name, str) else [""]
    return not any(part in ("", ".", "..") or "\\" in part for part in parts)


def unpack(bundle: Bundle) -> tempfile.TemporaryDirectory[str]:
    """Write the files to a temporary folder, which lives as long as the returned object."""
    folder = tempfile.TemporaryDirectory(prefix="flite-")
    bundle.write(Path(folder.name))
    return folder


def repoint(choice: Choice, section: str, bundle: Bundle, folder: Path) -> Choice:
    """An entry's fields that named a bundled file, pointing to its copy in `folder`.

    A file that still is where it was is left alone only if the bundle has no copy of it.
    """
    changed = {
        field: str(folder / name)
        for key, name in bundle.fields.items()
        for where, _, field in [key.partition(".")]
        if where == section
    }
    if not changed or choice.name is None:
        return choice
    return dataclasses.replace(choice, config=dataclasses.replace(choice.config, **changed))
