"""The names of experts' tensors: which are this rank's, and what they all are.

In a model's state an expert's tensors are called `CONTAINER.NUMBER.REST`, where the number is the
expert's among all, on every rank and in every file. Lists of names that are the same for all
experts are kept once, with `*` for the number: `decoder.layers.1.moe_layer.experts.*.fc1.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from torch import nn

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.experts import ExpertLayout, expert_modules

T = TypeVar("T")

_ANY = ".*."


@dataclass(frozen=True)
class Member:
    """A tensor of an expert.

    Attributes:
        container: the name of the module that holds the experts.
        expert: the expert's number among all.
        rest: the tensor's name within it.
    """

    container: str
    expert: int
    rest: str

    @property
    def template(self) -> str:
        """Its name and that of the same tensor of all other experts."""
        return f"{self.container}{_ANY}{self.rest}"


@dataclass(frozen=True)
class Spread:
    """How the experts of a model lie on the ranks, by the names of its state.

    Attributes:
        layout: which rank has which.
        members: the tensors of this rank's experts, by name.
    """

    layout: ExpertLayout
    members: Mapping[str, Member]

    @classmethod
    def of(cls, model: nn.Module, clean: Callable[[str], str] = str) -> Spread | None:
        """Find out from the marks in a model; None where it has no experts.

        Args:
            model: as this rank has it.
            clean: from the name of a module to that under which its tensors are in the state.

        Raises:
            CheckpointError: layers have different numbers of experts, or different groups.
        """
        marks = [(clean(name), shard) for name, _, shard in expert_modules(model)]
        if not marks:
            return None
        layouts = {shard.layout for _, shard in marks}
        if len(layouts) > 1:
            raise CheckpointError(
                "layers with different numbers of experts do not go into one checkpoint: "
                + ", ".join(sorted(str(layout.num_experts) for layout in layouts))
            )
        experts = {name: shard.expert for name, shard in marks}
        members = {}
        for name in model.state_dict():
            member = _member(name, experts)
            if member is not None:
                members[name] = member
        return cls(layouts.pop(), members)

    @property
    def num_experts(self) -> int:
        """How many experts a layer has, on all ranks together."""
        return self.layout.num_experts

    def owned(self, rank: int) -> range:
        """The experts of a rank."""
        return self.layout.owned(self.layout.place(rank))

    def written_by(self, rank: int) -> range:
        """The experts that a rank writes: the first of an expert's owners does."""
        return self.owned(rank) if self.layout.replica(rank) == 0 else range(0)

    def expert_of(self, name: str) -> int | None:
        """Whose tensor one of this rank's is; None: it is shared."""
        member = self.members.get(name)
        return None if member is None else member.expert

    def templates(self, names: Iterable[str]) -> list[str]:
        """Names of this rank's tensors as names of all, once for all experts."""
        members = self.members
        return list(dict.fromkeys(members[n].template if n in members else n for n in names))

    def everywhere(self, names: Iterable[str]) -> list[str]:
        """Names of this rank's tensors and of all other experts', in one process's order."""
        return expanded(self.templates(names), self.num_experts)

    def counterparts(self) -> dict[str, str]:
        """The names of all experts' tensors -> that of the same one of an expert of this rank."""
        found: dict[str, str] = {}
        for name, member in self.members.items():
            for expert in range(self.num_experts):
                found.setdefault(f"{member.container}.{expert}.{member.rest}", name)
        return found | {name: name for name in self.members}

    def elsewhere(self) -> set[str]:
        """The names of tensors of experts that other ranks have."""
        return self.counterparts().keys() - self.members.keys()

    def manifest(self, names: Iterable[str]) -> dict[str, Any]:
        """What every part of a checkpoint says of the whole.

        Args:
            names: of the model's state, as this rank has it.
        """
        return {"num_experts": self.num_experts, "weights": self.templates(names)}


def without_others(
    model: nn.Module, state: Mapping[str, T], clean: Callable[[str], str] = str
) -> dict[str, T]:
    """A checkpoint's tensors without those of experts that other ranks have; see `Spread.of`."""
    spread = Spread.of(model, clean)
    if spread is None:
        return dict(state)
    elsewhere = spread.elsewhere()
    return {name: value for name, value in state.items() if name not in elsewhere}


def _member(name: str, experts: Mapping[str, int]) -> Member | None:
    """The expert a tensor belongs to: the module whose mark is found first, from the inside."""
    place = name.rpartition(".")[0]
    while place:
        if place in experts:
            container, _, number = place.rpartition(".")
            assert number == str(experts[place]), f"{place} is called by another expert's number"
            return Member(container, experts[place], name[len(place) + 1 :])
        place = place.rpartition(".")[0]
    return None


def expanded(templates: Iterable[str], num_experts: int) -> list[str]:
    """The names of one process's model: those of all experts, one expert after the other."""
    names: list[str] = []
    for container, run in groupby(templates, key=_container):
        if container is None:
            names += run
            continue
        rests = [template[len(container) + len(_ANY) :] for template in run]
        names += [f"{container}.{e}.{rest}" for e in range(num_experts) for rest in rests]
    return names


def of_expert(templates: Iterable[str], expert: int) -> list[str]:
    """The names of one expert's tensors."""
    return [
        template.replace(_ANY, f".{expert}.", 1)
        for template in templates
        if _container(template) is not None
    ]


def shared(templates: Iterable[str]) -> list[str]:
    """The names of tensors that no expert has."""
    return [template for template in templates if _container(template) is None]


def _container(template: str) -> str | None:
    container, star, _ = template.partition(_ANY)
    return container if star else None
