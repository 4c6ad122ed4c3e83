"""The shards of a checkpoint as one: which numbers are where, and whole tensors made of them.

A shard is a `Part` that holds a `Span` of every tensor. Its manifest says of which::

    {"world_size": 2, "shard": 0, "save": "5f0c…-30", "tensors": {
        "model.decoder.layers.0.fc1.weight":
            {"shape": [16, 8], "dtype": "float32", "offset": 0, "sha256": "…"},
        "optimizer.decoder.layers.0.fc1.weight.exp_avg": {…}, "average.…": {…}}}

`offset` counts numbers, row by row; `save` is the same in all shards of one checkpoint. Names of a
shared tensor share their numbers in each file. Shards that fairseq wrote with fairscale (its flat
parameters) are read here too.

Nothing here needs the processes that wrote the shards, or torch's distributed tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.api import MAIN_PART, Part, PartReader
from fairseq_lite.parallel.shards.flat_shards import FLAT, flat_shards
from fairseq_lite.parallel.shards.spans import (
    Holding,
    NamedState,
    Span,
    check_optimized,
    cut_flat,
    digest,
    dtype_name,
    dtype_of,
)
from fairseq_lite.parallel.shards.stored import Allocate, Stored


def shard_name(number: int) -> str:
    """The name of a shard's part."""
    return f"shard{number}"


def shard_number(name: str) -> int | None:
    """The number in a shard's name; None for a part of another kind."""
    match = re.fullmatch(r"shard(\d+)", name)
    return int(match.group(1)) if match else None


# -- writing ------------------------------------------------------------------------------------


def to_part(held: Holding, manifest: Mapping[str, Any]) -> Part:
    """A shard: the spans one rank holds, and the table that says where they belong."""
    tensors: dict[str, dict[str, Any]] = {}

    def put(key: str, value: Any) -> Any:
        if not isinstance(value, Span):
            return value
        tensors[key] = {
            "shape": list(value.shape),
            "dtype": dtype_name(value.values.dtype),
            "offset": value.start,
        }
        return value.in_shape()

    laid = held.map(put)
    optimizer = None
    if laid.optimizer is not None:
        optimizer = {
            "state": laid.optimizer.entries,
            "hyper": dict(laid.optimizer.hyper),
            "names": list(laid.optimizer.names),
        }
    return Part(laid.weights, optimizer, laid.average, {**manifest, "tensors": tensors})


def held_by(part: Part) -> Holding:
    """A shard's content, its tensors as they are."""
    optimizer = None
    if part.optimizer is not None and "names" in part.optimizer:
        optimizer = NamedState(
            list(part.optimizer["names"]), part.optimizer["state"], part.optimizer["hyper"]
        )
    return Holding(part.model, optimizer, part.average)


def tensors_of(part: Part) -> dict[str, Tensor]:
    """A shard's tensors under their keys in the manifest."""
    return held_by(part).every(Tensor)


def sealed(part: Part) -> Mapping[str, Any]:
    """A shard's manifest with the hash of every tensor, which must be on the CPU."""
    digests: dict[tuple[Any, ...], str] = {}
    tensors = {key: dict(entry) for key, entry in part.manifest["tensors"].items()}
    for key, tensor in tensors_of(part).items():
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype)  # a shared one is hashed once
        if same not in digests:
            digests[same] = digest(tensor)
        tensors[key]["sha256"] = digests[same]
    return {**part.manifest, "tensors": tensors}


def verify(part: Part, where: str) -> None:
    """Compare every tensor of a shard with its hash; fairseq's shards have none.

    Raises:
        CheckpointError: one differs, or has none.
    """
    known: Mapping[str, Any] = part.manifest.get("tensors") or {}
    for key, tensor in tensors_of(part).items() if known else ():
        if digest(tensor) != (known.get(key) or {}).get("sha256"):
            raise CheckpointError(
                f"{where}: {_bare(key)} is damaged: its hash is not the one it was written with"
            )


