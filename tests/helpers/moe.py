"""Models with experts, trained on any ranks, and how they compare with one process that has all.

A `Case` is one row of the table: model, experts, choices of a token, backend, layer. What makes it
harder than a dense model is that no two ranks hold the same parameters. Each rank therefore says
what it has of which tensor, and `assembled` puts that together and compares what several ranks
have.

Losses that balance experts are not linear in the batch. The one process runs the batches of all
ranks as micro-batches of its own, which is the same sum.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.parallel.experts import expert_parameters
from fairseq_lite.parallel.fully_sharded.torch_engine import TorchSharded
from fairseq_lite.parallel.local import local, rows_of
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import Sample
from fairseq_lite.training.trainer import Trainer
from tests.helpers.commands import flite
from tests.helpers.parity import DEALT, make_trainer
from tests.helpers.toy import write_text

UPDATES = 2

# Every combination, where tests otherwise have each two of a row's values meet once.
WHOLE_TABLES = bool(os.environ.get("FLITE_WHOLE_TABLES"))

# Two layers a side, of which the second has experts. Widths that no number of ranks divides.
MODELS = {
    "pair": [
        *("--arch", "transformer_tiny", "--share-all-embeddings"),
        *("--encoder-embed-dim", "18", "--encoder-ffn-embed-dim", "30", "--encoder-layers", "2"),
        *("--decoder-embed-dim", "18", "--decoder-ffn-embed-dim", "30", "--decoder-layers", "2"),
    ],
    "lm": [
        *("--task", "language_modeling", "--arch", "transformer_lm"),
        *("--decoder-embed-dim", "18", "--decoder-ffn-embed-dim", "30", "--decoder-layers", "2"),
        *("--decoder-input-dim", "18", "--decoder-output-dim", "18"),
        *("--decoder-attention-heads", "2", "--share-decoder-input-output-embed"),
        *("--tokens-per-sample", "12", "--batch-size", "2"),
    ],
}
BACKENDS = {
    "legacy_ddp": [],
    "fully_sharded": ["--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0"],
}
ZERO = {f"zero{n}": ["--ddp-backend", "deepspeed_moe", "--zero-stage", str(n)] for n in range(3)}
TRAINING = ["--optimizer", "nag", "--lr", "0.05", "--momentum", "0.9", "--clip-norm", "0.5"]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        experts: E.
        top: choices of a token.
        model: of `MODELS`.
        backend: of `BACKENDS` or `ZERO`.
        layer: of `LAYERS`.
        training: optimizer and what else one process has, too.
        more: flags that one process has not.
    """

    experts: int
    top: int = 2
    model: str = "pair"
    backend: str = "legacy_ddp"
    layer: str = "native"
    training: tuple[str, ...] = tuple(TRAINING)
    more: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """Of flite-train."""
        layer = LAYERS[self.layer](self)
        return [*layer, *self.training, *(BACKENDS | ZERO)[self.backend], *self.more]

    @property
    def reference(self) -> Case:
        """What one process trains to compare with."""
        return replace(self, backend="legacy_ddp", layer="native", more=())

    def __str__(self) -> str:
        words = [self.model, self.backend, self.layer, f"E{self.experts}", f"top{self.top}"]
        words += [self.training[1], *(word.strip("-") for word in self.more)]
        return "-".join(words)


def native(case: Case) -> list[str]:
    """The model's flags with the project's own layer."""
    return [
        *MODELS[case.model],
        *("--moe-freq", "2", "--moe-expert-count", str(case.experts)),
        *(["--moe-top1-expert"] if case.top == 1 else ["--moe-second-expert-policy", "all"]),
        *("--dropout", "0"),
        *("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.05"),
    ]


LAYERS: dict[str, Callable[[Case], list[str]]] = {"native": native}


def make_lm_data(folder: Path) -> Path:
    """A data folder of toy text in one language."""
    text = write_text(folder / "text", {"train": 200, "valid": 20})
    prefixes = [f"--{split}pref={text / split}.src" for split in ("train", "valid")]
    assert flite("preprocess", "--only-source", *prefixes, "--destdir", folder / "data-bin") == 0
    return folder / "data-bin"


