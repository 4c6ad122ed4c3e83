"""The engine `fairscale` trains as one process does, and its checkpoints are everybody's.

On a CPU, where `tests/helpers/fairscale_shim.py` stands in for what it needs of CUDA.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import CheckpointError, TrainingError
from fairseq_lite.parallel.api import MAIN_PART, Part, PartReader
from fairseq_lite.parallel.fully_sharded.choice import FullyShardedConfig
from fairseq_lite.parallel.local import norm_of
from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.training import run as training_run
from fairseq_lite.training.checkpoint import store
from fairseq_lite.training.trainer import Trainer
from tests.helpers import fairscale_shim
from tests.helpers.distributed import run_distributed
from tests.helpers.parity import NOISE, Outcome, assert_alike, make_trainer, train
from tests.helpers.toy import ADAM, TINY_MODEL
from tests.helpers.training import arguments

# Looked for and not imported: ranks import this module, too, before the shim is in place.
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("fairscale") is None, reason="fairscale is not installed"),
]

BASE = [
    *(*TINY_MODEL, *ADAM, "--dropout", "0", "--clip-norm", "2.0", "--adam-betas", "0.9,0.98"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--store-ema", "--ema-decay", "0.9"),
]
UPDATES = 5  # in some of which a rank has no data
TORCH = ["--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0"]
FAIRSCALE = [*TORCH, "--fsdp-engine", "fairscale"]

CASES = {
    "plain": [],
    "no_reshard": ["--no-reshard-after-forward"],
    "offload": ["--cpu-offload"],
    "saving": ["--checkpoint-activations", "--offload-activations"],
    "at_once": ["--min-params-to-wrap", "100000"],
    "bf16": ["--bf16", "--fp32-reduce-scatter"],
}
EXACT = [name for name in CASES if name != "bf16"]
BUGS = ("Undivided", "DividedTwice", "LocalNorm", "OnlyTheLast", "Untied")


def bugs(engine: ModuleType) -> dict[str, Any]:
    """Engines with one fault each."""
    right: Any = engine.FairscaleSharded

    class Undivided(right):
        """Adds up gradients over ranks and forgets to divide."""

        def reduce_gradients(self, model: nn.Module) -> None:
            for p in model.parameters():
                p.grad.mul_(self.world.size)

    class DividedTwice(right):
        """Divides by the ranks once more, in one unit only."""

        def wrap(self, build: Any) -> Any:
            model = super().wrap(build)
            list(model.units())[-1].gradient_postdivide_factor *= self.world.size
            return model

    class LocalNorm(right):
        """Takes the norm of this rank's pieces for that of all."""

        def grad_norm(self, model: nn.Module) -> Tensor:
            norm: Tensor = norm_of((p.grad for p in model.parameters()), self.world.device)
            return norm

    class OnlyTheLast(right):
        """Forgets the gradients of all batches but the last."""

        def backward(self, model: nn.Module, loss: Tensor) -> None:
            for p in model.parameters():
                p.grad = None
            super().backward(model, loss)

    class Untied(right):
        """Makes a second copy of a shared matrix."""

        def wrap(self, build: Any) -> Any:
            def untied() -> Any:
                model = build()
                output = model.decoder.output_projection
                output.weight = nn.Parameter(output.weight.detach().clone())
                return model

            return super().wrap(untied)

    found = {k.__name__: k for k in (Undivided, DividedTwice, LocalNorm, OnlyTheLast, Untied)}
    assert tuple(found) == BUGS
    return found


# -- checkpoints in memory ----------------------------------------------------------------------


class Half(nn.Module):
    """Makes use of one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.out = (nn.Linear(4, 4) for _ in range(3))

    def layers_to_shard(self) -> list[nn.Module]:
        return [self.one, self.other]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.one(x))
        return out


class Parts(PartReader):
    """The parts of all ranks, in memory."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = parts

    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def manifest(self, name: str) -> Mapping[str, Any]:
        return self.parts[name].manifest

    def read(self, name: str) -> Part:
        if name not in self.parts:
            raise CheckpointError(f"{name} is missing")
        return self.parts[name]


def saved(world: World, trainer: Trainer, *, sharded: bool) -> dict[str, Part]:
    """What all ranks write, on every rank."""
    backend = trainer.backend
    if hasattr(backend.cfg, "use_sharded_state"):
        backend.cfg = dataclasses.replace(backend.cfg, use_sharded_state=sharded)
    assert trainer.average is not None
    mine = backend.save_parts(trainer.model, trainer.optimizer, trainer.average.weights)
    return {name: part for rank in world.gather_objects(dict(mine)) for name, part in rank.items()}


def loaded(
    world: World, data: Path, flags: list[str], parts: Mapping[str, Part]
) -> dict[str, Part]:
    """The full state of a trainer that began with other weights and took over `parts`."""
    trainer, _ = make_trainer(world, data, [*BASE, *flags, "--seed", "7"])
    assert trainer.average is not None
    trainer.backend.load_parts(
        trainer.model, trainer.optimizer, Parts(parts), trainer.average.weights
    )
    return saved(world, trainer, sharded=False)


