"""Train a few updates by the real trainer, the same data dealt to any number of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import BatchLimits, Sample, build_task
from fairseq_lite.training.assembly import build_trainer, check
from fairseq_lite.training.trainer import Trainer

# Batches in each update, dealt to the ranks in turn: one rank makes 1 to 7 micro-batches of them,
# two make up to four each, and of four ranks some have no data in most updates.
DEALT = (3, 7, 1, 6, 2, 8, 4, 5, 3, 2)

# A key's bias adds the same number to all scores of a query, which softmax does not see: its
# gradient is rounding noise, and Adam makes steps of full size of that.
NOISE = "k_proj.bias"


@dataclass
class Outcome:
    """What a run of a few updates left on one rank.

    Attributes:
        losses: in nats a token, of each update.
        norms: of the gradients, before clipping.
        weights: whole, on rank 0; empty elsewhere.
        average: the moving average, likewise.
        scales: of float16.
        extra: what `look` returned.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    scales: list[float | None] = field(default_factory=list)
    extra: Any = None


def make_trainer(world: World, data: Path, flags: Sequence[str]) -> tuple[Trainer, list[Sample]]:
    """A trainer from a command line, and all batches of its training data in random order."""
    run = parse("flite-train", [str(data), "--cpu", "--batch-size", "4", *flags], load_builtins())
    check(run)
    torch.manual_seed(run.common.seed)
    task = build_task(run)
    trainer = build_trainer(run, world, task)
    task.load_dataset("train")
    limits = BatchLimits(max_sentences=run.dataset.batch_size, required_multiple=1)
    batches = task.batch_iterator("train", limits, seed=1)
    trainer.dummy_batch = batches.first_batch()
    return trainer, list(batches.next_epoch_itr(shuffle=True))


def train(
    world: World,
    data: Path,
    flags: Sequence[str],
    updates: int = len(DEALT),
    look: Callable[[Trainer], Any] | None = None,
) -> Outcome:
    """Make `updates` updates.

    Args:
        world: the ranks.
        data: a data folder.
        flags: of flite-train.
        updates: how many.
        look: called with the trainer at the end, on every rank.
    """
    trainer, batches = make_trainer(world, data, flags)
    stream = itertools.cycle(batches)
    trainer.begin_epoch(1)
    outcome = Outcome()
    for update in range(updates):
        count = DEALT[update % len(DEALT)]
        dealt = [next(stream) for _ in range(count)]
        mine: list[Sample | None] = list(dealt[world.rank :: world.size])
        mine += [None] * (math.ceil(count / world.size) - len(mine))
        done = trainer.train_step(mine)
        outcome.scales.append(trainer.precision.loss_scale)
        if done is not None:
            outcome.losses.append(done.sums["loss"] / done.sums["sample_size"])
            outcome.norms.append(done.grad_norm)
    if look is not None:
        outcome.extra = look(trainer)
    average = None if trainer.average is None else trainer.average.weights
    for part in trainer.backend.save_parts(trainer.model, None, average).values():
        outcome.weights = {k: v.detach().clone() for k, v in part.model.items()}
        outcome.average = {k: v.detach().clone() for k, v in (part.average or {}).items()}
    return outcome


def train_all(world: World, data: Path, cases: Sequence[Sequence[str]]) -> list[Outcome]:
    """`train` with one list of flags after the other: processes take longer to start than to do."""
    try:
        return [train(world, data, flags) for flags in cases]
    finally:
        if world.size == 1:
            world.close()  # what a sharded run of one process formed


def assert_alike(
    one: Outcome,
    ranks: Sequence[Outcome],
    *,
    tolerance: float = 1e-5,
    without: Sequence[str] = (NOISE,),
) -> None:
    """Equal losses, norms and weights, on every rank and to within `tolerance`.

    Args:
        one: of one process.
        ranks: of every rank; rank 0 has the weights.
        tolerance: relative for losses and norms, absolute for weights.
        without: ends of names of weights that are left out.
    """
    for other in ranks:
        assert other.losses == pytest.approx(one.losses, rel=tolerance)
        assert other.norms == pytest.approx(one.norms, rel=tolerance)
        assert other.norms == ranks[0].norms, "one number on all ranks"
    for mine, theirs in ((one.weights, ranks[0].weights), (one.average, ranks[0].average)):
        assert mine.keys() == theirs.keys()
        for name, weight in mine.items():
            if not name.endswith(tuple(without)):
                torch.testing.assert_close(theirs[name], weight, rtol=0, atol=tolerance, msg=name)
