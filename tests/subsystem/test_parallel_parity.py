"""Several ranks train as one process that sees all the data, and each way not to is noticed.

Each planted bug is a backend with one fault that real ones have had; the comparison must reject it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel import legacy_ddp
from fairseq_lite.parallel.api import Part, PartReader
from fairseq_lite.parallel.legacy_ddp import LegacyDDP, local_norm
from fairseq_lite.parallel.world import SingleWorld, World
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.timeout(120)

Batch = tuple[Tensor, Tensor, bool]
UPDATES = 5
VOCABULARY, DIM = 11, 8


class Toy(nn.Module):
    """Tied embeddings, a branch that only some batches take and one that none takes."""

    scale: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.hidden = nn.Linear(DIM, DIM)
        self.sometimes = nn.Linear(DIM, DIM)
        self.never = nn.Linear(DIM, DIM)
        self.out = nn.Linear(DIM, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.full((1,), 1.0 + seed))

    def forward(self, tokens: Tensor, branch: bool) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embed(tokens))) * self.scale
        if branch:
            hidden = hidden + self.sometimes(hidden)
        logits: Tensor = self.out(hidden)
        return logits


class Undivided(LegacyDDP):
    """Sums gradients over ranks and forgets to divide."""

    def reduce_gradients(self, model: nn.Module) -> None:
        super().reduce_gradients(model)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(self.world.size)


class Unreduced(LegacyDDP):
    """Divides and forgets to exchange."""

    def reduce_gradients(self, model: nn.Module) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(self.world.size)


class LocalNorm(LegacyDDP):
    """Takes the norm of this rank's gradients instead of everybody's."""

    def reduce_gradients(self, model: nn.Module) -> None:
        self.before = local_norm(model.parameters(), self.world.device)
        super().reduce_gradients(model)

    def grad_norm(self, model: nn.Module) -> Tensor:
        return self.before


class SharedTwice(LegacyDDP):
    """Counts a parameter with two names twice."""

    def grad_norm(self, model: nn.Module) -> Tensor:
        names = model.named_parameters(remove_duplicate=False)
        return local_norm((p for _, p in names), self.world.device)


class LeavesOutUnused(LegacyDDP):
    """Drops what others found for a parameter this rank did not use."""

    def reduce_gradients(self, model: nn.Module) -> None:
        unused = [p for p in model.parameters() if p.grad is None]
        super().reduce_gradients(model)
        for p in unused:
            p.grad = None


class NoBroadcast(LegacyDDP):
    """Starts every rank from its own weights."""

    def wrap(self, build: Any) -> Any:
        return build()


BUGS = (Undivided, Unreduced, LocalNorm, SharedTwice, LeavesOutUnused, NoBroadcast)


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    never_used: bool


def batches_of_an_update(update: int) -> list[Batch]:
    """Three to seven batches of one to nine examples."""
    generator = torch.Generator().manual_seed(100 + update)
    count = 3 + update
    batches = []
    for i in range(count):
        n = int(torch.randint(1, 10, (), generator=generator))
        tokens = torch.randint(VOCABULARY, (n,), generator=generator)
        targets = torch.randint(VOCABULARY, (n,), generator=generator)
        batches.append((tokens, targets, i == 1))
    return batches


def train(world: World, kind: type[LegacyDDP]) -> Outcome:
    """A trainer in small: sums, one division, dummy batches where a rank has no data."""
    backend = kind(None, world)
    model = backend.wrap(lambda: Toy(seed=world.rank))  # a plugin that forgets to seed alike
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    losses, norms = [], []
    for update in range(UPDATES):
        dealt = batches_of_an_update(update)
        steps = math.ceil(len(dealt) / world.size)
        mine: list[Batch | None] = list(dealt[world.rank :: world.size])
        mine += [None] * (steps - len(mine))
        sums = {"loss": 0.0, "sample_size": 0.0}
        optimizer.zero_grad()
        for i, batch in enumerate(mine):
            tokens, targets, branch = dealt[0] if batch is None else batch
            weight = 0.0 if batch is None else 1.0
            with backend.accumulate(model, last=i == len(mine) - 1):
                loss = nn.functional.cross_entropy(model(tokens, branch), targets, reduction="sum")
                backend.backward(model, loss * weight)
            sums["loss"] += loss.item() * weight
            sums["sample_size"] += len(tokens) * weight
        totals = world.sum(sums)
        backend.reduce_gradients(model)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, world.size / totals["sample_size"])
        norms.append(float(backend.grad_norm(model)))
        losses.append(totals["loss"] / totals["sample_size"])
        optimizer.step()
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return Outcome(losses, norms, weights, model.never.weight.grad is not None)


def train_all(world: World, kinds: tuple[type[LegacyDDP], ...]) -> list[Outcome]:
    legacy_ddp.BUCKET_ELEMENTS = 100  # several buckets, even for a toy
    return [train(world, kind) for kind in kinds]


@cache
def on_ranks(size: int) -> list[list[Outcome]]:
    """[rank][kind], the right backend first."""
    return run_distributed(train_all, size, (LegacyDDP, *BUGS))


@cache
def alone() -> Outcome:
    return train(SingleWorld(), LegacyDDP)


def assert_all_equal(one: Outcome, outcomes: list[Outcome]) -> None:
    for other in outcomes:
        assert other.losses == pytest.approx(one.losses, rel=1e-6)
        assert other.norms == pytest.approx(one.norms, rel=1e-6)
        for name, weight in one.weights.items():
            torch.testing.assert_close(other.weights[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one_process(size: int) -> None:
    outcomes = [by_kind[0] for by_kind in on_ranks(size)]
    assert_all_equal(alone(), outcomes)
    # As in one process, where the optimizer skips it.
    assert not any(outcome.never_used for outcome in outcomes)
    for name, weight in outcomes[0].weights.items():  # among ranks: to the bit
        assert all(torch.equal(o.weights[name], weight) for o in outcomes)
    assert all(o.norms == outcomes[0].norms for o in outcomes)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_noticed(bug: type[LegacyDDP], size: int) -> None:
    outcomes = [by_kind[1 + BUGS.index(bug)] for by_kind in on_ranks(size)]
    with pytest.raises(AssertionError):
        assert_all_equal(alone(), outcomes)


class Parts(PartReader):
    """Parts in memory."""

    def __init__(self, parts: dict[str, Part] | None) -> None:
        self.parts = parts

    def names(self) -> tuple[str, ...]:
        return ("model",)

    def manifest(self, name: str) -> dict[str, Any]:
        return {}

    def read(self, name: str) -> Part:
        if self.parts is None:
            raise CheckpointError("checkpoint_last.pt is cut short")
        return self.parts[name]


def save_then_load(world: World, parts: dict[str, Part] | None) -> tuple[Any, ...]:
    """Load `parts` (rank 0 alone has them), or make some when there are none."""
    backend = LegacyDDP(None, world)
    model = backend.wrap(lambda: Toy(seed=3 + world.rank))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if parts is None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return dict(backend.save_parts(model, optimizer)), model.state_dict()
    mine = parts if world.is_main else {}
    backend.load_parts(model, optimizer, Parts(mine))
    return model.state_dict(), optimizer.state_dict()


def load_what_is_broken(world: World) -> str:
    model = Toy(seed=1)
    try:
        LegacyDDP(None, world).load_parts(model, None, Parts(None))
    except CheckpointError as e:
        return str(e)
    return "nothing"


def test_parts_written_by_two_ranks_load_on_one_and_three() -> None:
    saved = run_distributed(save_then_load, 2, None)
    parts = saved[0][0]
    assert saved[1][0] == {}  # rank 1 writes nothing
    for size in (1, 3):
        for weights, optimizer in run_distributed(save_then_load, size, parts):
            for name, weight in saved[0][1].items():
                assert torch.equal(weights[name], weight)
            for i, state in parts["model"].optimizer["state"].items():
                assert torch.equal(optimizer["state"][i]["exp_avg"], state["exp_avg"])
                assert optimizer["state"][i]["step"] == 1


def test_a_broken_part_is_an_error_on_every_rank() -> None:
    assert run_distributed(load_what_is_broken, 2) == ["checkpoint_last.pt is cut short"] * 2


def exchange(world: World) -> dict[str, Any]:
    names: dict[str, float | Tensor] = {
        "a": world.rank + 1,
        "b": torch.tensor(2.5, dtype=torch.float32),
    }
    return {
        "sum": world.sum(names),
        "order": list(world.sum({"b": 1, "a": 1})),
        "other names": world.sum({"a": 1.0} if world.rank else {"a": 1.0, "c": 2.0}),
        "many": world.sum({f"key{i}": float(i) for i in range(150)}),
        "exact": world.sum({"tokens": 2**40 + 1})["tokens"],
        "broadcast": world.broadcast_object({"from": world.rank}, src=1),
        "state": world.broadcast_state({"x": [torch.full((2,), world.rank), world.rank]}, src=1),
        "gather": world.gather_objects(world.rank * 10),
        "max": world.max(-float(world.rank)),
        "reduced": world.all_reduce(torch.tensor([world.rank]), "min").tolist(),
        "places": (world.rank, world.size, world.local_rank, world.is_main),
    }


def test_what_ranks_exchange() -> None:
    for rank, got in enumerate(run_distributed(exchange, 2)):
        assert got["sum"] == {"a": 3.0, "b": 5.0}
        assert got["order"] == ["b", "a"]
        assert got["other names"] == {"a": 2.0, "c": 2.0}
        assert got["many"] == {f"key{i}": 2.0 * i for i in range(150)}
        assert got["exact"] == 2**41 + 2
        assert got["broadcast"] == {"from": 1}
        assert got["state"]["x"][0].tolist() == [1, 1] and got["state"]["x"][1] == 1
        assert got["gather"] == [0, 10]
        assert got["max"] == 0.0
        assert got["reduced"] == [0]
        assert got["places"] == (rank, 2, rank, rank == 0)