# -- reading ------------------------------------------------------------------------------------


def is_sharded(parts: PartReader) -> bool:
    """Whether a checkpoint has shards and no file of its own, which would come first."""
    names = parts.names()
    return MAIN_PART not in names and any(shard_number(name) is not None for name in names)


def is_own(parts: PartReader) -> bool:
    """Whether a checkpoint is shards that this project wrote: with a table of their tensors."""
    if not is_sharded(parts):
        return False
    return "tensors" in parts.manifest(shard_name(_present(parts)[0]))


def _present(parts: PartReader) -> list[int]:
    return sorted(n for n in map(shard_number, parts.names()) if n is not None)


def open_shards(parts: PartReader) -> Holding:
    """Open all shards and find every tensor in them: what they hold, as `Stored`.

    Raises:
        CheckpointError: naming the file: a shard is missing or damaged, belongs to another save or
            to another number of ranks, or rows of a tensor are missing.
    """
    present = _present(parts)
    first = parts.read(shard_name(present[0]))
    if FLAT in first.manifest:
        return flat_shards(parts, present)
    if "tensors" not in first.manifest:
        raise CheckpointError(
            f"{parts.where(shard_name(present[0]))}: has neither a table of its tensors nor "
            "fairseq's fsdp_metadata: it cannot be joined with other shards"
        )
    count = _count(first, parts.where(shard_name(present[0])))
    opened = [_open(parts, number, first, count) for number in range(count)]
    return _joined(parts, opened)


def _count(part: Part, where: str) -> int:
    count = part.manifest.get("world_size")
    if not isinstance(count, int) or count < 1:
        raise CheckpointError(f"{where}: does not say how many shards its checkpoint has")
    return count


def _open(parts: PartReader, number: int, first: Part, count: int) -> Part:
    """One shard, if it belongs to the others.

    Raises:
        CheckpointError: it is missing, or of another save.
    """
    name = shard_name(number)
    where = parts.where(name)
    if name not in parts.names():
        raise CheckpointError(f"{where}: is missing: the checkpoint was written as {count} shards")
    part = parts.read(name)
    mine, others = part.manifest, first.manifest
    if mine.get("save") != others.get("save") or mine.get("world_size") != count:
        raise CheckpointError(
            f"{where}: is a shard of another save ({mine.get('save')}, {mine.get('world_size')} "
            f"shards) than the first ({others.get('save')}, {count} shards): two checkpoints are "
            "mixed"
        )
    if mine.get("shard") != number:
        raise CheckpointError(f"{where}: holds shard {mine.get('shard')}: it has been renamed")
    return part


def _joined(parts: PartReader, opened: list[Part]) -> Holding:
    held = [held_by(part) for part in opened]
    for number, each in enumerate(held):
        for name in each.weights.keys() ^ held[0].weights.keys():
            raise CheckpointError(
                f"{parts.where(shard_name(number))}: has other tensors than shard 0: {name}"
            )
    found: dict[str, Stored] = {}
    for number, part in enumerate(opened):
        where = parts.where(shard_name(number))
        table = part.manifest["tensors"]
        for key, tensor in tensors_of(part).items():
            span, dtype = _span(table.get(key), tensor, f"{where}: {_bare(key)}")
            stored = found.setdefault(key, Stored(span.shape, dtype))
            if (stored.shape, stored.dtype) != (span.shape, dtype):
                raise CheckpointError(f"{where}: {_bare(key)} is another than in other shards")
            stored.spans.append(span)
    for key, stored in found.items():
        stored.put_in_order(f"{parts.where(shard_name(0))}: {_bare(key)}")
    everything = replace(held[0], optimizer=_joint_state([h.optimizer for h in held]))
    return everything.map(lambda key, value: found.get(key, value))


def _joint_state(states: Sequence[NamedState | None]) -> NamedState | None:
    """A rank without rows of a parameter may know nothing of it: what any of them knows."""
    if states[0] is None:
        return None
    entries: dict[str, dict[str, Any]] = {}
    for state in states:
        for name, entry in (state.entries if state is not None else {}).items():
            entries[name] = {**entry, **entries.get(name, {})}
    return replace(states[0], entries=entries)


