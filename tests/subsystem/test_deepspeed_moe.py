"""`--ddp-backend deepspeed_moe`: any ranks at any stage train as one process; bugs are noticed.

Processes take longer to start than to train, so each number of ranks is started once and goes
through all its cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.optim.adam import Adam, AdamConfig
from fairseq_lite.parallel.experts import expert_parameters
from fairseq_lite.parallel.local import norm_of
from fairseq_lite.parallel.world import World
from fairseq_lite.training.checkpoint.parts import CheckpointFiles
from fairseq_lite.training.trainer import Trainer
from tests.helpers import moe
from tests.helpers.distributed import run_distributed
from tests.helpers.moe import Case, Trained, assert_alike
from tests.helpers.parity import NOISE, make_trainer
from tests.helpers.sharded import write
from tests.helpers.toy import ADAM
from tests.helpers.training import assert_same

# Not `importorskip`: ranks import this file, too, and DeepSpeed is to come in quietly.
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

FP16 = ("--fp16", "--fp16-init-scale", "4")
AVERAGE = ("--store-ema", "--ema-decay", "0.9")


@dataclass(frozen=True)
class Row:
    """A case, how long it is trained, how close it must come, and a fault put in."""

    case: Case
    updates: int = 3
    tolerance: float = 1e-5
    bug: str = ""

    @property
    def reference(self) -> Row:
        """What one process trains."""
        return replace(self, case=self.case.reference, bug="")


EXPERTS, TOPS, STAGES = (2, 4, 8), (1, 2), (0, 1, 2)
GRID = [Row(Case(e, top), updates=2) for e, top in itertools.product(EXPERTS, TOPS)]
LONG = Row(Case(4), updates=5)
FAULTY = Row(Case(4))
SPECIAL = [
    Row(Case(4, training=(*moe.TRAINING, *AVERAGE))),
    Row(Case(4, model="lm")),
    Row(Case(4, training=(*moe.TRAINING, "--bf16")), tolerance=2e-2),
    Row(Case(4, training=(*moe.TRAINING, *FP16)), tolerance=2e-3),
    Row(Case(4, training=(*moe.TRAINING, "--fp16", "--fp16-init-scale", str(2**22))), 10, 2e-3),
]
ROOT = Row(Case(4, more=("--moe-normalize-expert-grad", "sqrt_world_size")), updates=1)


def at_stages(rows: Sequence[Row], stages: Sequence[int] = STAGES) -> list[Row]:
    """Rows at some stages of ZeRO."""
    return [
        replace(row, case=replace(row.case, backend=f"zero{stage}"))
        for row in rows
        for stage in stages
    ]


def grid(ranks: int) -> list[Row]:
    """Any two of ranks, experts and stages meet, with both numbers of choices."""
    return [
        row
        for experts, stage in itertools.product(EXPERTS, STAGES)
        if moe.WHOLE_TABLES or (ranks // 2 + EXPERTS.index(experts) + stage) % 3 == 0
        for row in at_stages([row for row in GRID if row.case.experts == experts], [stage])
    ]


# -- backends with one fault each -------------------------------------------------------------


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Trainers made inside have a backend with a fault."""
    from fairseq_lite.parallel.deepspeed_moe import backends

    class Undivided(backends.ZeroSharded):
        """Expert gradients are summed over the ranks, and not divided by their number."""

        def _expert_groups(self, model: nn.Module) -> dict[nn.Parameter, tuple[str, float]]:
            found = super()._expert_groups(model)
            return {p: (name, float(self.world.size)) for p, (name, _) in found.items()}

    class NormOfShared(backends.ZeroSharded):
        """The norm leaves out the experts."""

        def grad_norm(self, model: nn.Module) -> Tensor:
            own = {id(param) for param, _ in expert_parameters(model)}
            parts = [f.tensor for f in self.partition.fragments.values() if id(f.param) not in own]
            grads = [part.grad for part in parts if part.grad is not None]
            square = norm_of(grads, self.world.device).double().square()
            return self.world.all_reduce(square).sqrt().float()

    class GateAsExpert(backends.ZeroSharded):
        """The gate counts as an expert's, so ranks of an exchange group do not share gradients."""

        def _expert_groups(self, model: nn.Module) -> dict[nn.Parameter, tuple[str, float]]:
            found = super()._expert_groups(model)
            for name, param in model.named_parameters():
                if ".gate." in name:
                    (found[param],) = set(found.values())
                    param.allreduce, param.group_name = False, found[param][0]
            return found

    class Ungathered(backends.ZeroSharded):
        """Nobody fetches what other ranks have updated."""

        def adapt_optimizer(self, model: nn.Module, optimizer: Any) -> Any:
            with patch.object(self.partition, "gather", lambda: None):
                return super().adapt_optimizer(model, optimizer)

    faulty = {kind.__name__: kind for kind in (Undivided, NormOfShared, GateAsExpert, Ungathered)}
    with patch.object(backends, "ZeroSharded", faulty[bug]):
        yield


