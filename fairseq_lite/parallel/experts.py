"""Who owns which expert: the one place that every backend, layer and checkpoint asks.

E experts are dealt out over exchange groups of P ranks. Each group holds all experts once; with W
ranks there are W / P groups, which hold the same: replicas. With as many experts as ranks or more,
P is W, and a rank owns E / P of them (some own one more where P does not divide E); with fewer, P
is the largest divisor of W that is at most E.

A module of an expert carries a mark, `ExpertShard`, the object that says which expert it is and how
all of them lie. The mark is on the module and not on its parameters, which sharding replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.groups import Group
from fairseq_lite.parallel.world import SingleWorld, World

# The attribute of an expert's module that holds its mark.
_MARK = "expert_shard"


@dataclass(frozen=True)
class ExpertLayout:
    """Which ranks own which experts.

    Attributes:
        num_experts: E.
        world_size: W.
        group_size: P, the ranks of one exchange group: consecutive ones. It divides W.
    """

    num_experts: int
    world_size: int
    group_size: int

    @classmethod
    def of(cls, num_experts: int, world_size: int, group_size: int | None = None) -> ExpertLayout:
        """The layout of E experts over W ranks.

        Args:
            num_experts: E.
            world_size: W.
            group_size: P; None: as large as it can be.

        Raises:
            ConfigError: P does not divide W, or is larger than E.
        """
        if group_size is None:
            largest = min(num_experts, world_size)
            group_size = next(p for p in range(largest, 0, -1) if world_size % p == 0)
        if group_size < 1 or world_size % group_size or group_size > num_experts:
            raise ConfigError(
                f"{num_experts} experts cannot be spread over groups of {group_size} out of "
                f"{world_size} processes: the group must divide the processes and have no more "
                "members than there are experts"
            )
        return cls(num_experts, world_size, group_size)

    @property
    def replicas(self) -> int:
        """How many ranks own one expert."""
        return self.world_size // self.group_size

    def place(self, rank: int) -> int:
        """A rank's place in its exchange group."""
        return rank % self.group_size

    def replica(self, rank: int) -> int:
        """The number of a rank's exchange group."""
        return rank // self.group_size

    def owned(self, place: int) -> range:
        """The experts at a place of an exchange group: the same number at each, or one more."""
        return range(
            place * self.num_experts // self.group_size,
            (place + 1) * self.num_experts // self.group_size,
        )

    def counts(self) -> list[int]:
        """How many experts each place owns."""
        return [len(self.owned(place)) for place in range(self.group_size)]

    def owners(self, expert: int) -> range:
        """The ranks that own an expert, one in each exchange group."""
        place = next(p for p in range(self.group_size) if expert in self.owned(p))
        return range(place, self.world_size, self.group_size)

    def exchange_groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that exchange tokens with each other."""
        size = self.group_size
        return tuple(tuple(range(i, i + size)) for i in range(0, self.world_size, size))

    def replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that own the same experts."""
        size = self.group_size
        return tuple(tuple(range(place, self.world_size, size)) for place in range(size))


@dataclass(frozen=True)
class ExpertShard:
    """The mark of an expert's module.

    Attributes:
        expert: its number among all E, the same at every world size.
        layout: where it and the others are.
        gradient_factor: what its gradients are multiplied by beyond the rule for all parameters;
            1 is the exact mean.
    """

    expert: int
    layout: ExpertLayout
    gradient_factor: float = 1.0


@dataclass(frozen=True)
class Shared:
    """What `placements` says of a tensor that every rank has: the opposite of an expert's."""


SHARED = Shared()
Placement = ExpertShard | Shared


def mark(module: nn.Module, shard: ExpertShard) -> None:
    """Say that all tensors of a module are those of one expert."""
    setattr(module, _MARK, shard)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertShard]]:
    """The marked modules on this rank: name, module, mark."""
    for name, module in model.named_modules():
        shard = vars(module).get(_MARK)
        if shard is not None:
            yield name, module, shard


def placements(model: nn.Module) -> dict[str, Placement]:
    """Of every tensor of a model's state, by name, whether it is shared or which expert's it is."""
    marks = {name: shard for name, _, shard in expert_modules(model)}

    def of(name: str) -> Placement:
        path = name
        while path:
            path = path.rpartition(".")[0]
            if path in marks:
                return marks[path]
        return SHARED

    named = model.named_parameters(remove_duplicate=False)
    return {name: of(name) for name in (*model.state_dict(), *(name for name, _ in named))}