def difference(one: Any, other: Any) -> str | None:
    """Where two states differ, down to the last bit; None: nowhere."""
    if isinstance(one, Mapping):
        if list(one) != list(other):
            return f"keys {list(one)} and {list(other)}"
        found = ((key, difference(value, other[key])) for key, value in one.items())
        return next((f"{key}: {text}" for key, text in found if text is not None), None)
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return None if same else f"{one} and {other}"
    return None if one == other and type(one) is type(other) else f"{one!r} and {other!r}"


def parts_differ(one: Mapping[str, Part], other: Mapping[str, Part]) -> str | None:
    """As `difference`, of full states; who wrote them does not matter."""
    a, b = one[MAIN_PART], other[MAIN_PART]
    return difference(
        {"model": a.model, "optimizer": a.optimizer, "average": a.average},
        {"model": b.model, "optimizer": b.optimizer, "average": b.average},
    )


# -- what ranks do ------------------------------------------------------------------------------


@dataclass
class Seen:
    """What there is to see of a trained model.

    Attributes:
        numbers: what the encoder by itself makes of a batch, summed up, and the batch's loss.
        parameters: how many there are over all ranks, and how many of them are trained.
        held: how many this rank has.
    """

    numbers: list[float]
    parameters: tuple[int, int]
    held: int


def look(trainer: Trainer) -> Seen:
    model, sample = trainer.model, trainer.dummy_batch
    model.eval()
    with trainer.backend.whole(model), torch.no_grad():
        states = model.encode(sample["net_input"]["src_tokens"]).states
        loss, _, _ = trainer.criterion(model, sample)
    held = sum(p.numel() for p in model.parameters())
    numbers = [float(states.square().sum()), float(loss)]
    return Seen(numbers, trainer.backend.num_parameters(model), held)


def cases(world: World, data: Path, names: tuple[str, ...]) -> dict[str, Outcome]:
    """Train the cases and bugs of these names."""
    engine = fairscale_shim.install()
    right, found = engine.FairscaleSharded, bugs(engine)
    outcomes = {}
    for name in names:
        engine.FairscaleSharded = found.get(name, right)  # type: ignore[attr-defined]
        flags = [*BASE, *FAIRSCALE, *CASES.get(name, [])]
        outcomes[name] = train(world, data, flags, UPDATES, look=look)
    engine.FairscaleSharded = right  # type: ignore[attr-defined]
    return outcomes


def trips(world: World, data: Path) -> dict[str, Any]:
    """torch's engine, whole and in shards -> fairscale's -> torch's."""
    torchs: Trainer = train(world, data, [*BASE, *TORCH], 3, look=lambda t: t).extra
    whole, shards = (saved(world, torchs, sharded=s) for s in (False, True))
    ours: Trainer = train(world, data, [*BASE, *FAIRSCALE], 3, look=lambda t: t).extra
    own, own_shards = (saved(world, ours, sharded=s) for s in (False, True))
    assert ours.average is not None
    ours.average.load(ours.model.upgrade_state_dict(whole[MAIN_PART].model))  # --ema-seed-model
    seeded = saved(world, ours, sharded=False)[MAIN_PART].average
    return {
        "whole": own,
        "shards": own_shards,
        "differences": {
            "torch whole -> fairscale": parts_differ(whole, loaded(world, data, FAIRSCALE, whole)),
            "torch shards -> fairscale": parts_differ(
                whole, loaded(world, data, FAIRSCALE, shards)
            ),
            "fairscale shards -> torch": parts_differ(own, loaded(world, data, TORCH, own_shards)),
            "seed of the average": difference(whole[MAIN_PART].model, seeded),
            "offloaded": parts_differ(
                own, loaded(world, data, [*FAIRSCALE, "--cpu-offload"], own_shards)
            ),
        },
    }


def unused_layer(world: World) -> str:
    """What is said of a layer that was not used."""
    engine = importlib.import_module("fairseq_lite.parallel.fully_sharded.fairscale_engine")
    backend = engine.FairscaleSharded(FullyShardedConfig(fsdp_engine="fairscale"), world)
    model = backend.wrap(Half)
    try:
        backend.backward(model, model(torch.ones(2, 4)).sum())
    except TrainingError as e:
        return str(e)
    return "nothing"


def run_command(world: World, words: list[str]) -> None:
    training_run.train(parse("flite-train", words, load_builtins()), world)


def two_ranks(world: World, data: Path, folder: Path) -> dict[str, Any]:
    found = {
        "cases": cases(world, data, (*CASES, *BUGS)),
        "trips": trips(world, data),
        "unused": unused_layer(world),
        # By itself, in this process for the sake of the shim.
        "single": train(SingleWorld(), data, [*BASE, *FAIRSCALE, "--cpu-offload"], UPDATES),
    }
    shards = found["trips"]["shards"]
    found["from two"] = loaded(SingleWorld(), data, FAIRSCALE, shards)
    shared = ["--use-sharded-state", "--eval-bleu"]
    run_command(world, chain(data, folder, *TORCH, *shared, "--max-update", "4"))
    run_command(world, chain(data, folder, *FAIRSCALE, *shared, "--max-update", "9"))
    return found


