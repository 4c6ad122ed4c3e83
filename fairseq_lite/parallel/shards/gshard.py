"""Checkpoints of fairseq's gshard: `-shared.pt`, and `-rank-N.pt` with the experts of a rank.

There an expert's tensors are called by its number on its rank. A rank has consecutive experts, and
with fewer experts than ranks one: the ranks beyond repeat those of the first ones. The optimizer's
state goes by positions on each rank and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.api import Part, PartReader
from fairseq_lite.parallel.shards.sets import SHARED_PART, rank_name
from fairseq_lite.parallel.shards.spans import Holding, whole_span
from fairseq_lite.parallel.shards.stored import Stored

#: Where the manifest of such a part has what tells one save from another.
RANKS = "gshard"

_EXPERT = re.compile(r"(?P<container>.*\.experts)\.(?P<local>\d+)\.(?P<rest>.+)")
_GATE = ".gate.wg.weight"


def rank_files(parts: PartReader, shared: Part) -> list[str]:
    """The parts that are needed.

    Raises:
        CheckpointError: one is missing, or they are not what gshard writes.
    """
    ranks, local = _dealt(parts, shared)
    for rank in range(ranks):
        if rank_name(rank) not in parts.names():
            raise CheckpointError(
                f"{parts.where(rank_name(rank))}: is missing: the checkpoint has {ranks * local} "
                f"experts, {local} in a file"
            )
    return [SHARED_PART, *map(rank_name, range(ranks))]


def rank_parts(parts: PartReader, shared: Part, wanted: Collection[int] | None) -> Holding:
    """Find the model's tensors, those of experts under their numbers among all.

    Args:
        parts: the files.
        shared: that of `-shared.pt`.
        wanted: the experts that matter; None: all.

    Raises:
        CheckpointError: naming the file: one is missing, or does not belong to the others.
    """
    rank_files(parts, shared)
    ranks, local = _dealt(parts, shared)
    found = {name: _stored(tensor) for name, tensor in shared.model.items()}
    for rank in range(ranks):
        if wanted is None or any(expert // local == rank for expert in wanted):
            found.update(_of_rank(parts, shared, rank, local))
    return Holding(found)


def _dealt(parts: PartReader, shared: Part) -> tuple[int, int]:
    """How many ranks have experts of their own, and how many each."""
    where = parts.where(SHARED_PART)
    gates = [tensor for name, tensor in shared.model.items() if name.endswith(_GATE)]
    if not gates:
        raise CheckpointError(f"{where}: has no {_GATE.strip('.')}: not of a mixture of experts")
    count = int(gates[0].shape[0])
    first = parts.open(rank_name(0))
    local = len({match["local"] for match in _experts(first.model).values()})
    if local == 0 or count % local:
        raise CheckpointError(
            f"{parts.where(rank_name(0))}: has {local} experts of a layer, and there are {count}"
        )
    return count // local, local


def _of_rank(parts: PartReader, shared: Part, rank: int, local: int) -> dict[str, Stored]:
    where = parts.where(rank_name(rank))
    part = parts.open(rank_name(rank))
    mine, others = part.manifest.get(RANKS), shared.manifest.get(RANKS)
    if mine != others:
        raise CheckpointError(
            f"{where}: was written after {mine} updates and {parts.where(SHARED_PART)} after "
            f"{others}: two checkpoints are mixed"
        )
    found: dict[str, Stored] = {}
    matches = _experts(part.model)
    if {int(match["local"]) for match in matches.values()} != set(range(local)):
        raise CheckpointError(f"{where}: has not {local} experts of a layer, as rank 0 has")
    for name, match in matches.items():
        expert = rank * local + int(match["local"])
        found[f"{match['container']}.{expert}.{match['rest']}"] = _stored(part.model[name])
    return found


def _experts(model: Mapping[str, Any]) -> dict[str, re.Match[str]]:
    matches = {name: _EXPERT.fullmatch(name) for name in model}
    return {name: match for name, match in matches.items() if match is not None}


def _stored(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), tensor.dtype, [whole_span(tensor)])