BUGS = ("Undivided", "NormOfShared", "GateAsExpert", "Ungathered")


# -- running ----------------------------------------------------------------------------------


def train_all(world: World, data: Path, lm_data: Path, rows: Sequence[Row]) -> list[Trained]:
    done = []
    for row in rows:
        with planted(row.bug) if row.bug else nullcontext():
            folder = lm_data if row.case.model == "lm" else data
            done.append(moe.train(world, folder, row.case.flags, updates=row.updates))
    world.close()
    return done


Ran = Callable[[int], dict[Row, list[Trained]]]


def rows_of(ranks: int) -> list[Row]:
    if ranks == 0:
        return [*GRID, LONG, FAULTY, *SPECIAL]
    if ranks == 2:
        bugs = [replace(row, bug=bug) for bug in BUGS for row in at_stages([FAULTY], (1, 2))]
        longer = [*at_stages([LONG]), *at_stages([FAULTY, *SPECIAL, ROOT], (1, 2))]
        return [*grid(2), *longer, *bugs]
    return grid(4) if ranks == 4 else [*grid(1), *at_stages([LONG])]


@pytest.fixture(scope="module")
def ran(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Ranks -> row -> what each rank saw; 0 ranks are one process on legacy_ddp."""
    lm_data = moe.make_lm_data(tmp_path_factory.mktemp("lm"))
    done: dict[int, dict[Row, list[Trained]]] = {}

    def run(ranks: int) -> dict[Row, list[Trained]]:
        if ranks not in done:
            rows = rows_of(ranks)
            found = run_distributed(
                train_all, max(1, ranks), toy_data, lm_data, rows, timeout=400.0
            )
            done[ranks] = {row: list(each) for row, *each in zip(rows, *found, strict=True)}
        return done[ranks]

    return run


def assert_near(one: Trained, ranks: Sequence[Trained], tolerance: float) -> None:
    """Of 16 bits: as alike as rounding allows."""
    for rank in ranks:
        assert rank.losses == pytest.approx(one.losses, rel=tolerance)
        assert rank.norms == pytest.approx(one.norms, rel=2 * tolerance)
        assert rank.norms == ranks[0].norms, "one number on all ranks"
    weights = moe.assembled([rank.weights for rank in ranks])
    for name, weight in moe.assembled([one.weights]).items():
        off = float((weights[name] - weight).abs().max())
        assert off < tolerance, f"{name} is off by {off}"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_train_as_one_process(ran: Ran, ranks: int) -> None:
    references, found = ran(0), ran(ranks)
    for row in rows_of(ranks):
        if not (row.bug or row.case.more):
            (one,) = references[row.reference]
            try:
                if row.tolerance > 1e-5:
                    assert_near(one, found[row], row.tolerance)
                else:
                    assert_alike(one, found[row])
            except AssertionError as e:
                raise AssertionError(f"{row.case} {row.case.training}: {e}") from e
            assert all(rank.scales == one.scales for rank in found[row]), row.case


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_experts_divided_by_the_root_of_the_ranks(ran: Ran, stage: str) -> None:
    (one,) = ran(0)[LONG]
    ranks = ran(2)[replace(ROOT, case=replace(ROOT.case, backend=stage))]
    theirs = moe.assembled([rank.gradients[0] for rank in ranks])
    for name, grad in moe.assembled([one.gradients[0]]).items():
        factor = 2**0.5 if ".experts." in name else 1.0
        torch.testing.assert_close(theirs[name], grad * factor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_bugs_are_noticed(ran: Ran, bug: str, stage: str) -> None:
    (one,) = ran(0)[FAULTY]
    row = replace(FAULTY, case=replace(FAULTY.case, backend=stage), bug=bug)
    with pytest.raises(AssertionError):
        assert_alike(one, ran(2)[row])


# -- parameters that not all ranks use --------------------------------------------------------


class Branches(nn.Module):
    """A branch that only some batches take, one that none takes, tied and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 7)
        self.sometimes = nn.Linear(7, 7)
        self.never = nn.Linear(7, 5)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.shift = nn.Parameter(torch.tensor(0.3))
        self.out = nn.Linear(7, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor, branch: bool) -> Tensor:
        hidden = torch.tanh(self.frozen(self.embed(tokens))) * self.shift
        hidden = hidden + self.sometimes(hidden) if branch else hidden
        logits: Tensor = self.out(hidden)
        return logits


