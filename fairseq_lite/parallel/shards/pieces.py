"""The parts of a checkpoint as one: which numbers are where, and whole tensors made of them.

A shard is a `Part` that holds a `Span` of every tensor; of a model with experts there is a part of
all that ranks share and one of each expert, which hold whole tensors. The manifest says of what::

    {"world_size": 2, "shard": 0, "save": "5f0c…-30", "tensors": {
        "model.decoder.layers.0.fc1.weight":
            {"shape": [16, 8], "dtype": "float32", "offset": 0, "sha256": "…"},
        "optimizer.decoder.layers.0.fc1.weight.exp_avg": {…}, "average.…": {…}}}

`offset` counts numbers, row by row; `save` is the same in all parts of one checkpoint. Names of a
shared tensor share their numbers in each file. What fairseq wrote in several files is read here
too: shards of fairscale's flat parameters, and gshard's files of ranks.

Nothing here needs the processes that wrote the parts, or torch's distributed tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.api import MAIN_PART, Part, PartReader
from fairseq_lite.parallel.shards import experts
from fairseq_lite.parallel.shards.flat_shards import FLAT, flat_shards
from fairseq_lite.parallel.shards.gshard import RANKS, rank_files, rank_parts
from fairseq_lite.parallel.shards.sets import (
    described,
    expert_number,
    head,
    is_part,
    members,
    shard_number,
)
from fairseq_lite.parallel.shards.spans import (
    Holding,
    NamedState,
    Span,
    check_optimized,
    cut_flat,
    digest,
    dtype_name,
    dtype_of,
    whole_span,
)
from fairseq_lite.parallel.shards.stored import Allocate, Stored

# -- writing ------------------------------------------------------------------------------------


def to_part(held: Holding, manifest: Mapping[str, Any]) -> Part:
    """A part of several: some spans, and the table that says where they belong."""
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
    """A part's content, its tensors as they are."""
    optimizer = None
    if part.optimizer is not None and "names" in part.optimizer:
        names = list(part.optimizer["names"])
        if "num_experts" in part.manifest:
            names = experts.expanded(names, part.manifest["num_experts"])
        optimizer = NamedState(names, part.optimizer["state"], part.optimizer["hyper"])
    return Holding(part.model, optimizer, part.average)


def tensors_of(part: Part) -> dict[str, Tensor]:
    """A part's tensors under their keys in the manifest."""
    return held_by(part).every(Tensor)


def sealed(part: Part) -> Mapping[str, Any]:
    """A part's manifest with the hash of every tensor, which must be on the CPU."""
    digests: dict[tuple[Any, ...], str] = {}
    tensors = {key: dict(entry) for key, entry in part.manifest["tensors"].items()}
    for key, tensor in tensors_of(part).items():
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype)  # a shared one is hashed once
        if same not in digests:
            digests[same] = digest(tensor)
        tensors[key]["sha256"] = digests[same]
    return {**part.manifest, "tensors": tensors}


def verify(part: Part, where: str) -> None:
    """Compare every tensor of a part with its hash; fairseq's have none.

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


def is_in_parts(parts: PartReader) -> bool:
    """Whether a checkpoint has several parts and no file of its own, which would come first."""
    names = parts.names()
    return MAIN_PART not in names and any(map(is_part, names))


def _first(parts: PartReader) -> tuple[Part, str]:
    """The part that says what the whole is, and its file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    check_first(parts)
    name = head(parts.names())
    return parts.open(name), parts.where(name)


def check_first(parts: PartReader) -> None:
    """Refuse parts without the one that says what the whole is.

    Raises:
        CheckpointError: it is missing.
    """
    names = parts.names()
    if head(names) not in names:
        raise CheckpointError(
            f"{parts.where(head(names))}: is missing, and without it {parts.where(names[0])} and "
            "its like are no checkpoint"
        )


def has_tables(parts: PartReader) -> bool:
    """Whether a checkpoint is parts that this project wrote: with tables of their tensors."""
    return is_in_parts(parts) and "tensors" in _first(parts)[0].manifest


