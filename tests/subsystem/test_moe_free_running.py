"""Ranks that call layers of experts at their own pace get what one process with all of them has."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.errors import ConfigError, DistributedError
from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.moe.options import MoEOptions, RouterOptions
from fairseq_lite.parallel import free
from fairseq_lite.parallel.experts import spread_over
from fairseq_lite.parallel.free import Rounds, free_running
from fairseq_lite.parallel.world import World
from tests.helpers.commands import left_running
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Shape:
    """A layer: experts, width, experts of a token."""

    experts: int
    width: int
    top_k: int = 2


# Models that run together: of one shape, of several, with exchange groups of different sizes.
ENSEMBLES = {
    "as many as ranks": [[Shape(4, 32)] * 2],
    "more than ranks, not divisible": [[Shape(7, 32), Shape(5, 32, top_k=1)]],
    "fewer than ranks": [[Shape(2, 32), Shape(2, 32, top_k=1)]],
    "fewer than ranks, not divisible": [[Shape(3, 32)]],
    "other widths and group sizes": [[Shape(4, 32)], [Shape(2, 5), Shape(6, 64, top_k=1)]],
}


def build(shapes: list[list[Shape]]) -> list[nn.ModuleList]:
    """Models with weights that depend on nothing but the shapes."""
    torch.manual_seed(5)
    models = []
    for number, model in enumerate(shapes):
        layers = []
        for place, shape in enumerate(model):
            router = RouterOptions(shape.experts, shape.top_k)  # type: ignore[arg-type]
            options = MoEOptions(every=1, router=router, ffn_dim=32)
            make = expert_of(shape.width)
            layers.append(MoELayer(shape.width, options, make, f"{number}.{place}"))
        models.append(nn.ModuleList(layers).eval())
    return models


def expert_of(width: int) -> Callable[[], nn.Module]:
    return lambda: Inner(width)


class Inner(nn.Module):
    """What a transformer's expert is, without its options."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 32)
        self.fc2 = nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def one_call(rng: random.Random, mine: list[nn.ModuleList], whole: list[nn.ModuleList]) -> bool:
    """Call one layer, here and by all ranks; whether both gave the same.

    To the last bit, where rows are as wide as the processor's vectors: it adds up the numbers of
    others in an order that depends on where they lie in memory.
    """
    model = rng.randrange(len(mine))
    layer = rng.randrange(len(mine[model]))
    ours, theirs = mine[model][layer], whole[model][layer]
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    rows = rng.choice([0, 1, 2, 17, 40])
    x = torch.randn(rows, ours.gate.wg.in_features, generator=generator)
    cast = rng.random() < 0.4
    context = torch.inference_mode() if rng.random() < 0.5 else torch.no_grad()
    with context, torch.autocast("cpu", dtype=torch.bfloat16) if cast else nullcontext():
        found, expected = ours(x)[0], theirs(x)[0]
    if x.size(1) % 32:
        return torch.allclose(found, expected, atol=0.02 if cast else 1e-6)
    return found.dtype == expected.dtype and torch.equal(found, expected)


def run_programs(world: World, seeds: int, bug: str = "") -> dict[str, list[bool]]:
    """Random programs on every ensemble; whether each call of this rank was right."""
    put_in(bug, world)
    found: dict[str, list[bool]] = {}
    for name, shapes in ENSEMBLES.items():
        with spread_over(world, regroup=True):
            mine = build(shapes)
        whole = build(shapes)
        found[name] = []
        for seed in range(seeds):
            rng = random.Random(f"{name} {seed} {world.rank}")
            # Some ranks call often, some never.
            calls = rng.choice([0, 1, 3, 12])
            with free_running(mine, world):
                for _ in range(calls):
                    if rng.random() < 0.2:
                        time.sleep(0.02)
                    found[name].append(one_call(rng, mine, whole))
        # Outside, all ranks call the same layers again.
        x = torch.randn(6, shapes[0][0].width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found[name].append(torch.allclose(mine[0][0](x)[0], whole[0][0](x)[0], atol=1e-6))
    return found


def put_in(bug: str, world: World) -> None:
    if bug == "stops serving early" and world.rank == 1:
        Rounds.serve = lambda self: world.barrier()  # type: ignore[method-assign]
    if bug == "a done rank forgets autocast":
        free._cast = lambda device: None  # type: ignore[assignment]
    if bug == "experts in another order":
        compute = Rounds._compute

        def reversed_counts(self: Rounds, wish: Any, counts: list[int], rows: Tensor) -> Tensor:
            own = 0 if wish is None else len(free._owned(self._hosts[wish.layer]))
            return compute(self, wish, counts[:own][::-1] + counts[own:], rows)

        Rounds._compute = reversed_counts  # type: ignore[method-assign]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_programs(world_size: int) -> None:
    found = run_distributed(run_programs, world_size, 6, timeout=200)
    for name in ENSEMBLES:
        calls = [call for each in found for call in each[name]]
        assert calls and all(calls), name
    if world_size > 1:
        assert len({len(each["as many as ranks"]) for each in found}) > 1, "ranks call as often"


@pytest.mark.parametrize("bug", ["a done rank forgets autocast", "experts in another order"])
def test_a_wrong_number_is_noticed(bug: str) -> None:
    try:
        found = run_distributed(run_programs, 2, 6, bug, timeout=200)
    except DistributedError:  # some experts refuse to compute rows of another type at all
        found = [{"refused": [False]}]
    assert not all(call for each in found for calls in each.values() for call in calls)


def test_a_rank_that_stops_serving_is_noticed() -> None:
    with pytest.raises(DistributedError):
        run_distributed(run_programs, 2, 6, "stops serving early", timeout=30)
    assert left_running() == []


# -- errors ---------------------------------------------------------------------------------------


def go_wrong(world: World, how: str, when: Path) -> str:
    """Rank 1 does not come to its end; the others call layers, or wait as long as it takes."""
    with spread_over(world, regroup=True):
        models = build([[Shape(4, 32)]])
    if how == "grad":
        refused = pytest.raises(RuntimeError, match="gradients do not travel")
        with refused, free_running(models, world):
            models[0][0](torch.ones(2, 32))
        return "refused"
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(free_running(models, world))
        for number in range(3 if world.rank != 1 else 1):
            models[0][0](torch.ones(2 + number, 32))
        if world.rank == 1:
            when.write_text(str(time.monotonic()))
            if how == "error":
                raise ConfigError("--min-len 9 is too long")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    return "done"


def test_gradients_are_refused(tmp_path: Path) -> None:
    assert run_distributed(go_wrong, 2, "grad", tmp_path / "when") == ["refused", "refused"]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("error", ConfigError, "--min-len 9 is too long"),
        ("killed", DistributedError, "rank 1 died"),
        ("frozen", DistributedError, "rank 1 has not answered"),
    ],
)
def test_a_rank_that_goes_wrong_is_named(
    how: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    when = tmp_path / "when"
    with pytest.raises(error, match=message):
        run_distributed(go_wrong, 3, how, when, timeout=200, heartbeat=5)
    assert time.monotonic() - float(when.read_text()) < 60
    assert left_running() == []
