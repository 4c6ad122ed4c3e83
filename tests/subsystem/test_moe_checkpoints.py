"""Checkpoints of mixtures of experts: any ranks and backends to any other, and what is refused."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.experts import ExpertLayout
from fairseq_lite.parallel.local import local
from fairseq_lite.parallel.shards import gshard, parted, pieces
from fairseq_lite.parallel.shards.experts import Member, Spread, expanded
from fairseq_lite.parallel.shards.spans import Holding, whole_span
from fairseq_lite.parallel.shards.stored import Stored
from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.training.checkpoint import parts, store
from tests.helpers.distributed import run_distributed
from tests.helpers.moe_checkpoints import Move, Training, bits, move, write_as_gshard
from tests.helpers.sharded import digests
from tests.subsystem.test_checkpoint_scripts import script

# Three worlds of processes are formed before the first test.
pytestmark = pytest.mark.timeout(600)

# Experts are as many as ranks or more, fewer (then several ranks have the same), or do not come out
# even.
CHAIN: list[tuple[int, list[Move]]] = [
    (
        2,
        [
            *(Move(None, f"two-{experts}", experts) for experts in (4, 3, 2)),
            Move("two-4", "two-4-torch", 4, "torch"),
            Move("two-4", "two-4-shards", 4, "torch-shards"),
        ],
    ),
    (
        1,
        [
            Move("two-4", "one-4", 4),
            Move("two-4-shards", "one-4-of-shards", 4),
            Move("two-4-torch", "one-4-torch", 4, "torch"),
            Move("two-3", "one-3-shards", 3, "torch-shards"),
        ],
    ),
    (
        4,
        [
            Move("one-4", "four-4", 4),
            Move("file-4", "four-4-of-file", 4),
            Move("file-4", "four-4-torch", 4, "torch"),
            Move("two-4-shards", "four-4-shards", 4, "torch-shards"),
            Move("two-3", "four-3-torch", 3, "torch"),
            Move("one-3-shards", "four-3", 3),
            Move("two-2", "four-2", 2),
            Move("two-2", "four-2-torch", 2, "torch"),
            Move("two-2", "four-2-shards", 2, "torch-shards"),
        ],
    ),
    (
        2,
        [
            Move("four-4-shards", "two-4-again", 4),
            Move("four-4-torch", "two-4-torch-again", 4, "torch"),
            Move("four-3", "two-3-shards", 3, "torch-shards"),
            Move("four-2-torch", "two-2-torch", 2, "torch"),
            Move("four-2-shards", "two-2-of-shards", 2),
        ],
    ),
]
FAIRSCALE = [
    Move("two-4", "fair-4", 4, "fairscale"),
    Move("two-4-shards", "fair-4-shards", 4, "fairscale-shards"),
    Move("two-2", "fair-2", 2, "fairscale"),
    Move("fair-4-shards", "legacy-4", 4),
]
RESUMED = ("legacy_ddp", "torch", "torch-shards")
REFUSED = ("shared", "expert", "cut", "flipped", "mixed", "experts", "optimizer")


@dataclass
class Seen:
    """What a rank saw.

    Attributes:
        told: what it was told of what it refuses, by kind.
        alike: whether a run went on to the last bit alike, by backend.
        own: the weights of a model of its experts, loaded by themselves.
    """

    told: dict[str, str] = field(default_factory=dict)
    alike: dict[str, bool] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)


def visit(world: World, data: Path, folder: Path, moves: list[Move], last: bool) -> Seen:
    """What a world does while it exists; in the last one, what is refused and what goes on."""
    move(world, data, folder, moves)
    if not last:
        return Seen()
    told = refused(world, data, folder)
    alike = {backend: goes_on(world, data, folder, backend) for backend in RESUMED}
    with_local_numbers(world, data, folder)
    for number, ranks in enumerate(GSHARD):
        training = Training(world, data, 4 if number < 2 else 2, seed=77)
        training.load_weights(folder / f"gshard{ranks}.pt")
        training.save(folder / f"of-gshard{ranks}.pt")
    own = load_spread(world, folder, data)
    if find_spec("fairscale") is not None:
        move(world, data, folder, FAIRSCALE)
    return Seen(told, alike, own)


def refused(world: World, data: Path, folder: Path) -> dict[str, str]:
    """What a rank is told of sets that are not what they should be."""
    told = {}
    for kind in REFUSED:
        training = Training(world, data, 4, seed=77)
        before = bits(training.trainer.model)
        try:
            training.load(folder / "damaged" / kind / "x.pt")
        except CheckpointError as e:
            told[kind] = str(e)
        after = bits(training.trainer.model)
        assert all(torch.equal(before[name], after[name]) for name in before), kind
    return told


def goes_on(world: World, data: Path, folder: Path, backend: str) -> bool:
    """Whether two updates after a checkpoint are those of a run that went on without one."""
    path = folder / f"on-{backend}.pt"
    one, other = (Training(world, data, 4, backend, seed) for seed in (1, 77))
    one.update(2)
    one.save(path)
    one.update(2)
    other.load(path)
    other.update(2, skip=2)
    one.save(folder / f"on-{backend}-one.pt")
    other.save(folder / f"on-{backend}-other.pt")
    models = (one.trainer.model, other.trainer.model)
    states = [{n: local(t) for n, t in model.state_dict().items()} for model in models]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def with_local_numbers(world: World, data: Path, folder: Path) -> None:
    """Load as a reader does that takes experts' numbers for those on its rank."""
    right = parted._Reading._opened

    def wrong(self: parted._Reading) -> Holding:
        assert self.spread is not None
        own = self.spread.owned(world.rank)
        opened = pieces.open_parts(self.parts, range(len(own)))

        def here(name: str) -> str:
            return re.sub(r"\.experts\.(\d+)\.", lambda m: f".experts.{own[int(m[1])]}.", name)

        assert opened.average is not None
        weights = {here(name): stored for name, stored in opened.weights.items()}
        average = {here(name): stored for name, stored in opened.average.items()}
        return Holding(weights, opened.optimizer, average)

    parted._Reading._opened = wrong  # type: ignore[method-assign]
    try:
        training = Training(world, data, 4, seed=77)
        training.load(folder / "two-4.pt")
        training.save(folder / "wrong.pt")
    finally:
        parted._Reading._opened = right  # type: ignore[method-assign]