def has_experts(model: nn.Module) -> bool:
    """Whether a model has experts on this rank; it has on all ranks then."""
    return next(expert_modules(model), None) is not None


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every rank has, each once."""
    own = {id(param) for param, _ in expert_parameters(model)}
    return [param for param in model.parameters() if id(param) not in own]


def expert_parameters(model: nn.Module) -> list[tuple[nn.Parameter, ExpertShard]]:
    """The parameters of this rank's experts, each once, with their marks."""
    return [(p, shard) for _, module, shard in expert_modules(model) for p in module.parameters()]


def replicas_of(
    model: nn.Module, world: World
) -> list[tuple[Group, list[tuple[nn.Module, ExpertShard]]]]:
    """This rank's experts by the ranks that own them too; called on every rank."""
    found: dict[Group, list[tuple[nn.Module, ExpertShard]]] = {}
    for _, module, shard in expert_modules(model):
        group = world.split(shard.layout.replica_groups())
        found.setdefault(group, []).append((module, shard))
    return list(found.items())


def stores(model: nn.Module) -> list[tuple[str, nn.Module, ExpertShard]]:
    """The modules whose children are a layer's experts on this rank: what layers call as a whole.

    Returns:
        Of each its name, itself and the mark of its first expert.

    Raises:
        ConfigError: one has other parameters, too.
    """
    modules = dict(model.named_modules())
    found: dict[str, ExpertShard] = {}
    for name, _, shard in expert_modules(model):
        found.setdefault(name.rpartition(".")[0], shard)
    for name in found:
        if shared_parameters(modules[name]):
            raise ConfigError(
                f"{name or 'the model'} has parameters beside those of its experts, and this "
                "--ddp-backend splits it as a whole: put the experts into a module of their own, "
                "or use --ddp-backend legacy_ddp"
            )
    return [(name, modules[name], shard) for name, shard in found.items()]


# -- what a run will have ---------------------------------------------------------------------


@runtime_checkable
class NamesExperts(Protocol):
    """The configuration of a model that may have experts."""

    def experts_to_spread(self) -> tuple[int, int | None] | None:
        """The experts of a layer and the size of an exchange group that the flags say (or None).

        None where the flags ask for no experts.

        Raises:
            ConfigError: the flags do not fit together.
        """
        ...


def planned_layout(model_config: Any, world_size: int) -> ExpertLayout | None:
    """Where the experts of a model will be; None of a model without.

    Args:
        model_config: of the architecture.
        world_size: W.

    Raises:
        ConfigError: they cannot be spread like that.
    """
    if not isinstance(model_config, NamesExperts):
        return None
    named = model_config.experts_to_spread()
    return None if named is None else ExpertLayout.of(named[0], world_size, named[1])


# -- where a model that is being built will be ------------------------------------------------


Aside = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Site:
    world: World
    regroup: bool
    aside: Aside


_SITE: ContextVar[_Site | None] = ContextVar("site", default=None)


@contextmanager
def spread_over(
    world: World, *, regroup: bool = False, aside: Aside = nullcontext
) -> Iterator[None]:
    """Models built inside have only those experts in memory that this rank owns.

    Without it they have all: a model built outside is one process's.

    Args:
        world: the ranks. All of them build the same model.
        regroup: choose the groups anew and do not heed the size that the model's flags say: the
            model was trained on other ranks.
        aside: the context in which an expert is made, for a backend that only notes how the rest
            of the model is.
    """
    token = _SITE.set(_Site(world, regroup, aside))
    try:
        yield
    finally:
        _SITE.reset(token)


def site(num_experts: int, group_size: int | None = None) -> tuple[World, ExpertLayout]:
    """The ranks and the layout for experts that are being built; all ranks ask.

    Args:
        num_experts: E.
        group_size: the size of an exchange group that the model's flags say; None: none does.
    """
    here = _SITE.get()
    if here is None:
        return SingleWorld(), ExpertLayout.of(num_experts, 1)
    wanted = None if here.regroup else group_size
    return here.world, ExpertLayout.of(num_experts, here.world.size, wanted)


@contextmanager
def drawn_for(name: str, expert: int) -> Iterator[None]:
    """What is made inside is an expert's; its random numbers depend on --seed, layer and number.

    So experts start different from each other, the same on any number of ranks, and everything that
    is drawn later is what it would be without them.

    Args:
        name: the layer's.
        expert: its number.
    """
    here = _SITE.get()
    generator = torch.default_generator
    with (nullcontext if here is None else here.aside)():
        before = generator.get_state()
        digest = sum(ord(c) * pow(131, i, 1 << 61) for i, c in enumerate(f"{name}/{expert}"))
        # Of the CPU alone, where models are built: torch.manual_seed would seed GPUs, too.
        generator.manual_seed((generator.initial_seed() * 1_000_003 + digest) % (1 << 63))
        try:
            yield
        finally:
            generator.set_state(before)