# -- what a rank has ----------------------------------------------------------------------------

Piece = tuple[tuple[int, ...], int, Tensor]
"""A stretch of a tensor: the whole one's shape, how many numbers come before, the numbers."""


def weights_of(model: nn.Module) -> dict[str, Piece]:
    """What this rank has of every parameter; all ranks ask."""
    if hasattr(model, "flats"):  # rows, of fairscale
        return _rows((flat, flat.piece) for flat in model.flats)
    return {name: _piece(param) for name, param in model.named_parameters()}


def gradients_of(model: nn.Module, backend: Any = None) -> dict[str, Piece]:
    """The same of the gradients there are."""
    if hasattr(backend, "partition"):  # fragments, of ZeRO
        return {
            name: (each.span.shape, each.span.start, each.tensor.grad.cpu().flatten().clone())
            for name, each in backend.partition.fragments.items()
            if each.tensor.grad is not None
        }
    if hasattr(model, "flats"):
        rows = ((flat, flat.param.grad) for flat in model.flats)
        return _rows((flat, grad) for flat, grad in rows if grad is not None)
    named = model.named_parameters()
    return {name: _piece(param.grad) for name, param in named if param.grad is not None}


def _piece(tensor: Tensor) -> Piece:
    numbers = torch.arange(tensor.numel()).view(tensor.shape)
    start = int(rows_of(numbers, tensor).flatten()[:1].sum())  # a rank without rows begins anywhere
    return tuple(tensor.shape), start, local(tensor).detach().cpu().flatten().clone()


def _rows(rows: Iterable[tuple[Any, Tensor]]) -> dict[str, Piece]:
    spans = {name: span for flat, row in rows for name, span in flat.spans(row).items()}
    return {n: (tuple(s.shape), s.start, s.values.cpu().clone()) for n, s in spans.items()}


def assembled(ranks: Sequence[Mapping[str, Piece]]) -> dict[str, Tensor]:
    """Whole tensors of what ranks have; what several have must be the same to the bit."""
    whole: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, pieces in enumerate(ranks):
        for name, (shape, start, values) in pieces.items():
            assert shapes.setdefault(name, shape) == shape, name
            flat = whole.setdefault(name, torch.full((math.prod(shape),), math.nan))
            there = flat[start : start + values.numel()]
            known = ~there.isnan()
            assert torch.equal(there[known], values[known]), f"{name} is another one on rank {rank}"
            there.copy_(values)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"a part of {name} is nowhere"
    return {name: tensor.view(shapes[name]) for name, tensor in whole.items()}


# -- training -----------------------------------------------------------------------------------