@dataclass
class Moved:
    """A folder of checkpoints of which those with as many experts came from one.

    Attributes:
        folder: where they are.
        seen: what each of two ranks saw at the end.
    """

    folder: Path
    seen: list[Seen]


GSHARD = (2, 1, 4)


@pytest.fixture(scope="module")
def moved(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """Through 2, 1, 4 and 2 ranks and both backends."""
    folder = tmp_path_factory.mktemp("experts")
    for number, (size, moves) in enumerate(CHAIN):
        if number == 2:
            script("consolidate_shards").main(
                [str(folder / "two-4"), "--output", str(folder / "file-4.pt")]
            )
        last = number == len(CHAIN) - 1
        if last:
            for kind in REFUSED:
                damaged(folder, folder / "damaged" / kind, kind)
            for ranks in GSHARD[:2]:
                write_as_gshard(folder / "two-4.pt", folder / f"gshard{ranks}.pt", 4, ranks)
            write_as_gshard(folder / "two-2.pt", folder / "gshard4.pt", 2, 4)
        found = run_distributed(
            visit, size, toy_data, folder, moves, last, timeout=400, heartbeat=100
        )
    return Moved(folder, found)


@pytest.fixture
def folder(moved: Moved) -> Path:
    return moved.folder


# -- any ranks to any other ---------------------------------------------------------------------


@pytest.mark.parametrize("experts", [4, 3, 2])
def test_every_tensor_survives_every_move(folder: Path, experts: int) -> None:
    expected = digests(folder / f"two-{experts}.pt")
    names = [each.target for _, moves in CHAIN for each in moves if each.experts == experts]
    for name in names:
        assert digests(folder / f"{name}.pt") == expected, name
    assert len({digest for key, digest in expected.items() if ".experts." in key}) > 8 * experts


def test_local_numbers_would_be_noticed(folder: Path) -> None:
    right, wrong = digests(folder / "two-4.pt"), digests(folder / "wrong.pt")
    odd = {key for key in right if key.startswith("model.") and right[key] != wrong[key]}
    assert odd == {
        key for key in right if re.match(r"model\..*\.experts\.[23]\.", key)
    }  # those of rank 1


def test_files_are_the_same_at_every_world_size(folder: Path) -> None:
    """Shared ones of rank 0, and one of each expert, which say whose they are."""
    for name, size in (("one-4", 1), ("two-4", 2), ("two-4-torch", 2), ("four-4", 4)):
        files = parts.part_files(folder / f"{name}.pt")
        assert list(files) == ["shared", *(f"expert{e}" for e in range(4))]
        for part, file in files.items():
            state = store.load(file)
            manifest = parts.own(state)["manifest"]
            assert (manifest["num_experts"], manifest["world_size"]) == (4, size)
            assert manifest["save"] == name
            assert manifest.get("expert") == (None if part == "shared" else int(part[-1]))
            marks = {f".experts.{part[-1]}." in n for n in state["model"]}
            assert marks == {part != "shared"}
            assert set(state["extra_state"]["ema"]) == set(state["model"])
            assert all("sha256" in entry for entry in manifest["tensors"].values())
            assert any(key.startswith("optimizer.") for key in manifest["tensors"])
    rest = "encoder.layers.1.moe_layer.experts.3.fc1.weight"
    one, four = (store.load(folder / f"{n}-expert3.pt")["model"][rest] for n in ("one-4", "four-4"))
    assert torch.equal(one, four)


def test_shards_have_the_experts_of_their_rank(folder: Path) -> None:
    for number in range(4):
        state = store.load(folder / f"four-2-shards-shard{number}.pt")
        found = {name.split(".experts.")[1][0] for name in state["model"] if ".experts." in name}
        assert found == {str(number % 2)}
        rows = state["model"][f"decoder.layers.1.moe_layer.experts.{number % 2}.fc1.weight"]
        assert tuple(rows.shape) == (15, 18)  # half of them: two ranks share it


@pytest.mark.parametrize("backend", RESUMED)
def test_a_run_goes_on_to_the_last_bit_alike(moved: Moved, backend: str) -> None:
    assert [each.alike[backend] for each in moved.seen] == [True, True]
    one, other = (digests(moved.folder / f"on-{backend}-{n}.pt") for n in ("one", "other"))
    assert one == other != digests(moved.folder / f"on-{backend}.pt")


def test_one_file_has_one_process_order(folder: Path, toy_data: Path) -> None:
    """Parameters are numbered in it as an optimizer of all experts numbers them."""
    state = parts.whole_state(folder / "four-4.pt")
    training = Training(SingleWorld(), toy_data, 4)
    assert list(state["model"]) == list(training.trainer.model.state_dict())
    training.load(folder / "file-4.pt")
    mine = training.trainer.optimizer.state_dict()["state"]
    theirs = state["last_optimizer_state"]["state"]
    assert list(mine) == list(theirs) == list(range(len(mine)))
    assert all(torch.equal(mine[n]["exp_avg"], theirs[n]["exp_avg"]) for n in mine)


# -- fairscale ----------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("fairscale") is None, reason="fairscale is not installed")
def test_fairscale_takes_part(folder: Path) -> None:
    expected = {experts: digests(folder / f"two-{experts}.pt") for experts in (4, 2)}
    for each in FAIRSCALE:
        assert digests(folder / f"{each.target}.pt") == expected[each.experts], each.target


# -- gshard's files -----------------------------------------------------------------------------


def weights(path: Path) -> dict[str, str]:
    return {key: text for key, text in digests(path).items() if key.startswith("model.")}


def test_gshards_local_numbers_become_global_ones(folder: Path) -> None:
    for ranks, experts in zip(GSHARD, (4, 4, 2), strict=True):
        assert weights(folder / f"of-gshard{ranks}.pt") == weights(folder / f"two-{experts}.pt")
        state = parts.whole_state(folder / f"gshard{ranks}.pt")
        assert "last_optimizer_state" not in state
        name = "decoder.layers.1.moe_layer.experts.1.fc2.bias"
        expected = parts.whole_state(folder / f"two-{experts}.pt")["model"][name]
        assert torch.equal(state["model"][name], expected)


def test_numbers_left_as_they_are_would_be_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gshard._of_rank

    def wrong(reader: object, shared: object, rank: int, each: int) -> dict[str, Stored]:
        found = right(reader, shared, rank, each)  # type: ignore[arg-type]
        swap = {"0": "1", "1": "0", "2": "3", "3": "2"}
        pattern = re.compile(r"(?<=\.experts\.)\d+")
        return {pattern.sub(lambda m: swap[m[0]], name): each for name, each in found.items()}

    monkeypatch.setattr(gshard, "_of_rank", wrong)
    found = parts.whole_state(folder / "gshard2.pt")["model"]
    expected = parts.whole_state(folder / "two-4.pt")["model"]
    assert found.keys() == expected.keys()
    odd = {name for name in found if not torch.equal(found[name], expected[name])}
    assert odd and all(".experts." in name for name in odd)


@pytest.mark.parametrize("kind", ["shared", "rank-0", "rank-1", "mixed", "numbers"])
def test_gshards_files_that_do_not_fit(folder: Path, tmp_path: Path, kind: str) -> None:
    for file in parts.part_files(folder / "gshard2.pt").values():
        shutil.copy(file, tmp_path / file.name.replace("gshard2", "x"))
    path = tmp_path / "x.pt"
    named = tmp_path / f"x-{kind}.pt"
    if kind == "mixed":
        named = tmp_path / "x-rank-1.pt"
        state = torch.load(named)
        state["optimizer_history"][-1]["num_updates"] = 3
        torch.save(state, named)
    elif kind == "numbers":
        named = tmp_path / "x-rank-1.pt"
        write_as_gshard(folder / "two-4.pt", path, 4, 2, local=False)
    else:
        named.unlink()
    with pytest.raises(CheckpointError) as e:
        parts.whole_state(path)
    assert str(e.value).startswith(f"{named}: ") and "\n" not in str(e.value)


# -- what is refused ----------------------------------------------------------------------------


def damaged(folder: Path, target: Path, kind: str) -> Path:
    """A copy of a checkpoint with something wrong; returns the file that is to be named."""
    target.mkdir(parents=True, exist_ok=True)
    source = "two-3" if kind == "experts" else "two-4"
    for part, file in parts.part_files(folder / f"{source}.pt").items():
        shutil.copy(file, target / f"x-{part}.pt")
    shared, experts = target / "x-shared.pt", [target / f"x-expert{e}.pt" for e in range(4)]
    if kind in ("shared", "experts"):
        if kind == "shared":
            shared.unlink()
        return shared
    if kind == "expert":
        experts[2].unlink()
        return experts[2]
    if kind == "cut":
        experts[3].write_bytes(experts[3].read_bytes()[:-3000])
        return experts[3]
    if kind == "flipped":
        data = bytearray(experts[1].read_bytes())
        name = "decoder.layers.1.moe_layer.experts.1.fc1.weight"
        data[data.index(torch.load(experts[1])["model"][name].numpy().tobytes())] ^= 1
        experts[1].write_bytes(data)
        return experts[1]
    if kind == "mixed":
        shutil.copy(folder / "four-4-expert2.pt", experts[2])
        return experts[2]
    if kind == "swapped":
        one, other = experts[0].read_bytes(), experts[3].read_bytes()
        experts[0].write_bytes(other)
        experts[3].write_bytes(one)
        return experts[0]
    if kind == "renamed":
        shutil.copy(shared, experts[1])
        return experts[1]
    state = torch.load(experts[1])
    manifest = state[parts.OWN_KEY]["manifest"]
    if kind == "edited":
        state["model"]["encoder.layers.1.moe_layer.experts.1.fc2.bias"] += 1
    elif kind == "lacking":
        del state["model"]["encoder.layers.1.moe_layer.experts.1.fc2.bias"]
    elif kind == "optimizer":
        state = parts.without_optimizer(state)
    elif kind == "average":
        del state["extra_state"]["ema"]
        tensors = manifest["tensors"].items()
        manifest["tensors"] = {k: v for k, v in tensors if not k.startswith("average.")}
    torch.save(state, experts[1])
    return experts[1]


KINDS = {
    "shared": "is missing, and without it",
    "expert": "is missing: the checkpoint was written as 4 experts",
    "cut": "is cut short",
    "flipped": "damaged",
    "mixed": "two checkpoints are mixed",
    "swapped": "holds expert 3: it has been renamed",
    "renamed": "holds what all experts share: it has been renamed",
    "edited": "experts.1.fc2.bias is damaged: its hash is not the one it was written with",
    "lacking": "has other tensors than it should have: encoder.layers.1.moe_layer.experts.1.fc2",
    "optimizer": "has no optimizer state, and",
    "average": "has no moving average, and",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_is_named_in_one_line(kind: str, folder: Path, tmp_path: Path) -> None:
    named = damaged(folder, tmp_path, kind)
    with pytest.raises(CheckpointError) as e:
        parts.whole_state(tmp_path / "x.pt")
    text = str(e.value)
    assert text.startswith(f"{named}: ") and KINDS[kind] in text and "\n" not in text


def test_an_error_on_one_rank_is_an_error_on_all(moved: Moved) -> None:
    one, other = (each.told for each in moved.seen)
    assert one == other and tuple(one) == REFUSED
    for kind, text in one.items():
        place = moved.folder / "damaged" / kind
        named = next((n for n in place.parent.glob(f"{kind}/x-*.pt") if str(n) in text), None)
        if kind in ("shared", "expert"):
            assert text.startswith(str(place / "x-")), text
        else:
            assert named is not None, text
        assert "\n" not in text
        if kind in KINDS:
            assert KINDS[kind] in text
    assert "is of 3 experts, the model has 4" in one["experts"]


def test_a_part_may_be_named_and_means_the_whole(folder: Path, tmp_path: Path) -> None:
    for name in ("two-4-shared.pt", "two-4-expert3.pt"):
        assert parts.whole_state(folder / name)["model"].keys()
    # A checkpoint that is only called like a part is itself.
    for name in ("my-expert1.pt", "my-shared.pt"):
        torch.save({"model": {"w": torch.ones(1)}, "extra_state": {}}, tmp_path / name)
        assert list(parts.whole_state(tmp_path / name)["model"]) == ["w"]


# -- weights alone ------------------------------------------------------------------------------


def load_spread(world: World, folder: Path, data: Path) -> dict[str, Tensor]:
    training = Training(world, data, 4, seed=77)
    model = training.trainer.model
    parted.load_weights(world, model, parts.CheckpointFiles(folder / "four-4.pt"))
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # What is whole can be given to it, too: experts of other ranks are passed over.
    model.load_weights(parts.whole_state(folder / "two-4.pt", optimizer=False)["model"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own[name])
    return own


def test_a_model_that_is_spread_gets_its_experts(moved: Moved) -> None:
    whole = parts.whole_state(moved.folder / "two-4.pt", optimizer=False)["model"]
    ranks = [each.own for each in moved.seen]
    assert set(ranks[0]) | set(ranks[1]) == set(whole)
    for own in ranks:
        assert len(own) < len(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in own.items())


def test_each_rank_opens_what_it_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    right = parts.CheckpointFiles.open

    def noting(self: parts.CheckpointFiles, name: str) -> object:
        opened.append(name)
        return right(self, name)

    monkeypatch.setattr(parts.CheckpointFiles, "open", noting)
    held = pieces.open_parts(parts.CheckpointFiles(folder / "two-4.pt"), [2])
    assert set(opened) == {"shared", "expert2"}
    assert {name.split(".experts.")[1][0] for name in held.weights if ".experts." in name} == {"2"}


# -- names --------------------------------------------------------------------------------------


def test_lists_of_names_are_kept_once_for_all_experts() -> None:
    members = {
        f"{container}.{expert}.{rest}": Member(container, expert, rest)
        for container in ("a.experts", "b.experts")
        for expert in (2, 3)
        for rest in ("w", "b")
    }
    spread = Spread(ExpertLayout.of(4, 2), members)
    own = ["first", *list(members)[:4], "gate.1.w", *list(members)[4:], "last"]
    templates = spread.templates(own)
    assert templates == [
        *("first", "a.experts.*.w", "a.experts.*.b", "gate.1.w"),
        *("b.experts.*.w", "b.experts.*.b", "last"),
    ]
    names = expanded(templates, 4)
    assert names[:5] == ["first", *(f"a.experts.{e}.{r}" for e in (0, 1) for r in "wb")]
    assert spread.elsewhere() == set(names) - set(own)
    assert [spread.written_by(rank) for rank in (0, 1)] == [range(2), range(2, 4)]


def test_parts_have_an_order(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_last.pt"
    names = ("expert10", "rank-2", "shared", "expert2", "shard0", "rank-10")
    for name in names:
        parts.part_path(path, name).write_bytes(b"")
        assert parts.whole_name(parts.part_path(path, name)) == path
    for other in ("expert", "shared0", "rank-1-shard1"):
        parts.part_path(path, other).write_bytes(b"")
    assert list(parts.part_files(path)) == [
        *("shared", "expert2", "expert10", "rank-2", "rank-10", "shard0")
    ]


class Plain(nn.Module):
    """A model without experts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


def test_a_model_without_experts_is_not_spread() -> None:
    assert Spread.of(Plain()) is None
    span = replace(whole_span(torch.arange(6.0)), shape=(2, 3))
    stored = Stored((2, 3), torch.float32, [span])
    target = replace(span, start=2, values=torch.zeros(3))
    stored.copy_to(target)
    assert target.values.tolist() == [2.0, 3.0, 4.0]
