"""Which parts a checkpoint is made of, by their names.

A checkpoint is one whole part; or a shard of each rank; or, of a model with experts, the tensors
that all ranks share and a part for each expert. gshard wrote shared ones too, and one of each rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from fairseq_lite.parallel.api import MAIN_PART

#: The part of all tensors that are no expert's.
SHARED_PART = "shared"

#: What the name of a part looks like, except that of a whole one.
PATTERN = r"shared|(?:shard|expert)\d+|rank-\d+"


def shard_name(number: int) -> str:
    """The name of a shard's part."""
    return f"shard{number}"


def shard_number(name: str) -> int | None:
    """The number in a shard's name; None for a part of another kind."""
    return _number(r"shard(\d+)", name)


def expert_name(expert: int) -> str:
    """The name of the part of an expert."""
    return f"expert{expert}"


def expert_number(name: str) -> int | None:
    """The expert whose part has this name; None for a part of another kind."""
    return _number(r"expert(\d+)", name)


def rank_name(rank: int) -> str:
    """The name of what gshard wrote of a rank's experts."""
    return f"rank-{rank}"


def rank_number(name: str) -> int | None:
    """The rank in gshard's name of a part; None for a part of another kind."""
    return _number(r"rank-(\d+)", name)


def _number(pattern: str, name: str) -> int | None:
    match = re.fullmatch(pattern, name)
    return int(match.group(1)) if match else None


def is_part(name: str) -> bool:
    """Whether a part of a checkpoint of several is called so."""
    return re.fullmatch(PATTERN, name) is not None


def order(name: str) -> tuple[int, int]:
    """Where parts stand in a list: by kind and number."""
    if name in (MAIN_PART, SHARED_PART):
        return (0 if name == MAIN_PART else 1), 0
    for kind, number in enumerate((expert_number(name), rank_number(name), shard_number(name)), 2):
        if number is not None:
            return kind, number
    return 9, 0


def head(names: Collection[str]) -> str:
    """The part that says what the whole checkpoint is; it may be missing.

    Args:
        names: the parts there are, at least one.
    """
    if MAIN_PART in names:
        return MAIN_PART
    shards = [number for number in map(shard_number, names) if number is not None]
    if not shards or len(shards) < len(names):
        return SHARED_PART
    return shard_name(min(shards))


def members(manifest: Mapping[str, Any]) -> list[str] | None:
    """All parts of the checkpoint to which one with this manifest belongs; None: it does not say.

    The manifests of a single part, and of those which other programs wrote, do not.
    """
    sharded = "shard" in manifest
    count = manifest.get("world_size" if sharded else "num_experts")
    if not isinstance(count, int) or count < 1:
        return None
    if sharded:
        return [shard_name(number) for number in range(count)]
    return [SHARED_PART, *(expert_name(expert) for expert in range(count))]


def described(manifest: Mapping[str, Any]) -> str:
    """What a checkpoint consists of, in words."""
    if "shard" in manifest or "num_experts" not in manifest:
        return f"{manifest.get('world_size')} shards"
    return f"{manifest['num_experts']} experts"
