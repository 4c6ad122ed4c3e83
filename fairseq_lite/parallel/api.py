"""The contract between the trainer and the way a model is spread over processes.

The trainer holds one `Backend` and never asks which. `BACKENDS` maps the names of `--ddp-backend`
to them; each is built as `factory(config, world)`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from fairseq_lite.config.core import RunConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.experts import expert_parameters, shared_parameters
from fairseq_lite.parallel.free import free_running
from fairseq_lite.parallel.shards.experts import Spread
from fairseq_lite.parallel.world import World
from fairseq_lite.registry import Registry

BACKENDS = Registry("distributed backend", "--ddp-backend")

M = TypeVar("M", bound=nn.Module)
OptimizerT = TypeVar("OptimizerT", bound="AdaptableOptimizer")

MAIN_PART = "model"
"""The name of the part that is a complete checkpoint by itself."""


@dataclass(frozen=True)
class Machine:
    """What a check may know about the machine, as values so that a check stays a pure function.

    Attributes:
        cuda_devices: how many GPUs are visible.
        environ: the environment; launchers describe themselves in it.
    """

    cuda_devices: int = 0
    environ: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def here() -> Machine:
        """This machine, now."""
        return Machine(
            torch.cuda.device_count() if torch.cuda.is_available() else 0, dict(os.environ)
        )


@dataclass(frozen=True)
class Part:
    """What one rank contributes to a checkpoint: one file.

    Attributes:
        model: parameters and buffers by fairseq's names: whole tensors, or in a shard this rank's
            rows. The live tensors, not copies: write or copy them before the next update.
        optimizer: None when it was not asked for. In a whole part the optimizer's `state_dict()`,
            its parameters numbered; in a shard `{"state": {name: {…}}, "hyper": {…}}`.
        average: the moving average of the weights, laid out as `model`; None where there is none.
        manifest: plain values that say what the part holds, for those who load it at another world
            size: `world_size`, and what the backend adds (expert ids, shard number, …).
    """

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None = None
    average: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)


class PartReader(ABC):
    """The parts of a checkpoint on disk, read one by one."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of all parts, sorted by number where they end in one."""

    @abstractmethod
    def manifest(self, name: str) -> Mapping[str, Any]:
        """The manifest of one part, without its tensors where the format allows."""

    @abstractmethod
    def read(self, name: str) -> Part:
        """One part, its tensors on the CPU; those of a shard stay in the file until they are used.

        Raises:
            CheckpointError: the part is missing or damaged. Never a fresh start instead.
        """

    def open(self, name: str) -> Part:
        """As `read`, compared with no checksum: for those who call `verify`, too."""
        return self.read(name)

    def where(self, name: str) -> str:
        """What messages call a part, present or not: its file."""
        return name

    def verify(self, name: str) -> None:  # noqa: B027 - parts in memory cannot be damaged
        """Read all of a part and compare it with its checksums.

        Raises:
            CheckpointError: it is damaged.
        """


class StatefulOptimizer(Protocol):
    """The side of an optimizer that a backend sees."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """In torch's form: the parameters, in the order that numbers them, under "params"."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> None: ...


class AdaptableOptimizer(StatefulOptimizer, Protocol):
    """One whose ranks may update different parts of the parameters."""

    def update_parts(self, parts: list[Tensor], after_step: Callable[[], None]) -> None:
        """Update these tensors in place of the parameters, in the same order, from now on.

        Args:
            parts: what this rank updates of each parameter: a part of it, all or nothing.
            after_step: called after each step.
        """
        ...


@runtime_checkable
class LoadsWeights(Protocol):
    """A model that knows the names older checkpoints used, as `models.api.Model` does."""

    def load_weights(self, state: Any) -> None: ...

    def upgrade_state_dict(self, state: Any) -> dict[str, Tensor]: ...