def three_ranks(world: World, data: Path, parts: dict[str, Part]) -> dict[str, Any]:
    return {
        "cases": cases(world, data, ("plain", "offload")),
        "from two": loaded(world, data, FAIRSCALE, parts),
    }


def chain(data: Path, folder: Path, *more: object) -> list[str]:
    """Arguments of a run that is continued from one command to the next."""
    return arguments(data, folder, "--dropout", "0", "--store-ema", "--ema-decay", "0.9", *more)


@cache
def on_two(data: Path, folder: Path) -> list[dict[str, Any]]:
    return run_distributed(two_ranks, 2, data, folder, timeout=270)


@cache
def on_three(data: Path, folder: Path) -> list[dict[str, Any]]:
    parts = on_two(data, folder)[0]["trips"]["shards"]
    return run_distributed(three_ranks, 3, data, parts, timeout=270)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks leave the checkpoints of a run."""
    return tmp_path_factory.mktemp("fairscale") / "run"


@cache
def alone(data: Path) -> Outcome:
    return train(SingleWorld(), data, BASE, UPDATES, look=look)


# -- what must be -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_train_as_one(case: str, toy_data: Path, folder: Path) -> None:
    outcomes = [rank["cases"][case] for rank in on_two(toy_data, folder)]
    one = alone(toy_data)
    assert_alike(one, outcomes)
    for outcome in outcomes:
        assert outcome.extra.numbers == pytest.approx(one.extra.numbers, rel=1e-5)
        assert outcome.extra.parameters == one.extra.parameters == (one.extra.held,) * 2
        assert outcome.extra.held <= one.extra.held / 2 + 3  # and what fills up a row of each unit


def test_one_rank_trains_as_without_it(toy_data: Path, folder: Path) -> None:
    assert_alike(alone(toy_data), [on_two(toy_data, folder)[0]["single"]])


def test_sixteen_bits_train_as_in_one_process(toy_data: Path, folder: Path) -> None:
    one = train(SingleWorld(), toy_data, [*BASE, "--bf16"], UPDATES)
    for rank in on_two(toy_data, folder):
        outcome = rank["cases"]["bf16"]
        assert outcome.losses != alone(toy_data).losses
        assert outcome.losses == pytest.approx(one.losses, rel=5e-3)
        assert outcome.norms == pytest.approx(one.norms, rel=5e-2)


@pytest.mark.parametrize("case", ["plain", "offload"])
def test_three_ranks_train_as_one(case: str, toy_data: Path, folder: Path) -> None:
    assert_alike(alone(toy_data), [rank["cases"][case] for rank in on_three(toy_data, folder)])


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str, toy_data: Path, folder: Path) -> None:
    with pytest.raises(AssertionError):
        assert_alike(alone(toy_data), [rank["cases"][bug] for rank in on_two(toy_data, folder)])


def test_a_layer_that_was_not_used_is_named_as_the_cause(toy_data: Path, folder: Path) -> None:
    for rank in on_two(toy_data, folder):
        assert rank["unused"] == (
            "a layer was not used in the forward pass, and --fsdp-engine fairscale waits for all "
            "of them: use --fsdp-engine torch"
        )


def test_checkpoints_of_either_engine_load_in_the_other(toy_data: Path, folder: Path) -> None:
    for rank in on_two(toy_data, folder):
        assert set(rank["trips"]["differences"].values()) == {None}, rank["trips"]["differences"]


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_one_process_loads_what_fairscale_wrote(kind: str, toy_data: Path, folder: Path) -> None:
    trips = on_two(toy_data, folder)[0]["trips"]
    assert parts_differ(trips["whole"], loaded(SingleWorld(), toy_data, [], trips[kind])) is None


def test_shards_of_two_ranks_load_on_one_and_on_three(toy_data: Path, folder: Path) -> None:
    two = on_two(toy_data, folder)[0]
    for found in (two, on_three(toy_data, folder)[0]):
        assert parts_differ(two["trips"]["whole"], found["from two"]) is None


def test_a_run_goes_from_torch_to_fairscale_to_one_process(
    toy_data: Path, folder: Path, tmp_path: Path
) -> None:
    on_two(toy_data, folder)
    assert sorted(p.name for p in folder.glob("checkpoint_last*")) == [
        "checkpoint_last-shard0.pt",
        "checkpoint_last-shard1.pt",
    ]
    # Two batches an update, as two ranks make them.
    for place in (folder, tmp_path / "alone"):
        words = chain(toy_data, place, "--update-freq", "2", "--max-update", "12")
        run_command(SingleWorld(), words)
    ends = [store.load(p / "checkpoint_last.pt") for p in (folder, tmp_path / "alone")]
    for section in (lambda s: s["model"], lambda s: s["extra_state"]["ema"]):
        mine, theirs = map(section, ends)
        assert list(mine) == list(theirs)
        for name, tensor in mine.items():
            if not name.endswith(NOISE):
                torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)
