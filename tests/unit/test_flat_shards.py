"""Shards as fairseq writes them with fairscale: flat parameters, cut evenly."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.api import Part, PartReader
from fairseq_lite.parallel.shards import pieces
from fairseq_lite.parallel.shards.flat_shards import FLAT
from tests.helpers.sharded import flat_shards

SHARED = {"out.weight": "embed.weight"}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    embed = torch.randn(5, 3)
    return {
        "version": torch.tensor([3.0]),
        "embed.weight": embed,
        **{f"layers.{i}.{n}": torch.randn(s) for i in (0, 1) for n, s in (("w", (3, 4)), ("b", 4))},
        "norm": torch.randn(1),
        "out.weight": embed,
    }


class Files(PartReader):
    """Shards in memory, named as files."""

    def __init__(self, shards: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        self.parts = {
            f"shard{rank}": Part(state, manifest={FLAT: metadata})
            for rank, (state, metadata) in enumerate(shards)
        }

    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def manifest(self, name: str) -> Any:
        return self.parts[name].manifest

    def read(self, name: str) -> Part:
        return self.parts[name]

    def where(self, name: str) -> str:
        return f"a-{name}.pt"


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 30])
def test_flat_parameters_become_the_model_again(ranks: int) -> None:
    expected = weights()
    shards = flat_shards(expected, ["layers.0", "layers.1"], SHARED, ranks)
    found = pieces.whole(Files(shards)).model
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["out.weight"] is found["embed.weight"]


@pytest.mark.skipif(find_spec("fairscale") is None, reason="fairscale is not installed")
def test_fairscale_makes_the_same_of_them() -> None:
    from fairscale.nn import FullyShardedDataParallel  # an optional dependency

    shards = flat_shards(weights(), ["layers.0", "layers.1"], SHARED, 3)
    for _, metadata in shards:
        metadata["buffer_names"].remove("computed.table")  # fairscale asks for those, too
    states, metadata = zip(*shards, strict=True)
    theirs = FullyShardedDataParallel.consolidate_shard_weights(list(states), list(metadata))
    ours = pieces.whole(Files(shards)).model
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def change(shards: list[tuple[dict[str, Any], dict[str, Any]]], kind: str) -> None:
    state, metadata = shards[1]
    unit = metadata["param_metadata"][0]
    if kind == "last":
        shards.pop()
    elif kind == "row":
        del state["layers.0.flat_param_0"]
    elif kind == "short":
        state["layers.0.flat_param_0"] = state["layers.0.flat_param_0"][:-1]
    elif kind == "more":
        for each, _ in shards:
            each["layers.0.flat_param_0"] = torch.zeros(9)
    elif kind == "other":
        unit["params"]["flat_param_0"] = {**unit["params"]["flat_param_0"], "names": ["w", "c"]}
    elif kind == "units":
        del metadata["param_metadata"]
    elif kind == "experts":
        shards[0][1]["param_metadata"][0]["no_broadcast_optim_state"] = True


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("last", "a-shard2.pt: is missing: the 2 shards found hold 12 of the 16 numbers"),
        ("row", "a-shard1.pt: layers.0.flat_param_0 is missing"),
        ("short", "a-shard1.pt: layers.0.flat_param_0 has 5 numbers, in shard 0 it has 6"),
        ("other", "a-shard1.pt: layers.0.flat_param_0 is of another model than in shard 0"),
        ("more", "a-shard0.pt: layers.0.flat_param_0 has 9 numbers, as one of 3 shards it would"),
        ("units", "a-shard1.pt: its fsdp_metadata does not say what lies where"),
        ("experts", "a-shard0.pt: holds experts of a mixture, which differ from rank to rank"),
    ],
)
def test_what_cannot_be_joined_is_named(kind: str, message: str) -> None:
    shards = flat_shards(weights(), ["layers.0", "layers.1"], SHARED, 3)
    change(shards, kind)
    with pytest.raises(CheckpointError) as e:
        pieces.whole(Files(shards))
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


def test_a_shard_in_the_middle_is_missed() -> None:
    files = Files(flat_shards(weights(), [], SHARED, 3))
    del files.parts["shard1"]
    with pytest.raises(CheckpointError, match=r"a-shard1\.pt: is missing"):
        pieces.whole(files)


def test_a_file_that_says_nothing_is_refused() -> None:
    files = Files(flat_shards(weights(), [], SHARED, 2))
    files.parts = {name: Part(part.model) for name, part in files.parts.items()}
    with pytest.raises(CheckpointError, match="a-shard0.pt: has neither a table"):
        pieces.whole(files)