def train_branches(world: World, settings: Sequence[dict[str, Any]]) -> list[Any]:
    """Four updates of four batches each, one of which takes the branch in every other update."""
    from fairseq_lite.parallel.deepspeed_moe import backends
    from fairseq_lite.parallel.deepspeed_moe.settings import ZeroSettings

    found = []
    for each in settings:
        asked = ZeroSettings(**each)
        kind = backends.ZeroSharded if asked.stage else backends.Replicated
        backend = kind(asked, world)
        model = backend.wrap(Branches)
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = backend.adapt_optimizer(
            model, Adam(params, AdamConfig(weight_decay=0.1), lr=0.05)
        )
        norms = []
        for update in range(4):
            optimizer.zero_grad()
            mine = range(world.rank, 4, world.size)
            for i in mine:
                torch.manual_seed(10 * update + i)
                tokens = torch.randint(11, (5,))
                with backend.accumulate(model, last=i == mine[-1]):
                    logits = model(tokens, branch=i == 1 and update % 2 == 0)
                    loss = nn.functional.cross_entropy(logits, tokens.roll(1), reduction="sum")
                    backend.backward(model, loss)
            backend.reduce_gradients(model)
            optimizer.scale_gradients(world.size / 20)
            norms.append(float(backend.grad_norm(model)))
            optimizer.clip(norms[-1], 0.5)
            optimizer.step()
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found.append((norms, weights, len(optimizer.state)))
    world.close()
    return found


SETTINGS: list[dict[str, Any]] = [
    {"stage": 0},
    *(
        {"stage": stage, **more}
        for stage in (1, 2)
        for more in (
            {},
            {"reduce_bucket_size": 30},  # smaller than some parameters
            {"round_robin_gradients": True},
            {"use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": 60},
        )
    ),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_may_use_different_parameters(ranks: int) -> None:
    ((one_norms, one, _),) = run_distributed(train_branches, 1, SETTINGS[:1])[0]
    start = Branches().state_dict()
    settings = SETTINGS if ranks == 2 else [SETTINGS[0], SETTINGS[1], SETTINGS[7]]
    ran = run_distributed(train_branches, ranks, settings, timeout=300.0)
    for found in zip(settings, *ran, strict=True):
        for norms, weights, states in found[1:]:
            assert norms == pytest.approx(one_norms, rel=1e-5), found[0]
            for name, weight in weights.items():
                torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-5, msg=name)
                assert torch.equal(weight, found[1][1][name]), "the same on all ranks"
            # What nobody used is left as it is: no decay, no state.
            assert torch.equal(weights["never.weight"], start["never.weight"])
            assert states == 4


# -- checkpoints ------------------------------------------------------------------------------

DENSE = [*moe.MODELS["pair"], "--dropout", "0"]
STATES = {
    "moe": [*Case(2, training=(*ADAM, *AVERAGE)).flags],
    "dense": [*DENSE, *ADAM, *AVERAGE],
}
HOW = {"legacy_ddp": [], **moe.ZERO}
OTHER = {"zero1": "legacy_ddp", "zero2": "zero0", "legacy_ddp": "zero2", "zero0": "zero1"}


