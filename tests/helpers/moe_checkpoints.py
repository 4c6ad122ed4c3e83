"""Small mixtures of experts in training, saved and loaded on any ranks by any backend."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import Sample
from fairseq_lite.training.checkpoint import parts, store
from tests.helpers import fairscale_shim
from tests.helpers.moe import Case
from tests.helpers.parity import make_trainer
from tests.helpers.sharded import write

TRAINING = (
    *("--optimizer", "adam", "--lr", "0.01", "--clip-norm", "1.0"),
    *("--store-ema", "--ema-decay", "0.9"),
)
FSDP = ["--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0"]
BACKENDS = {
    "legacy_ddp": [],
    "torch": FSDP,
    "torch-shards": [*FSDP, "--use-sharded-state"],
    "fairscale": [*FSDP, "--fsdp-engine", "fairscale"],
    "fairscale-shards": [*FSDP, "--fsdp-engine", "fairscale", "--use-sharded-state"],
}


def flags(experts: int, backend: str) -> list[str]:
    """Of flite-train."""
    case = Case(experts, training=TRAINING)
    return [*case.flags, *BACKENDS[backend]]


class Training:
    """A trainer on one rank, whose experts differ from each other from the beginning."""

    def __init__(
        self, world: World, data: Path, experts: int, backend: str = "legacy_ddp", seed: int = 1
    ) -> None:
        if backend.startswith("fairscale"):
            fairscale_shim.install()
        self.world = world
        words = [*self.flags(experts, backend), "--seed", str(seed)]
        self.trainer, batches = make_trainer(world, data, words)
        self.trainer.begin_epoch(1)
        self._batches: Iterator[Sample] = itertools.cycle(batches)

    def flags(self, experts: int, backend: str) -> list[str]:
        """Of flite-train."""
        return flags(experts, backend)

    def update(self, count: int, *, skip: int = 0, batches: int | None = None) -> list[float]:
        """Make updates of `batches`, by default two a rank, after those of `skip` earlier ones.

        Returns:
            The losses.
        """
        size, rank = self.world.size, self.world.rank
        losses = []
        for number in range(skip + count):
            dealt = [next(self._batches) for _ in range(batches or 2 * size)]
            if number >= skip:
                done = self.trainer.train_step(dealt[rank::size])
                assert done is not None
                losses.append(done.sums["loss"] / done.sums["sample_size"])
        return losses

    def save(self, path: Path, mark: str = "a") -> None:
        """Write `path` as its backend does."""
        trainer = self.trainer
        average = trainer.average
        assert average is not None
        own = trainer.backend.save_parts(trainer.model, trainer.optimizer, average.weights)
        write(self.world, path, own, mark)

    def load(self, path: Path) -> None:
        """Read `path`, whatever it is."""
        trainer = self.trainer
        average = trainer.average
        assert average is not None
        files = parts.CheckpointFiles(path)
        trainer.backend.load_parts(trainer.model, trainer.optimizer, files, average.weights)
        trainer.state.num_updates = 2

    def load_weights(self, path: Path) -> None:
        """Read `path` but for the optimizer's state and the average."""
        trainer = self.trainer
        trainer.backend.load_parts(trainer.model, None, parts.CheckpointFiles(path))


@dataclass(frozen=True)
class Move:
    """A checkpoint that is read on some ranks and written again.

    Attributes:
        source: its name; None: a few updates are made instead.
        target: the new one's name.
        experts: how many the model has.
        backend: of `BACKENDS`.
    """

    source: str | None
    target: str
    experts: int
    backend: str = "legacy_ddp"


def move(world: World, data: Path, folder: Path, moves: Sequence[Move]) -> None:
    """Make each move with a fresh trainer, whose weights are others until it has loaded."""
    for each in moves:
        training = Training(world, data, each.experts, each.backend, 1 if not each.source else 77)
        if each.source is None:
            training.update(2)
        else:
            training.load(folder / f"{each.source}.pt")
        training.save(folder / f"{each.target}.pt", each.target)


def write_as_gshard(
    source: Path, target: Path, experts: int, ranks: int, *, local: bool = True
) -> None:
    """What fairseq's gshard makes of a checkpoint's weights: a file of each rank, and a shared one.

    Args:
        source: the checkpoint.
        target: the name of the new one.
        experts: E.
        ranks: W; more than experts: the last ones repeat the first.
        local: an expert's number is that on its rank; False: as it is.
    """
    state = parts.whole_state(source, optimizer=False)
    each = max(1, experts // ranks)
    files: dict[str, dict[str, Tensor]] = {"shared": {}}
    files |= {f"rank-{rank}": {} for rank in range(ranks)}
    for name, tensor in state["model"].items():
        container, dot, rest = name.partition(".experts.")
        if not dot:
            files["shared"][name] = tensor
            continue
        number, _, rest = rest.partition(".")
        for rank in range(int(number) // each, ranks, experts):
            mine = int(number) % each if local else int(number)
            files[f"rank-{rank}"][f"{container}.experts.{mine}.{rest}"] = tensor
    header: dict[str, Any] = {
        "cfg": {"model": {"_name": "transformer_tiny", "moe_expert_count": experts}},
        "optimizer_history": [{"num_updates": 2}],
        **{key: value for key, value in state.items() if key != parts.OWN_KEY},
        "last_optimizer_state": {"state": {0: {"step": 2}}, "param_groups": []},
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    header["cfg"]["model"]["moe_eval_capacity_token_fraction"] = 0.25
    for name, model in files.items():
        torch.save({**header, "model": dict(model)}, parts.part_path(target, name))


def bits(model: Any) -> Mapping[str, Tensor]:
    """The tensors of a model's state on this rank."""
    return {name: store.to_cpu(tensor) for name, tensor in model.state_dict().items()}
