"""What one rank measures of a run: bytes of its state, its peak memory, the speed of all ranks."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ours import begin
from fairseq_lite.config.core import RunConfig
from fairseq_lite.parallel.local import local
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import build_task
from fairseq_lite.training.allocator import keep_freed_memory
from fairseq_lite.training.trainer import Trainer


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        updates: timed updates.
        warm_up: updates before them; the first one makes the optimizer's state.
        out: where rank 0 writes the result, as JSON.
    """

    updates: int
    warm_up: int
    out: str


class Memory:
    """Peak memory of this process above what it had at the start (or of its GPU)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._base = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self._base = _status("VmRSS")

    def peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._base
        return _status("VmHWM") - self._base


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def measure(job: Job, run: RunConfig, world: World) -> None:
    """Build the trainer that flite-train builds, and let it train."""
    if world.device.type == "cpu":
        keep_freed_memory()  # as flite-train does
    task = build_task(run)
    task.load_dataset("train")
    # All code is loaded by a small model first: it is no memory of the large one.
    trainer, batches = begin(small(run), world, task)
    trainer.train_step([next(batches)])
    del trainer, batches
    gc.collect()
    memory = Memory(world.device)
    trainer, batches = begin(run, world, task)
    for _ in range(job.warm_up):
        trainer.train_step([next(batches)])
    tokens = 0.0
    world.barrier()
    start = time.perf_counter()
    for _ in range(job.updates):
        update = trainer.train_step([next(batches)])
        tokens += update.sums["ntokens"] if update else 0.0
    world.barrier()
    seconds = time.perf_counter() - start
    each = world.gather_objects({**state(trainer), "peak": memory.peak()})
    if world.is_main:
        parameters = trainer.backend.num_parameters(trainer.model)[0]
        worst = {name: max(rank[name] for rank in each) for name in each[0]}
        result = {"model": parameters, "tokens_per_second": tokens / seconds, "bytes": worst}
        Path(job.out).write_text(json.dumps(result))


def small(run: RunConfig) -> RunConfig:
    """The same run with a model of a few thousand parameters."""
    sizes = {"decoder_embed_dim": 16, "decoder_layers": 1, "decoder_attention_heads": 1}
    model = replace(run.model, config=replace(run.model.config, **sizes))
    return replace(run, model=model)


def state(trainer: Trainer) -> dict[str, int]:
    """Bytes that this rank holds of parameters, gradients and optimizer state."""
    params = list(trainer.model.parameters())
    moments = [v for p in trainer.optimizer.params for v in trainer.optimizer.state[p].values()]
    return {
        "parameters": size(params),
        "gradients": size(p.grad for p in params if p.grad is not None),
        "optimizer": size(v for v in moments if isinstance(v, Tensor)),
    }


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that holds this rank's parts; what tensors share counts once."""
    storages = {}
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