@dataclass
class State:
    """Where a rank is after some updates."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, moe.Piece] = field(default_factory=dict)
    average: dict[str, moe.Piece] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def updates(trainer: Trainer, batches: list[Any], start: int, stop: int) -> State:
    """Make updates as any number of ranks would, and say where that leads."""
    world, state = trainer.world, State()
    stream = itertools.cycle(batches)
    trainer.state.num_updates = start
    trainer.begin_epoch(1)
    for update in range(stop):
        dealt = [next(stream) for _ in range(4)]
        if update >= start:
            done = trainer.train_step(dealt[world.rank :: world.size])
            assert done is not None
            state.losses.append(done.sums["loss"] / done.sums["sample_size"])
            state.norms.append(done.grad_norm)
    # Of the gradient of a key's bias, which is rounding noise, Adam makes full steps.
    kept = {n: p for n, p in moe.weights_of(trainer.model).items() if not n.endswith(NOISE)}
    state.weights = kept
    assert trainer.average is not None
    state.average = {n: moe._piece(trainer.average.weights[n]) for n in kept}
    state.optimizer = {
        f"{number}.{key}": value.clone() if isinstance(value, Tensor) else value
        for number, entry in trainer.optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return state


def save(trainer: Trainer, path: Path, *, crashed: bool = False) -> None:
    average = None if trainer.average is None else trainer.average.weights
    backend = trainer.backend
    own = (backend.crash_parts if crashed else backend.save_parts)(
        trainer.model, trainer.optimizer, average
    )
    write(trainer.world, path, own, "a")


def checkpoints(
    world: World, data: Path, folder: Path, kinds: Sequence[str], files: Sequence[str]
) -> dict[tuple[str, str], State]:
    """Write a checkpoint of each kind, and go on from each of some files in every way.

    Args:
        world: the ranks.
        data: a data folder.
        folder: of the checkpoints: `KIND-RANKS-HOW.pt`.
        kinds: of `STATES`.
        files: their names, without the ending.

    Returns:
        (file, how) -> the state two updates later; how is "on" for the run that wrote it.
    """
    found: dict[tuple[str, str], State] = {}
    for kind, how in itertools.product(kinds, HOW):
        name = f"{kind}-{world.size}-{how}"
        trainer, batches = make_trainer(world, data, [*STATES[kind], *HOW[how]])
        updates(trainer, batches, 0, 2)
        save(trainer, folder / f"{name}.pt")
        if how in ("zero1", "zero2"):
            save(trainer, folder / f"{name}_crashed.pt", crashed=True)
        found[name, "on"] = updates(trainer, batches, 2, 4)
    world.barrier()
    for file, how in [(name, how) for name in files for how in readers(name)]:
        flags = [*STATES[file.partition("-")[0]], *HOW[how], "--seed", "9"]
        trainer, batches = make_trainer(world, data, flags)
        assert trainer.average is not None
        reader = CheckpointFiles(folder / f"{file}.pt")
        trainer.backend.load_parts(
            trainer.model, trainer.optimizer, reader, trainer.average.weights
        )
        found[file, how] = updates(trainer, batches, 2, 4)
    world.close()
    return found


def readers(file: str) -> tuple[str, ...]:
    """Who reads a checkpoint: whoever wrote it, and those that have another way.

    All of them what two ranks wrote of experts; else one other, each of them once.
    """
    kind, ranks, name = file.split("-")
    wrote, crashed, _ = name.partition("_crashed")
    if crashed:
        return (wrote, "legacy_ddp")
    if (kind, ranks) != ("moe", "2") and not moe.WHOLE_TABLES:
        return (wrote, OTHER[wrote])
    return tuple(HOW) if wrote in ("zero1", "zero2") else (wrote, "zero1", "zero2")


Found = dict[tuple[str, str], list[State]]


@pytest.fixture(scope="module")
def resumed(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Written on 4, 2 and 1 ranks, and read on each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    on_four = [f"moe-4-{how}" for how in HOW]
    on_two = [f"{kind}-2-{how}" for kind in STATES for how in HOW]
    crashed = [f"{kind}-2-{how}_crashed" for kind in STATES for how in ("zero1", "zero2")]
    plan = {
        4: (["moe"], on_four),
        2: (["moe", "dense"], [*on_two, *crashed, "moe-4-zero1", "moe-4-zero2"]),
        1: ([], ["moe-4-zero2", "moe-2-zero1", "dense-2-zero1", "dense-2-zero2"]),
    }
    found: Found = {}
    for ranks, (kinds, files) in plan.items():
        ran = run_distributed(checkpoints, ranks, toy_data, folder, kinds, files, timeout=400.0)
        for key in ran[0]:
            file, how = key
            found[file, f"{how} on {ranks}"] = [rank[key] for rank in ran]
    return found


def test_checkpoints_are_everybodys(resumed: Found) -> None:
    """Any stage and any number of ranks goes on from what any other wrote."""
    ends = {key: states for key, states in resumed.items() if not key[1].startswith("on on")}
    assert len(ends) == (14 + 28 + 8 + 8 + 16 if moe.WHOLE_TABLES else 8 + 22 + 8 + 4 + 10)
    for (file, how), states in ends.items():
        written_on = file.split("-")[1]
        went_on = resumed[file.removesuffix("_crashed"), f"on on {written_on}"]
        for state in states:
            assert state.losses == pytest.approx(went_on[0].losses, rel=1e-5), (file, how)
            assert state.norms == pytest.approx(went_on[0].norms, rel=1e-5), (file, how)
        for kind in ("weights", "average"):
            ours = moe.assembled([getattr(state, kind) for state in states])
            theirs = moe.assembled([getattr(state, kind) for state in went_on])
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                off = float((ours[name] - tensor).abs().max())
                assert off < 2e-5, f"{file} {how}: {kind} of {name}: {off}"


def test_the_same_ranks_go_on_to_the_last_bit(resumed: Found) -> None:
    compared = 0
    for (file, how), states in resumed.items():
        kind, ranks, wrote = file.split("-")
        went_on = resumed.get((file.removesuffix("_crashed"), f"on on {ranks}"))
        if went_on is None or how != f"{wrote.removesuffix('_crashed')} on {ranks}":
            continue
        compared += 1
        for state, other in zip(states, went_on, strict=True):
            assert (state.losses, state.norms) == (other.losses, other.norms), (file, how)
            assert_same(state.optimizer, other.optimizer, f"{file} {how}: optimizer")
            for (_, _, mine), (_, _, theirs) in zip(
                (*state.weights.values(), *state.average.values()),
                (*other.weights.values(), *other.average.values()),
                strict=True,
            ):
                assert torch.equal(mine, theirs), (file, how, kind)
    assert compared == 4 + 8 + 4
