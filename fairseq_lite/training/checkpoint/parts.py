"""The files of one checkpoint, and the state each of them holds.

A checkpoint is one file, or one a part: what a backend calls the main part is `checkpoint_last.pt`
itself, a part called `shard0` is `checkpoint_last-shard0.pt`. Every file carries the whole header
(configuration, counters), so any of them says what the run was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.api import MAIN_PART, Part, PartReader
from fairseq_lite.training.checkpoint import store

# The one key of ours in a checkpoint; fairseq's loader passes over it.
OWN_KEY = "fairseq_lite"

# fairseq's keys in `extra_state`: the moving average of the weights, and its float32 form with
# --ema-fp32, where the first one is half precision.
AVERAGE_KEY = "ema"
WIDE_AVERAGE_KEY = "ema_fp32_params"


def part_path(path: Path, part: str) -> Path:
    """The file of a part of the checkpoint called `path`."""
    return path if part == MAIN_PART else path.with_name(f"{path.stem}-{part}{path.suffix}")


def part_files(path: Path) -> dict[str, Path]:
    """The parts of a checkpoint that exist, by name, sorted by number where they end in one."""
    found = {MAIN_PART: path} if path.is_file() else {}
    pattern = re.compile(
        re.escape(path.stem) + r"-(?P<part>[A-Za-z_]+\d+)" + re.escape(path.suffix)
    )
    if path.parent.is_dir():
        names = sorted(p.name for p in path.parent.iterdir())
        for match in filter(None, map(pattern.fullmatch, names)):
            found[match.group("part")] = path.with_name(match.group(0))
    return dict(sorted(found.items(), key=lambda item: (item[0] != MAIN_PART, *_number(item[0]))))


def _number(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)(\d+)", name)
    return (match.group(1), int(match.group(2))) if match else (name, -1)


class CheckpointFiles(PartReader):
    """The parts of a checkpoint on disk.

    Args:
        path: the checkpoint's main name.
        loaded: states that were read already, by part; each is given out once and then forgotten,
            so that the weights are not held twice.
    """

    def __init__(self, path: Path, loaded: Mapping[str, dict[str, Any]] | None = None) -> None:
        self._path = path
        self._loaded = dict(loaded or {})
        self._manifests: dict[str, Mapping[str, Any]] = {}

    def names(self) -> tuple[str, ...]:
        """The names of all parts."""
        return tuple(part_files(self._path))

    def manifest(self, name: str) -> Mapping[str, Any]:
        """The manifest of one part."""
        if name not in self._manifests:
            self._loaded.setdefault(name, self._load(name))
            self._manifests[name] = _manifest(self._loaded[name])
        return self._manifests[name]

    def read(self, name: str) -> Part:
        """One part, its tensors on the CPU.

        Raises:
            CheckpointError: the part is missing or damaged.
        """
        state = self._loaded.pop(name) if name in self._loaded else self._load(name)
        return Part(
            model_of(state, self._path),
            state.get("last_optimizer_state"),
            average_of(state),
            _manifest(state),
        )

    def _load(self, name: str) -> dict[str, Any]:
        return store.load(part_path(self._path, name))


def model_of(state: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """The weights of a loaded checkpoint.

    Raises:
        CheckpointError: it has none.
    """
    model = state.get("model")
    if not isinstance(model, Mapping) or not model:
        raise CheckpointError(f"{path}: holds no model weights")
    return model


def average_of(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The moving average in a loaded checkpoint: float32 where fairseq kept it so beside a half."""
    extra = state.get("extra_state")
    if isinstance(extra, Mapping) and isinstance(extra.get(AVERAGE_KEY), Mapping):
        average = dict(extra[AVERAGE_KEY])
        wide = extra.get(WIDE_AVERAGE_KEY) or {}
        return {name: wide.get(name, tensor) for name, tensor in average.items()}
    # Where this project kept it at first.
    older = (own(state).get("extra") or {}).get("ema")
    if not isinstance(older, Mapping):
        return None
    return {name: tensor for name, tensor in older.items() if name != "_since"}


def own(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What we keep beyond fairseq's keys; empty for a file of fairseq's."""
    found = state.get(OWN_KEY)
    return found if isinstance(found, Mapping) else {}


def _manifest(state: Mapping[str, Any]) -> Mapping[str, Any]:
    found = own(state).get("manifest")
    return found if isinstance(found, Mapping) else {}
