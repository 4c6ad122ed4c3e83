"""The trainer of flite-train, from a command line, without its log and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fairseq_lite.config.core import RunConfig
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import BatchLimits, Sample, Task
from fairseq_lite.training.assembly import build_trainer
from fairseq_lite.training.trainer import Trainer


def begin(run: RunConfig, world: World, task: Task) -> tuple[Trainer, Iterator[Sample | None]]:
    """The trainer, and the batches of one epoch after another.

    Args:
        run: the configuration; it limits batches by --batch-size.
        world: the ranks.
        task: with its training data loaded.
    """
    torch.manual_seed(run.common.seed)
    trainer = build_trainer(run, world, task)
    data = task.batch_iterator(
        "train",
        BatchLimits(
            max_sentences=run.dataset.batch_size,
            required_multiple=run.dataset.required_batch_size_multiple,
            max_positions=task.max_positions(),
        ),
        seed=run.common.seed,
        world_size=world.size,
        rank=world.rank,
        num_workers=run.dataset.num_workers,
        pin_memory=world.device.type == "cuda",
    )
    trainer.dummy_batch = data.first_batch()

    def batches() -> Iterator[Sample | None]:
        while True:
            yield from data.next_epoch_itr()

    return trainer, batches()
