"""Models that know nothing of sharding, and a memory that no rank has for the whole of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.criteria.fused import fused_smoothed_loss
from fairseq_lite.errors import FliteError
from fairseq_lite.parallel.fully_sharded.choice import FullyShardedConfig
from fairseq_lite.parallel.fully_sharded.torch_engine import TorchSharded
from fairseq_lite.parallel.legacy_ddp import LegacyDDP
from fairseq_lite.parallel.local import local
from fairseq_lite.parallel.world import World
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.timeout(180)

VOCABULARY, WIDTH = 11, 6
Batch = tuple[Tensor, Tensor, bool]


class Plain(nn.Module):
    """A plugin's model: shared embeddings, a branch some batches take, one that none takes.

    Each rank seeds differently, as a plugin might.
    """

    shift: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("shift", torch.tensor([0.25, -0.25] * (WIDTH // 2)))
        self.scale = torch.full((1,), 0.5)  # an attribute, not a buffer

    def forward(self, tokens: Tensor, branch: bool) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embed(tokens))) + self.shift * self.scale
        return hidden + self.sometimes(hidden) if branch else hidden

    @property
    def output_weight(self) -> Tensor:
        return self.out.weight


class Top(nn.Module):
    """Ends with a projection that only the criterion uses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed


class Layered(Plain):
    """The output projection, no longer shared, lies in a layer that is sharded by itself."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        del self.out
        self.top = Top()

    def forward(self, tokens: Tensor, branch: bool) -> Tensor:
        features: Tensor = self.top(super().forward(tokens, branch))
        return features

    @property
    def output_weight(self) -> Tensor:
        return self.top.out.weight

    def layers_to_shard(self) -> list[nn.Module]:
        return [self.hidden, self.top]


class Looking(Plain):
    """Cannot be built without memory: it looks at what was drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        with torch.no_grad():
            self.hidden.weight.mul_(1.0 / float(self.hidden.weight.abs().max()))


class Scalar(Plain):
    """Has a parameter without an axis, which torch cannot split."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.gain = nn.Parameter(torch.tensor(1.0))


def batches_of(update: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(update)
    batches = []
    for i in range(2 + update):
        n = int(torch.randint(1, 10, (), generator=generator))
        tokens = torch.randint(VOCABULARY, (n,), generator=generator)
        batches.append((tokens, tokens.roll(1), i == 1))
    return batches


def train(world: World, kind: type[Plain], sharded: bool) -> tuple[list[float], Any, bool]:
    """Losses, whole weights (on rank 0), and whether what nobody used has no gradient."""
    cfg = FullyShardedConfig()
    backend = TorchSharded(cfg, world) if sharded else LegacyDDP(cfg, world)
    model: Any = backend.wrap(lambda: kind(seed=world.rank))
    losses = []
    for update in range(5):
        dealt = batches_of(update)
        mine: list[Batch | None] = list(dealt[world.rank :: world.size])
        mine += [None] * (-(-len(dealt) // world.size) - len(mine))
        total, count = torch.zeros(()), sum(len(tokens) for tokens, _, _ in dealt)
        for i, batch in enumerate(mine):
            tokens, targets, branch = dealt[0] if batch is None else batch
            with backend.accumulate(model, last=i == len(mine) - 1):
                features = model(tokens, branch)
                # As the criterion does: outside the model's forward.
                loss = fused_smoothed_loss(features, model.output_weight, targets, 0.1, -1).loss
                loss = loss * float(batch is not None)
                backend.backward(model, loss)
            total += loss.detach()
        losses.append(float(world.all_reduce(total)) / count)
        backend.reduce_gradients(model)
        unused = model.never.weight.grad is None
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    local(p).sub_(local(p.grad), alpha=0.3 * world.size / count)
                    p.grad = None
    parts = backend.save_parts(model, None)
    weights = {k: v.clone() for part in parts.values() for k, v in part.model.items()}
    if world.size == 1:
        world.close()
    return losses, weights, unused


def train_both(world: World, kinds: tuple[type[Plain], ...]) -> list[Any]:
    found = []
    for kind in kinds:
        pair = [train(world, kind, sharded) for sharded in (False, True)]
        found.append(pair)
    return found


KINDS = (Plain, Layered, Looking)


@pytest.fixture(scope="module")
def on_two() -> list[list[Any]]:
    """By rank, kind, and whether sharded."""
    outcomes: list[list[Any]] = run_distributed(train_both, 2, KINDS)
    return outcomes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_model_trains_as_unsharded(kind: type[Plain], on_two: list[list[Any]]) -> None:
    alone = train_both_alone(kind)
    by_rank = [outcome[KINDS.index(kind)] for outcome in on_two]
    for (losses, _, unused), (sharded_losses, _, sharded_unused) in by_rank:
        assert sharded_losses == pytest.approx(losses, rel=1e-6)
        assert losses == pytest.approx(alone[0], rel=1e-6)
        assert unused and sharded_unused
    weights, sharded_weights = by_rank[0][0][1], by_rank[0][1][1]
    assert weights.keys() == sharded_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(sharded_weights[name], weight, rtol=0, atol=1e-6, msg=name)


def train_both_alone(kind: type[Plain]) -> tuple[list[float], Any, bool]:
    return run_distributed(train, 1, kind, False)[0]


def refuse(world: World) -> str:
    try:
        TorchSharded(FullyShardedConfig(), world).wrap(lambda: Scalar(seed=1))
    except FliteError as e:
        return str(e)
    finally:
        world.close()
    return "nothing"


def test_what_torch_cannot_split_is_refused_in_one_line() -> None:
    (line,) = run_distributed(refuse, 1)
    assert line.startswith("--ddp-backend fully_sharded cannot split this model: ")
    assert line.endswith("; use --ddp-backend legacy_ddp") and "\n" not in line


# -- memory -----------------------------------------------------------------------------------

LAYERS, LAYER_WIDTH = 40, 1000  # 160 MB in float32


class Large(nn.Module):
    def __init__(self, look: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(LAYER_WIDTH, LAYER_WIDTH) for _ in range(LAYERS))
        if look:  # then it is built in memory
            assert bool(self.layers[0].weight.isfinite().all())

    def layers_to_shard(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def build_large(world: World) -> tuple[float, float]:
    """By how much the peak of this process' memory grew, over the size of the model: twice."""
    whole = LAYERS * LAYER_WIDTH * (LAYER_WIDTH + 1) * 4
    backend = TorchSharded(FullyShardedConfig(), world)
    backend.wrap(lambda: nn.Linear(3, 3))  # what is imported on the way
    grown = []
    for look in (False, True):
        before = _peak()
        model = backend.wrap(lambda look=look: Large(look))
        held = sum(local(p).numel() for p in model.parameters())
        assert abs(held * 4 - whole / world.size) < 1e-3 * whole
        grown.append((_peak() - before) / whole)
        del model
    return grown[0], grown[1]


def _peak() -> float:
    # Not getrusage's: that begins with the peak of the process which started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.usefixtures("cold_ranks")  # what a rank inherits is memory, too
def test_no_rank_holds_the_whole_model_while_it_is_built() -> None:
    for grown, if_whole in run_distributed(build_large, 2):
        # Its half, and a layer or two on the way; the measure does see a model that is there.
        assert grown < 0.75
        assert grown + if_whole > 0.95