def _bare(key: str) -> str:
    return key.partition(".")[2]


def _span(entry: Any, tensor: Tensor, where: str) -> tuple[Span, torch.dtype]:
    try:
        shape, start = tuple(int(n) for n in entry["shape"]), int(entry["offset"])
        dtype = dtype_of(entry["dtype"], where)
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{where} is not in the table of its shard") from e
    span = Span(shape, start, tensor.contiguous().view(-1))
    inside = span.start >= 0 and span.start + span.values.numel() <= span.total
    if not inside or dtype != tensor.dtype:
        raise CheckpointError(f"{where} is not what the table of its shard says")
    return span, dtype


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The plain way to allocate."""
    return torch.empty(shape, dtype=dtype)


def whole(parts: PartReader, *, optimizer: bool = True, allocate: Allocate = in_memory) -> Part:
    """A checkpoint in one part, whichever way it lies on the disk.

    Args:
        parts: its files.
        optimizer: whether its state is wanted, if it has to be put together.
        allocate: makes the tensors that are put together.

    Returns:
        The part; its manifest has the names of the optimizer's parameters under `names` if known.

    Raises:
        CheckpointError: a part is missing or damaged, or none holds a model.
    """
    names = parts.names()
    if MAIN_PART in names:
        return parts.read(MAIN_PART)
    if not is_sharded(parts):
        raise CheckpointError(
            f"this checkpoint has no whole model, only the parts {', '.join(names)}"
        )
    held = open_shards(parts)
    return assembled(held if optimizer else replace(held, optimizer=None), allocate)


def assembled(shards: Holding, allocate: Allocate) -> Part:
    """Whole tensors of all that shards hold; shared ones are shared again."""
    done: dict[tuple[object, ...], Tensor] = {}

    def read(key: str, value: Any) -> Any:
        if not isinstance(value, Stored):
            return value
        if value.place not in done:
            done[value.place] = value.read(allocate)
        return done[value.place]

    held = shards.map(read)
    if held.optimizer is None:
        return Part(held.weights, None, held.average)
    names = held.optimizer.names
    return Part(held.weights, held.optimizer.numbered(), held.average, {"names": names})


# -- the optimizer's state ----------------------------------------------------------------------


def check_names(part: Part, names: list[str]) -> None:
    """Refuse a whole part that was made of shards and whose optimizer had other parameters.

    Raises:
        CheckpointError: naming one of them.
    """
    if "names" in part.manifest:
        check_optimized(list(part.manifest["names"]), names)


def named(part: Part, names: list[str], shapes: Sequence[tuple[int, ...] | None]) -> NamedState:
    """The optimizer's state of a whole part by the names of its parameters.

    Args:
        part: its `optimizer` is in torch's layout; or has, as fairseq's --fp16 writes it, one flat
            tensor for all parameters.
        names: of this run's parameters, in order.
        shapes: theirs.

    Raises:
        CheckpointError: the state is of other parameters.
    """
    assert part.optimizer is not None
    groups: Sequence[Mapping[str, Any]] = part.optimizer["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    entries: Mapping[int, Mapping[str, Any]] = part.optimizer["state"]
    check_names(part, names)
    if len(numbers) == 1 and len(names) > 1:
        by_name: Sequence[Mapping[str, Any]] = cut_flat(entries.get(numbers[0], {}), shapes)
    elif len(numbers) == len(names):
        by_name = [entries.get(number, {}) for number in numbers]
    else:
        raise CheckpointError(
            f"the optimizer state is for {len(numbers)} parameters, the model has {len(names)}: "
            "use --reset-optimizer"
        )
    hyper = {key: value for key, value in groups[0].items() if key != "params"}
    return NamedState(names, {n: e for n, e in zip(names, by_name, strict=True) if e}, hyper)