def needed(parts: PartReader) -> list[str]:
    """The names of the parts that make up a checkpoint.

    Raises:
        CheckpointError: one of them is missing, or the one that says which they are is damaged.
    """
    names = parts.names()
    if not is_in_parts(parts):
        return list(names)
    first, _ = _first(parts)
    if RANKS in first.manifest:
        return rank_files(parts, first)
    whole = members(first.manifest)
    if whole is None:
        return [name for name in names if shard_number(name) is not None]
    for name in whole:
        if name not in names:
            raise CheckpointError(
                f"{parts.where(name)}: is missing: the checkpoint was written as "
                f"{described(first.manifest)}"
            )
    return whole


def num_experts(parts: PartReader) -> int | None:
    """How many experts the layers have of a checkpoint in parts; None where it does not say."""
    count: int | None = _first(parts)[0].manifest.get("num_experts")
    return count


def verify_all(parts: PartReader) -> None:
    """Read all of the parts that make up a checkpoint and compare them with their checksums.

    A whole part is not read: it is compared when it is opened.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    if is_in_parts(parts):
        for name in needed(parts):
            parts.verify(name)


def open_parts(parts: PartReader, wanted: Collection[int] | None = None) -> Holding:
    """Open the parts of a checkpoint and find every tensor in them: what they hold, as `Stored`.

    Args:
        parts: the files.
        wanted: the experts that matter, of a checkpoint with a part for each; None: all.

    Raises:
        CheckpointError: naming the file: a part is missing or damaged, belongs to another save or
            to another number of ranks, or rows of a tensor are missing.
    """
    names = parts.names()
    first, where = _first(parts)
    if FLAT in first.manifest:
        return flat_shards(parts, [n for n in map(shard_number, names) if n is not None])
    if RANKS in first.manifest:
        return rank_parts(parts, first, wanted)
    if "tensors" not in first.manifest:
        raise CheckpointError(
            f"{where}: has neither a table of its tensors nor fairseq's fsdp_metadata: it cannot "
            "be joined with other parts"
        )
    if members(first.manifest) is None:
        raise CheckpointError(f"{where}: does not say how many parts its checkpoint has")
    chosen = [n for n in needed(parts) if wanted is None or expert_number(n) in (None, *wanted)]
    return _Joining(parts, {name: _open(parts, name, first) for name in chosen}).joined(wanted)


def _open(parts: PartReader, name: str, first: Part) -> Part:
    """One part, if it belongs to the others.

    Raises:
        CheckpointError: it is missing, or of another save.
    """
    where = parts.where(name)
    part = parts.open(name)
    mine, others = part.manifest, first.manifest
    if any(mine.get(key) != others.get(key) for key in ("save", "world_size", "num_experts")):
        raise CheckpointError(
            f"{where}: is of another save ({mine.get('save')}, {described(mine)}) than "
            f"{parts.where(head(parts.names()))} ({others.get('save')}, {described(others)}): two "
            "checkpoints are mixed"
        )
    number, expert = shard_number(name), expert_number(name)
    if mine.get("shard") != number or mine.get("expert") != expert:
        raise CheckpointError(f"{where}: holds {_content(mine)}: it has been renamed")
    return part


def _content(manifest: Mapping[str, Any]) -> str:
    for kind in ("shard", "expert"):
        if kind in manifest:
            return f"{kind} {manifest[kind]}"
    return "what all experts share"


@dataclass(frozen=True)
class _Joining:
    """Parts of one save, to be joined.

    Attributes:
        parts: where they are.
        opened: by name, that which says what the whole is first.
    """

    parts: PartReader
    opened: Mapping[str, Part]

    def joined(self, wanted: Collection[int] | None) -> Holding:
        """What they hold together, every tensor as `Stored`."""
        held = {name: held_by(part) for name, part in self.opened.items()}
        self._check_alike(held)
        found = self._found()
        names = self._names(wanted)
        first = next(iter(held.values()))
        where = self.parts.where(next(iter(held)))
        for name in names:
            if f"model.{name}" not in found:
                raise CheckpointError(f"{where}: {name} is in none of the checkpoint's files")
        average = None
        if first.average is not None:
            average = {n: found[f"average.{n}"] for n in names if f"average.{n}" in found}
        weights = {name: found[f"model.{name}"] for name in names}
        optimizer = _joint_state([each.optimizer for each in held.values()])
        everything = Holding(weights, optimizer, average)
        return everything.map(lambda key, value: found.get(key, value))

    def _check_alike(self, held: Mapping[str, Holding]) -> None:
        """Refuse a part that holds other tensors than it should."""
        first_name, first = next(iter(held.items()))
        for name, each in held.items():
            where = self.parts.where(name)
            must, may = self._expected(name, first.weights)
            for odd in sorted((must - each.weights.keys()) | (each.weights.keys() - may)):
                kind = "shard 0" if "shard" in self.opened[name].manifest else "it should have"
                raise CheckpointError(f"{where}: has other tensors than {kind}: {odd}")
            for what, mine, others in (
                ("optimizer state", each.optimizer, first.optimizer),
                ("moving average", each.average, first.average),
            ):
                if (mine is None) != (others is None):
                    lacking, having = (name, first_name) if mine is None else (first_name, name)
                    raise CheckpointError(
                        f"{self.parts.where(lacking)}: has no {what}, and "
                        f"{self.parts.where(having)} has one"
                    )

    def _expected(self, name: str, first: Mapping[str, Any]) -> tuple[set[str], set[str]]:
        """The weights that a part must have and those that it may have."""
        manifest = self.opened[name].manifest
        if "num_experts" not in manifest:
            return set(first), set(first)
        templates, expert = manifest["weights"], expert_number(name)
        if expert is not None:
            own = set(experts.of_expert(templates, expert))
            return own, own
        must = set(experts.shared(templates))
        if shard_number(name) is None:
            return must, must
        return must, set(experts.expanded(templates, manifest["num_experts"]))

    def _found(self) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for name, part in self.opened.items():
            where = self.parts.where(name)
            table = part.manifest["tensors"]
            for key, tensor in tensors_of(part).items():
                span, dtype = _span(table.get(key), tensor, f"{where}: {_bare(key)}")
                stored = found.setdefault(key, Stored(span.shape, dtype))
                if (stored.shape, stored.dtype) != (span.shape, dtype):
                    raise CheckpointError(f"{where}: {_bare(key)} is another than in other parts")
                stored.spans.append(span)
        for key, stored in found.items():
            stored.put_in_order(f"{self.parts.where(next(iter(self.opened)))}: {_bare(key)}")
        return found

    def _names(self, wanted: Collection[int] | None) -> list[str]:
        """The names of the model's state, in order; of experts' tensors those that are wanted."""
        first = next(iter(self.opened.values()))
        if "num_experts" not in first.manifest:
            return list(first.model)
        templates, count = first.manifest["weights"], first.manifest["num_experts"]
        passed = {
            name
            for expert in range(count)
            if wanted is not None and expert not in wanted
            for name in experts.of_expert(templates, expert)
        }
        return [name for name in experts.expanded(templates, count) if name not in passed]


def _joint_state(states: Sequence[NamedState | None]) -> NamedState | None:
    """What parts know together: one without rows of a parameter may know nothing of it."""
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
        raise CheckpointError(f"{where} is not in the table of its part") from e
    span = Span(shape, start, tensor.contiguous().view(-1))
    inside = span.start >= 0 and span.start + span.values.numel() <= span.total
    if not inside or dtype != tensor.dtype:
        raise CheckpointError(f"{where} is not what the table of its part says")
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
    if not is_in_parts(parts):
        raise CheckpointError(
            f"this checkpoint has no whole model, only the parts {', '.join(names)}"
        )
    held = open_parts(parts)
    return assembled(held if optimizer else replace(held, optimizer=None), allocate)


def assembled(opened: Holding, allocate: Allocate) -> Part:
    """Whole tensors of all that parts hold; shared ones are shared again."""
    done: dict[tuple[object, ...], Tensor] = {}

    def read(key: str, value: Any) -> Any:
        if not isinstance(value, Stored):
            return value
        if value.place not in done:
            done[value.place] = value.read(allocate)
        return done[value.place]

    held = opened.map(read)
    if held.optimizer is None:
        return Part(held.weights, None, held.average)
    names = held.optimizer.names
    return Part(held.weights, held.optimizer.numbered(), held.average, {"names": names})


def stored_whole(held: Holding) -> Holding:
    """Whole tensors as they would be found in parts."""
    done: dict[int, Stored] = {}

    def put(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in done:
            done[id(value)] = Stored(tuple(value.shape), value.dtype, [whole_span(value)])
        return done[id(value)]

    return held.map(put)


# -- the optimizer's state ----------------------------------------------------------------------


def check_names(part: Part, names: list[str]) -> None:
    """Refuse a whole part that was made of several and whose optimizer had other parameters.

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
