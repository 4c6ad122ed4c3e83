"""Shards of a checkpoint: any number of ranks to any other, and what is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fairseq_lite.builtins import load_builtins
from fairseq_lite.errors import CheckpointError
from fairseq_lite.optim.adam import Adam, AdamConfig
from fairseq_lite.optim.api import OPTIMIZERS
from fairseq_lite.parallel.api import Part
from fairseq_lite.parallel.shards import exchange as shards
from fairseq_lite.parallel.shards import planning
from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.training.checkpoint import parts, store
from fairseq_lite.training.checkpoint.parts import OWN_KEY
from tests.helpers.distributed import run_distributed
from tests.helpers.sharded import Training, digests, whole_part, write

# Three worlds of processes are formed before the first test.
pytestmark = pytest.mark.timeout(480)

# Where a rank's checkpoint comes from and where it goes: (from, to, spread over ranks, as shards).
Move = tuple[str | None, str, bool, bool]


def move(world: World, folder: Path, moves: list[Move]) -> dict[str, int]:
    """Make each move with a fresh model, whose weights are others until it has loaded.

    Returns:
        Where shards were read: how many numbers this rank read for each target.
    """
    counts: dict[str, int] = {}
    read = planning.read

    def counting(stored: Any, into: Any) -> int:
        counts[target] = read(stored, into)
        return counts[target]

    planning.read = counting
    for source, target, spread, sharded in moves:
        training = Training(world, spread=spread, seed=5 if source is None else 77)
        if source is None:
            training.update(1)
            training.update(2)
        else:
            training.load(folder / f"{source}.pt")
        training.save(folder / f"{target}.pt", sharded=sharded, mark=target)
    planning.read = read
    return counts


@dataclass
class Moved:
    """A folder of checkpoints that all came from one.

    Attributes:
        folder: where they are; what two ranks refuse is in `damaged/KIND`.
        counts: how many numbers each rank read for each, from shards.
        told: what each of the two ranks was told of what they refuse, by kind.
    """

    folder: Path
    counts: dict[str, list[int]]
    told: list[dict[str, str]]


CHAIN: list[tuple[int, list[Move]]] = [
    (2, [(None, "two", True, True), (None, "two-full", True, False)]),
    (
        1,
        [
            ("two", "one", True, True),
            ("two", "one-legacy", False, False),
            ("two-full", "one-full", True, False),
            (None, "plain", False, False),
        ],
    ),
    (
        4,
        [
            ("two", "four", True, True),
            ("one", "four-of-one", True, True),
            ("one-legacy", "four-of-legacy", True, True),
            ("two-full", "four-full", True, False),
        ],
    ),
    (
        2,
        [
            ("four", "two-again", True, True),
            ("four", "two-of-four", True, False),
            ("four-full", "two-of-full", True, True),
            ("four", "two-legacy", False, False),
        ],
    ),
    (1, [("four", "one-of-four", False, False)]),
]
REFUSED = ("missing", "cut", "edited", "mixed", "other", "optimizer")


def visit(
    world: World, folder: Path, moves: list[Move], kinds: list[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """What a world does while it exists: processes take longer to start than all of this."""
    return move(world, folder, moves), refused(world, folder / "damaged", kinds)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """Through 2, 1, 4, 2 and 1 ranks and both backends."""
    path = tmp_path_factory.mktemp("shards")
    counts: dict[str, list[int]] = {}
    told: list[dict[str, str]] = []
    for number, (size, moves) in enumerate(CHAIN):
        kinds: list[str] = []
        if number == 3:
            for kind in REFUSED:
                (path / "damaged" / kind).mkdir(parents=True)
                damaged(path, path / "damaged" / kind, kind)
            kinds += REFUSED
        found = run_distributed(visit, size, path, moves, kinds, timeout=240, heartbeat=60)
        for each, _ in found:
            for target, count in each.items():
                counts.setdefault(target, []).append(count)
        told = told if number != 3 else [refusals for _, refusals in found]
    return Moved(path, counts, told)


@pytest.fixture
def folder(moved: Moved) -> Path:
    return moved.folder


def test_a_rank_reads_what_it_holds_and_no_more(moved: Moved) -> None:
    manifest = store.load(moved.folder / "one-shard0.pt")[OWN_KEY]["manifest"]
    total = sum(math.prod(entry["shape"]) for entry in manifest["tensors"].values())
    assert set(moved.counts) == {"one", "four", "four-of-one", "two-again", "two-of-four"}
    assert moved.counts["one"] == [total]
    for target, ranks in moved.counts.items():
        size = {"o": 1, "t": 2, "f": 4}[target[0]]
        assert len(ranks) == size
        # Fewer rows than ranks, and a buffer on each: parts are even only nearly.
        assert max(ranks) < total / size * 1.5 and total <= sum(ranks) < total + 10 * size


def test_every_tensor_survives_every_move(folder: Path) -> None:
    names = parts.whole_names(sorted(path.name for path in folder.glob("*.pt")))
    assert len(names) == sum(len(moves) for _, moves in CHAIN) == 15
    expected = digests(folder / "plain.pt")
    assert len(expected) > 20
    for name in names:
        assert digests(folder / name) == expected, name


def test_gathered_the_file_is_the_one_that_legacy_ddp_writes(folder: Path) -> None:
    ours, theirs = (
        torch.load(folder / name, weights_only=True) for name in ("four-full.pt", "plain.pt")
    )
    assert list(ours["model"]) == list(theirs["model"])
    states = [state["last_optimizer_state"] for state in (ours, theirs)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert [list(s["state"]) for s in states] == [list(states[0]["state"])] * 2
    for state in (ours, theirs):
        model = state["model"]
        assert model["embed.weight"].data_ptr() == model["out.weight"].data_ptr()
    assert (folder / "four-full.pt").stat().st_size <= (folder / "plain.pt").stat().st_size


def test_what_was_never_updated_has_no_state_and_counts_stay_whole_numbers(folder: Path) -> None:
    for name in ("four", "two-of-four", "four-of-legacy"):
        optimizer = whole_part(folder / f"{name}.pt").optimizer
        assert optimizer is not None
        steps = [entry["step"] for entry in optimizer["state"].values()]
        assert steps == [2] * 6 and all(type(step) is int for step in steps)
        assert optimizer["param_groups"][0]["params"] == list(range(8))


def test_shared_tensors_are_stored_once(folder: Path) -> None:
    """Also where rows are uneven and lie in memory with room to spare."""
    for number in range(3):
        model = torch.load(folder / f"four-shard{number}.pt")["model"]
        assert model["embed.weight"].data_ptr() == model["out.weight"].data_ptr() != 0
    model = whole_part(folder / "four.pt").model
    assert model["embed.weight"] is model["out.weight"]


def test_one_process_reads_by_itself(folder: Path) -> None:
    training = Training(SingleWorld(), spread=False, seed=77)
    training.load(folder / "four-shard0.pt")
    training.update(3)
    again = Training(SingleWorld(), spread=False)
    for number in (1, 2, 3):
        again.update(number)
    for name, weight in again.model.state_dict().items():
        assert torch.equal(training.model.state_dict()[name], weight)


# -- what is refused ----------------------------------------------------------------------------


def damaged(folder: Path, target: Path, kind: str) -> Path:
    """A copy of the shards with something wrong; returns the file that is to be named."""
    for number in range(4):
        shutil.copy(folder / f"four-shard{number}.pt", target / f"x-shard{number}.pt")
    files = [target / f"x-shard{number}.pt" for number in range(4)]
    if kind == "missing":
        files[2].unlink()
        return files[2]
    if kind == "first":
        files[0].unlink()
        return files[0]
    if kind == "cut":
        files[1].write_bytes(files[1].read_bytes()[:-3000])
        return files[1]
    if kind == "empty":
        files[3].write_bytes(b"")
        return files[3]
    if kind == "flipped":
        data = bytearray(files[1].read_bytes())
        at = data.index(torch.load(files[1])["model"]["layer.weight"].numpy().tobytes())
        data[at] ^= 1
        files[1].write_bytes(data)
        return files[1]
    if kind == "mixed":
        shutil.copy(folder / "four-of-one-shard1.pt", files[1])
        return files[1]
    if kind == "fewer":
        shutil.copy(folder / "two-shard1.pt", files[1])
        return files[1]
    if kind == "renamed":
        shutil.copy(files[2], files[3])
        return files[3]
    if kind == "other":  # of a model with another layer
        for file in files:
            state = torch.load(file)
            table = state[OWN_KEY]["manifest"]["tensors"]
            state["model"]["extra"] = state["model"].pop("layer.bias")
            table["model.extra"] = table.pop("model.layer.bias")
            torch.save(state, file)
        return files[0]
    state = torch.load(files[1])
    if kind == "edited":  # and its checksums made anew
        state["model"]["layer.weight"][0, 0] += 1
    elif kind == "row":
        del state["model"]["layer.weight"]
    elif kind == "rows":
        state["model"]["layer.weight"] = state["model"]["layer.weight"][:0]
    elif kind == "table":
        del state[OWN_KEY]["manifest"]["tensors"]["model.layer.weight"]["offset"]
    if kind in ("row", "rows"):
        files[1].unlink()
        store.save(files[1], parts.sealed(state, files[1]))
        return files[0] if kind == "rows" else files[1]
    torch.save(state, files[1])
    return files[1]


KINDS = {
    "missing": "is missing: the checkpoint was written as 4 shards",
    "first": "is missing: the checkpoint was written as 4 shards",
    "cut": "is cut short",
    "empty": "cannot be read as a checkpoint",
    "flipped": "damaged",
    "mixed": "two checkpoints are mixed",
    "fewer": "two checkpoints are mixed",
    "renamed": "holds shard 2: it has been renamed",
    "edited": "layer.weight is damaged: its hash is not the one it was written with",
    "row": "has other tensors than shard 0: layer.weight",
    "rows": "layer.weight: 8 of its 28 numbers are in no shard",
    "table": "layer.weight",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_is_named_in_one_line(kind: str, folder: Path, tmp_path: Path) -> None:
    named = damaged(folder, tmp_path, kind)
    with pytest.raises(CheckpointError) as e:
        parts.whole_state(tmp_path / "x.pt")
    text = str(e.value)
    assert str(named) in text and KINDS[kind] in text and "\n" not in text


def refused(world: World, folder: Path, kinds: list[str]) -> dict[str, str]:
    """What a rank is told of damaged shards, and of those of another model."""
    if world.rank == 1:  # a rank that fails is alone: nobody answers it
        alone = Training(world, spread=True)
        assert set(shards.shard(world, shards.holding(alone.model, alone.optimizer))) == {"shard1"}
    told = {}
    for kind in kinds:
        training = Training(world, spread=True, seed=77)
        if kind == "optimizer":
            training.optimizer = Adam(training.model.layer.parameters(), AdamConfig(), lr=0.1)
        try:
            training.load(folder / kind / "x.pt")
        except CheckpointError as e:
            told[kind] = str(e)
    return told


def test_an_error_on_one_rank_is_an_error_on_all(moved: Moved) -> None:
    one, other = moved.told
    assert one == other and tuple(one) == REFUSED
    assert all("\n" not in text for text in one.values())
    for kind in ("missing", "cut", "edited", "mixed"):
        number = 2 if kind == "missing" else 1
        named = moved.folder / "damaged" / kind / f"x-shard{number}.pt"
        assert str(named) in one[kind] and KINDS[kind] in one[kind]
    assert "does not fit the model: extra" in one["other"]
    assert "8 parameters, the model has 2; they differ in embed.weight" in one["optimizer"]


def test_the_number_of_shards_can_be_insisted_on(folder: Path) -> None:
    assert parts.whole_state(folder / "two.pt", 2)["model"].keys()
    with pytest.raises(CheckpointError, match=r"two\.pt: has 2 shards, .*-count says 3"):
        parts.whole_state(folder / "two.pt", 3)


# -- one process --------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    alone = SingleWorld()
    yield alone
    alone.close()


def test_without_spreading_damage_is_refused_too(world: World, tmp_path: Path) -> None:
    Training(world, spread=True).save(tmp_path / "x.pt", sharded=True)
    file = tmp_path / "x-shard0.pt"
    state = torch.load(file)
    state["model"]["layer.weight"][0, 0] += 1
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"x-shard0.pt: .*layer.weight is damaged"):
        Training(world, spread=False).load(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["adafactor", "lamb"])
def test_state_of_other_shapes_crosses_over(name: str, world: World, tmp_path: Path) -> None:
    load_builtins()
    entry = OPTIMIZERS.get(name)

    def training(spread: bool, seed: int) -> Training:
        made = Training(world, spread=spread, seed=seed)
        made.optimizer = entry.factory(made.model.parameters(), entry.config(), lr=0.01)
        return made

    first = training(True, 5)
    first.update(1)
    for name, sharded in (("shards", True), ("full", False)):
        first.save(tmp_path / f"{name}.pt", sharded=sharded)
        plain = training(False, 77)
        plain.load(tmp_path / f"{name}.pt")
        plain.save(tmp_path / f"{name}-plain.pt", sharded=False)
        again = training(True, 78)
        again.load(tmp_path / f"{name}-plain.pt")
        again.save(tmp_path / f"{name}-again.pt", sharded=True)
    expected = digests(tmp_path / "shards.pt")
    assert all(digests(path) == expected for path in tmp_path.glob("full*.pt"))
    assert (
        digests(tmp_path / "shards-plain.pt") == digests(tmp_path / "shards-again.pt") == expected
    )


def test_the_flat_state_of_fairseqs_fp16_is_dealt_out(world: World, tmp_path: Path) -> None:
    plain = Training(world, spread=False)
    size = sum(p.numel() for p in plain.optimizer.params)
    flat = {"step": 7, "exp_avg": torch.randn(size), "exp_avg_sq": torch.rand(size)}
    optimizer = {"state": {0: flat}, "param_groups": [{"lr": 0.5, "params": [0]}], "loss_scale": 4}
    part = Part(plain.model.state_dict(), optimizer, plain.average)
    write(world, tmp_path / "flat.pt", {"model": part}, "flat")
    for spread in (False, True):
        training = Training(world, spread=spread, seed=77)
        training.load(tmp_path / "flat.pt")
        training.save(tmp_path / f"{spread}.pt", sharded=spread)
    found = whole_part(tmp_path / "True.pt").optimizer
    assert found is not None and found["param_groups"][0]["lr"] == 0.5
    pieces = [entry["exp_avg"].flatten() for entry in found["state"].values()]
    assert torch.equal(torch.cat(pieces), flat["exp_avg"])
    assert digests(tmp_path / "True.pt") == digests(tmp_path / "False.pt")


class Turned(nn.Module):
    """A parameter whose rows do not lie one after the other; layers that may be left out."""

    def __init__(self, layers: int = 3, keep: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(3, 4).t())
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(layers))
        self.keep = keep

    def fitting_weights(self, state: Any) -> dict[str, torch.Tensor]:
        """The tensors of the layers that are kept, under their new numbers."""
        names = {
            f"layers.{old}.weight": f"layers.{new}.weight" for new, old in enumerate(self.keep)
        }
        return {"turned": state["turned"], **{new: state[old] for old, new in names.items()}}


def test_tensors_go_where_the_model_wants_them(world: World, tmp_path: Path) -> None:
    model = Turned()
    write(world, tmp_path / "x.pt", shards.shard(world, shards.holding(model, None)), "x")
    pruned = Turned(2, keep=(0, 2))
    shards.load(world, pruned, None, parts.CheckpointFiles(tmp_path / "x.pt"))
    assert torch.equal(pruned.turned, model.turned) and not pruned.turned.is_contiguous()
    assert torch.equal(pruned.layers[1].weight, model.layers[2].weight)