@dataclass
class Trained:
    """What a run of a few updates left on one rank.

    Attributes:
        losses: of each update, by the sample size.
        norms: of the gradients, before clipping.
        gradients: of each update, as the norm is taken of.
        weights: at the end.
        average: the moving average, where there is one.
        scales: of float16.
        parameters: how many there are, and experts': of all ranks.
        held: numbers of parameters that this rank holds.
        extra: what `look` returned.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Piece]] = field(default_factory=list)
    weights: dict[str, Piece] = field(default_factory=dict)
    average: dict[str, Piece] = field(default_factory=dict)
    scales: list[float | None] = field(default_factory=list)
    parameters: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    held: int = 0
    extra: Any = None


def train(
    world: World,
    data: Path,
    flags: Sequence[str],
    *,
    updates: int = UPDATES,
    plant: Callable[[Trainer], None] | None = None,
    look: Callable[[Trainer], Any] | None = None,
) -> Trained:
    """Make `updates` updates by the real trainer, the same data dealt to any number of ranks.

    Args:
        world: the ranks.
        data: a data folder.
        flags: of flite-train.
        updates: how many.
        plant: puts a fault into the trainer.
        look: called with the trainer at the end, on every rank.
    """
    trainer, batches = make_trainer(world, data, flags)
    found = Trained()
    _listen(trainer, found)
    if plant is not None:
        plant(trainer)
    stream = itertools.cycle(batches)
    trainer.begin_epoch(1)
    for update in range(updates):
        count = DEALT[update]
        dealt = [next(stream) for _ in range(count)]
        mine: list[Sample | None] = list(dealt[world.rank :: world.size])
        mine += [None] * (math.ceil(count / world.size) - len(mine))
        done = trainer.train_step(mine)
        found.scales.append(trainer.precision.loss_scale)
        if done is not None:
            found.losses.append(done.sums["loss"] / done.sums["sample_size"])
            found.norms.append(done.grad_norm)
    model, backend = trainer.model, trainer.backend
    found.weights = weights_of(model)
    if trainer.average is not None:
        found.average = {n: _piece(t) for n, t in trainer.average.weights.items()}
    found.parameters = backend.num_parameters(model), backend.num_expert_parameters(model)
    found.held = sum(local(p).numel() for p in model.parameters())
    if look is not None:
        found.extra = look(trainer)
    return found


def _listen(trainer: Trainer, found: Trained) -> None:
    """Write down the gradients of every update as they are when their norm is taken."""
    norm = trainer.backend.grad_norm

    def listening(model: nn.Module) -> Tensor:
        found.gradients.append(gradients_of(model, trainer.backend))
        return norm(model)

    trainer.backend.grad_norm = listening  # type: ignore[method-assign]


def assert_alike(
    one: Trained,
    ranks: Sequence[Trained],
    *,
    tolerance: float = 1e-5,
    without: Sequence[str] = (),
) -> None:
    """Equal losses, gradients, norms and weights, within `tolerance`.

    Losses and norms relative to themselves; a gradient's elements to the norm of all gradients, and
    each gradient as a whole, but for rounding, to itself (1e-3): small ones must be right, too.

    Args:
        one: of one process.
        ranks: of every rank.
        tolerance: see above; absolute for weights.
        without: ends of names of weights that are left out: `NOISE`, where the optimizer makes
            steps of full size of gradients that are rounding noise.
    """
    for rank in ranks:
        assert rank.losses == pytest.approx(one.losses, rel=tolerance)
        assert rank.norms == pytest.approx(one.norms, rel=tolerance)
        assert rank.norms == ranks[0].norms, "one number on all ranks"
        assert rank.parameters == one.parameters
    for update, norm in enumerate(one.norms):
        mine = assembled([one.gradients[update]])
        theirs = assembled([rank.gradients[update] for rank in ranks])
        _assert_close(mine, theirs, tolerance * norm, f"update {update + 1}, gradient of ")
        for name, grad in mine.items():
            off = float((theirs[name] - grad).norm())
            assert off <= 1e-3 * float(grad.norm()) + 1e-6 * norm, f"gradient of {name}: {off}"
    for kind in ("weights", "average"):
        mine = assembled([getattr(one, kind)])
        theirs = assembled([getattr(rank, kind) for rank in ranks])
        _assert_close(mine, theirs, tolerance, kind + " of ", without)


def _assert_close(
    mine: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    tolerance: float,
    what: str,
    without: Sequence[str] = (),
) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if not name.endswith(tuple(without)):
            off = float((theirs[name] - tensor).abs().max())
            assert off <= tolerance, f"{what}{name} is off by {off}"


# -- faults that real backends have had ---------------------------------------------------------


def undivided(trainer: Trainer) -> None:
    """Experts' gradients are summed and not divided."""
    right = trainer.backend.reduce_gradients

    def wrong(model: nn.Module) -> None:
        right(model)
        for param, _ in expert_parameters(model):
            if param.grad is not None:
                local(param.grad).mul_(trainer.world.size)

    trainer.backend.reduce_gradients = wrong  # type: ignore[method-assign]