class Backend(ABC):
    """How one logical model is spread over a World. The trainer holds exactly one.

    The rule that every backend keeps, for dense, sharded and expert parameters alike: after
    `reduce_gradients`, gradients equal those of one process that saw all the data, divided by the
    world size. The trainer multiplies them by `world.size / sample_size`.

    A model may hold experts (`parallel/experts.py`): modules that are on some of the ranks only. To
    an expert's owners come the tokens of their exchange group, whoever's they are, so its gradients
    are summed over its replicas and no further, and then divided by the world size like all others.
    What decides which expert a token goes to is a shared parameter like any other.

    The order within an update is: for each batch `accumulate` around forward and `backward`, then
    `reduce_gradients`, then `grad_norm`. Each is called on every rank, the same number of times: a
    rank without data runs a dummy batch with weight zero.

    Args:
        cfg: the backend's own flags.
        world: the processes.
        dtype: what forward and backward compute in under the trainer's autocast, for backends whose
            weights travel in it too; None: float32.
    """

    #: Whether each rank writes a file of its own: `save_parts` gives one on every rank.
    writes_shards: bool = False

    def __init__(self, cfg: Any, world: World, *, dtype: torch.dtype | None = None) -> None:
        self.cfg = cfg
        self.world = world
        self.dtype = dtype

    @classmethod
    def reasons(cls, run: RunConfig, machine: Machine | None = None) -> list[str]:
        """Why this backend cannot do `run`: one line each, empty if it can.

        A pure function of its arguments (`machine` is looked up when absent). The tests use it to
        say why they leave a combination out, `check` shows the first line to the user.
        """
        return []

    @classmethod
    def check(cls, run: RunConfig, machine: Machine | None = None) -> None:
        """Refuse what cannot work, before any process is started.

        Raises:
            ConfigError: the first of `reasons`.
        """
        for reason in cls.reasons(run, machine):
            raise ConfigError(reason)

    @abstractmethod
    def wrap(self, build: Callable[[], M]) -> M:
        """Build the model on this rank's device, with the same weights on every rank.

        Args:
            build: makes the model. A builder and not a model, so that a backend may shard before
                memory is allocated, and so that a rank makes no other experts than its own: a
                backend calls it inside `spread_over`.

        Returns:
            What the trainer calls and whose parameters the optimizer gets. The optimizer must be
            made after this.
        """

    def adapt_optimizer(self, model: nn.Module, optimizer: OptimizerT) -> OptimizerT:
        """The optimizer to train with, for a backend whose ranks update different parts.

        Args:
            model: what `wrap` returned.
            optimizer: just made, over the parameters of `model`.
        """
        return optimizer

    @abstractmethod
    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """The context of one forward and backward; `last` marks the last batch of an update."""

    @abstractmethod
    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Add the gradients of `loss` (a sum over this rank's batch, 0-dim) to the parameters'."""

    @abstractmethod
    def reduce_gradients(self, model: nn.Module) -> None:
        """Exchange gradients over ranks; see the rule above.

        A parameter that no rank used keeps `grad` None; one that some rank used gets a gradient
        on all of them.
        """

    @abstractmethod
    def grad_norm(self, model: nn.Module) -> Tensor:
        """The 2-norm of all gradients: float32, 0-dim, the same number on every rank.

        Each parameter counts once, however many names or replicas it has, and each expert, whoever
        has it.
        """

    def num_parameters(self, model: nn.Module) -> tuple[int, int]:
        """How many numbers all shared parameters have, and those of them that are trained."""
        counts = [(p.numel(), p.requires_grad) for p in shared_parameters(model)]
        return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)

    def num_expert_parameters(self, model: nn.Module) -> tuple[int, int]:
        """The same of the experts of all ranks, each counted once; called on every rank."""
        return self._of_all_ranks(
            (p.numel(), p.requires_grad)
            for p, shard in expert_parameters(model)
            if shard.layout.replica(self.world.rank) == 0
        )

    def _of_all_ranks(self, counts: Iterable[tuple[int, bool]]) -> tuple[int, int]:
        mine = list(counts)
        trained = sum(n for n, needs_gradient in mine if needs_gradient)
        summed = self.world.sum({"all": sum(n for n, _ in mine), "trained": trained})
        return int(summed["all"]), int(summed["trained"])

    def writes(self, model: nn.Module | None) -> bool:
        """Whether this rank writes parts of a checkpoint.

        Args:
            model: what `wrap` returned; None: it is not known.
        """
        spread = None if model is None else self.spread(model)
        if self.writes_shards or self.world.is_main:
            return True
        return spread is not None and len(spread.written_by(self.world.rank)) > 0

    def spread(self, model: nn.Module) -> Spread | None:
        """How the experts of a model lie on the ranks, by names of its state; None: it has none.

        Args:
            model: what `wrap` returned.
        """
        return Spread.of(model)

    def whole(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, every rank may call any submodule with whole weights, without the others.

        For validation by generation, in which ranks take different numbers of steps, and export.
        Entered and left by every rank; nothing is trained inside, and nothing else is exchanged
        between ranks. Layers of experts run freely (`parallel/free.py`).
        """
        return free_running([model], self.world)

    @abstractmethod
    def save_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Part]:
        """The parts this rank writes, by name; called on every rank, often empty.

        The part called `MAIN_PART` is the checkpoint's own file, others get their name as a suffix.

        Args:
            model: what `wrap` returned.
            optimizer: None: its state is not wanted.
            average: the moving average, under the names and in the layout of `model.state_dict()`.
        """

    def crash_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Part]:
        """As `save_parts`, without a word to other ranks: the one that fails may be alone."""
        return self.save_parts(model, optimizer, average)

    @abstractmethod
    def load_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        parts: PartReader,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fill model and optimizer from parts written at any world size; called on every rank.

        Args:
            model: what `wrap` returned.
            optimizer: None: its state is not wanted, or the parts have none.
            parts: the files.
            average: the moving average's tensors, to be filled in place; None: it is not wanted, or
                the parts have none.

        Raises:
            CheckpointError: on every rank, when a part is missing or does not fit.
        """
