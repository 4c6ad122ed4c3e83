"""Shards that fairseq wrote: fairscale's flat parameters, cut evenly and filled up with zeros.

`fsdp_metadata` (in metaseq's files `shard_metadata`) describes each unit that was wrapped: its
path, and for each flat parameter the names, shapes and sizes of what lies in it, and how many zeros
were added on this rank. The optimizer's state has no names there and is not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.api import Part, PartReader
from fairseq_lite.parallel.shards.flat import FlatLayout
from fairseq_lite.parallel.shards.spans import Holding, Span, whole_span
from fairseq_lite.parallel.shards.stored import Stored

#: Where a part's manifest has fairseq's metadata.
FLAT = "fsdp_metadata"


def flat_shards(parts: PartReader, present: Sequence[int]) -> Holding:
    """Find the model's tensors in fairseq's shards; they come as `Stored`.

    Args:
        parts: the files.
        present: the numbers of the shards there are, in order.

    Raises:
        CheckpointError: naming the file: a shard is missing, or of a kind that cannot be joined.
    """
    for number in range(len(present)):
        if number not in present:
            raise CheckpointError(f"{parts.where(f'shard{number}')}: is missing")
    opened = [parts.read(f"shard{number}") for number in present]
    units = [_units(part, parts.where(f"shard{n}")) for n, part in enumerate(opened)]
    model: dict[str, Stored] = {}
    for number in range(len(units[0])):
        same = [each[number] if number < len(each) else {} for each in units]
        _add_unit(model, parts, opened, same)
    for unit in units[0]:
        for source, name in unit.get("shared_param_info") or ():
            model[_join(unit, name)] = model[_join(unit, source)]
    for name in opened[0].manifest[FLAT].get("buffer_names") or ():
        tensor = opened[0].model.get(name)
        if tensor is not None:  # those computed when the model is built are named and not stored
            model[name] = Stored(tuple(tensor.shape), tensor.dtype, [whole_span(tensor)])
    return Holding(model)


def _units(part: Part, where: str) -> list[Mapping[str, Any]]:
    metadata = part.manifest.get(FLAT)
    units = metadata.get("param_metadata") if isinstance(metadata, Mapping) else None
    if not isinstance(units, list) or not units:
        raise CheckpointError(f"{where}: its fsdp_metadata does not say what lies where")
    return units


def _add_unit(
    model: dict[str, Stored],
    parts: PartReader,
    opened: Sequence[Part],
    units: Sequence[Mapping[str, Any]],
) -> None:
    """Find the tensors of one unit, described in `units` by each of the shards."""
    first = units[0]
    if first.get("no_broadcast_optim_state"):
        raise CheckpointError(
            f"{parts.where('shard0')}: holds experts of a mixture, which differ from rank to rank: "
            "join it with the tools it was written with"
        )
    for row_name, row in first["params"].items():
        layout = FlatLayout.of([_join(first, n) for n in row["names"]], row["shapes"], len(opened))
        place = _join(first, row_name)
        pieces = []
        for rank, part in enumerate(opened):
            mine = units[rank].get("params", {}).get(row_name) or {}
            piece = part.model.get(place)
            if not isinstance(piece, Tensor):
                raise CheckpointError(f"{parts.where(f'shard{rank}')}: {place} is missing")
            if list(mine.get("names") or ()) != list(row["names"]):
                raise CheckpointError(
                    f"{parts.where(f'shard{rank}')}: {place} is of another model than in shard 0"
                )
            pieces.append(piece.reshape(-1))
        _check_length(parts, layout, pieces, place)
        for rank, piece in enumerate(pieces):
            _add_piece(model, layout, piece, rank)
    for name in (_join(first, n) for row in first["params"].values() for n in row["names"]):
        model[name].put_in_order(f"{parts.where('shard0')}: {name}")


def _check_length(
    parts: PartReader, layout: FlatLayout, pieces: Sequence[Tensor], name: str
) -> None:
    """Refuse a row of which there is not all: fairscale's pieces are of equal length."""
    count, each = len(pieces), pieces[0].numel()
    for rank, piece in enumerate(pieces):
        if piece.numel() != each:
            raise CheckpointError(
                f"{parts.where(f'shard{rank}')}: {name} has {piece.numel()} numbers, in shard 0 it "
                f"has {each}"
            )
    if each * count < layout.numel:
        raise CheckpointError(
            f"{parts.where(f'shard{count}')}: is missing: the {count} shards found hold "
            f"{each * count} of the {layout.numel} numbers of {name}"
        )
    if each != layout.each:
        raise CheckpointError(
            f"{parts.where('shard0')}: {name} has {each} numbers, as one of {count} shards it "
            f"would have {layout.each}: some are of another checkpoint"
        )


def _add_piece(model: dict[str, Stored], layout: FlatLayout, piece: Tensor, rank: int) -> None:
    first = rank * layout.each
    for (name, values), slot in zip(layout.parts(piece, rank).items(), layout.slots, strict=True):
        start = min(max(first - slot.start, 0), slot.numel)
        stored = model.setdefault(name, Stored(slot.shape, piece.dtype))
        stored.spans.append(Span(slot.shape, start, values))


def _join(unit: Mapping[str, Any], name: str) -> str:
    path = unit.get("fsdp_path") or ""
    return f"{path}.{name}" if path else name