def left_out_of_the_norm(trainer: Trainer) -> None:
    """The norm is that of the shared gradients."""
    right = trainer.backend.grad_norm

    def wrong(model: nn.Module) -> Tensor:
        kept = [(param, param.grad) for param, _ in expert_parameters(model)]
        for param, _ in kept:
            param.grad = None
        norm = right(model)
        for param, grad in kept:
            param.grad = grad
        return norm

    trainer.backend.grad_norm = wrong  # type: ignore[method-assign]


def own_experts_in_the_norm(trainer: Trainer) -> None:
    """Each rank takes the norm of what it has itself."""

    def wrong(model: nn.Module) -> Tensor:
        squares = [local(p.grad).square().sum() for p in model.parameters() if p.grad is not None]
        return torch.stack(squares).sum().sqrt()

    trainer.backend.grad_norm = wrong  # type: ignore[method-assign]


def _not_exchanged(trainer: Trainer, which: Callable[[nn.Module], list[nn.Parameter]]) -> None:
    right = trainer.backend.reduce_gradients

    def wrong(model: nn.Module) -> None:
        kept = [(p, p.grad.clone()) for p in which(model) if p.grad is not None]
        right(model)
        for param, grad in kept:
            param.grad = grad.div_(trainer.world.size)

    trainer.backend.reduce_gradients = wrong  # type: ignore[method-assign]


def gate_alone(trainer: Trainer) -> None:
    """Every rank trains a gate of its own, as if that were an expert's."""
    _not_exchanged(trainer, lambda model: [p for n, p in model.named_parameters() if ".gate." in n])


def replicas_alone(trainer: Trainer) -> None:
    """Owners of the same expert train it each for itself."""
    _not_exchanged(trainer, lambda model: [param for param, _ in expert_parameters(model)])


def replicas_counted_each(trainer: Trainer) -> None:
    """The norm counts an expert as often as it has owners."""

    def wrong(model: nn.Module) -> Tensor:
        own = {id(p) for p, _ in expert_parameters(model)}
        square = torch.zeros((), dtype=torch.float64)
        shared = torch.zeros((), dtype=torch.float64)
        for param in model.parameters():
            if param.grad is not None:
                part = param.grad.double().square().sum()
                if id(param) in own:
                    square += part
                else:
                    shared += part
        return (shared + trainer.world.all_reduce(square)).sqrt().float()

    trainer.backend.grad_norm = wrong  # type: ignore[method-assign]


@contextmanager
def gates_in_no_unit() -> Iterator[None]:
    """Trainers made inside, of torch's sharding, have no unit whose sums gates are part of."""
    right = TorchSharded._shard_experts

    def wrong(self: TorchSharded, model: nn.Module) -> set[nn.Parameter]:
        return right(self, model) | {p for n, p in model.named_parameters() if ".gate." in n}

    with patch.object(TorchSharded, "_shard_experts", wrong):
        yield


def reduce_gates(trainer: Trainer) -> None:
    """What `gates_in_no_unit` leaves out is done all the same."""
    right, listen = trainer.backend.reduce_gradients, trainer.backend.grad_norm

    def reduced(model: nn.Module) -> None:
        right(model)
        for name, param in model.named_parameters():
            if ".gate." in name and param.grad is not None:
                param.grad = trainer.world.all_reduce(param.grad) / trainer.world.size

    def norm(model: nn.Module) -> Tensor:
        """A gate is counted once, not by every rank."""
        listen(model)
        parts = []
        for name, param in model.named_parameters():
            if param.grad is not None and (".gate." not in name or trainer.world.is_main):
                parts.append(local(param.grad).double().square().sum())
        return trainer.world.all_reduce(torch.stack(parts).sum()).sqrt().float()

    trainer.backend.reduce_gradients = reduced  # type: ignore[method-assign]
    trainer.backend.grad_norm = norm  # type: ignore[method-assign]


BUGS = (undivided, left_out_of_the_norm, own_experts_in_the_norm)
"""For any backend of several ranks."""

WHOLE_BUGS = (gate_alone, replicas_alone, replicas_counted_each)
"""For backends that keep whole tensors and add up gradients in `reduce_gradients`; the last two for
experts with replicas."""
