"""Build a model that no rank holds: shapes first, then one tensor at a time, dealt out by rank 0.

The weights are those of an unsharded build from rank 0's random generator, so sharding a model
changes no number of it. In memory at once are a rank's own parts and, on rank 0, one tensor.

Experts are no part of this: no two ranks have the same ones, and each has generators of its own, so
a rank makes its own at once, while the rest of the model is only noted (`building_on`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.experts import expert_modules, replicas_of, spread_over
from fairseq_lite.parallel.fully_sharded.deferred import (
    CannotDeferError,
    Recording,
    is_fake,
    view_of,
)
from fairseq_lite.parallel.local import is_spread, local
from fairseq_lite.parallel.world import World

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


class _Place(NamedTuple):
    """Where a module keeps a tensor: its parameters, its buffers or its attributes."""

    tensors: MutableMapping[str, Any]
    name: str

    def get(self) -> Any:
        return self.tensors[self.name]

    def put(self, value: Any) -> None:
        self.tensors[self.name] = value


class _Tensor(NamedTuple):
    """One tensor of the model, all the places that share it, and what the builder made of it."""

    places: list[_Place]
    built: Tensor


class Unmade(Generic[M]):
    """A model whose tensors are on the meta device, to be split and then made.

    Attributes:
        model: the model. Between `of` and `make`, parameters may be replaced by DTensors, on the
            meta device too and at the same places.
    """

    def __init__(self, model: M, recording: Recording | None, world: World) -> None:
        self.model = model
        self._world = world
        self._recording = recording
        self._tensors = _tensors_of(model)
        for i, (places, built) in enumerate(self._tensors):
            shape = torch.empty(built.shape, dtype=built.dtype, device="meta")
            if isinstance(built, nn.Parameter):
                shape = nn.Parameter(shape, requires_grad=built.requires_grad)
            for place in places:
                place.put(shape)
            if not (is_fake(built) or world.is_main):  # rank 0 has it, too
                self._tensors[i] = _Tensor(places, shape)

    @classmethod
    def of(cls, build: Callable[[], M], world: World) -> Unmade[M]:
        """Build a model without its memory; where that cannot be, in host memory. All ranks.

        Experts are in host memory, those of this rank, and equal on all of their owners.
        """
        with building_on(world):
            unmade = cls._of(build, world)
        _agree_on_experts(unmade.model, world)
        return unmade

    @classmethod
    def _of(cls, build: Callable[[], M], world: World) -> Unmade[M]:
        why = None
        try:
            model, recording = Recording.of(build)
            _no_hidden_tensors(model)
        except CannotDeferError as e:
            why = str(e)
        reasons = [reason for reason in world.gather_objects(why) if reason is not None]
        if not reasons:
            return cls(model, recording, world)
        if world.is_main:
            logger.warning(
                "each rank builds the whole model in host memory before it is sharded, as its "
                "construction depends on the content of its tensors (%s)",
                reasons[0],
            )
        return cls(build(), None, world)

    def make(self, device: torch.device | str) -> None:
        """Give every tensor its memory and content, but for experts; all ranks take part.

        Args:
            device: where parameters are kept; buffers are always on the world's device.
        """
        self._check_alike()
        order = self._world.broadcast_object(self._order() if self._world.is_main else None)
        values = self._values() if self._world.is_main else iter(())
        # All of them before the first large tensor comes by, whose place they would break up.
        for tensor in self._tensors:
            self._allocate(tensor, device)
        for i in order:
            value = None
            if self._world.is_main:
                number, value = next(values)
                assert number == i
            self._fill(self._tensors[i].places[0].get(), value)
        # Whatever is drawn next is the same on all ranks, and as after an unsharded build.
        torch.set_rng_state(self._world.broadcast_object(torch.get_rng_state()))
        self._recording = None

    def _allocate(self, tensor: _Tensor, device: torch.device | str) -> None:
        present = tensor.places[0].get()
        if isinstance(present, nn.Parameter):
            made = torch.empty_like(present, device=device, requires_grad=False)
            made = nn.Parameter(made, requires_grad=present.requires_grad)
        else:
            made = torch.empty_like(present, device=self._world.device)
        for place in tensor.places:
            place.put(made)

    @torch.no_grad()
    def _fill(self, tensor: Tensor, value: Tensor | None) -> None:
        if is_spread(tensor):
            self._deal_out(tensor, value)
        else:
            self._broadcast(tensor, value)

    def _broadcast(self, into: Tensor, value: Tensor | None) -> None:
        shared = torch.empty_like(into, device=self._world.device)
        if value is not None:
            shared.copy_(value)
        if shared.numel():
            self._world.broadcast(_bytes(shared))
        into.copy_(shared)

    def _deal_out(self, into: Tensor, value: Tensor | None) -> None:
        """Give each rank its rows: the same number each, rounded up, the last ones padded."""
        part, size = local(into), self._world.size
        each = -(-into.size(0) // size)
        rows = part.new_empty((each, *into.shape[1:]), device=self._world.device)
        if not rows.numel():
            return
        pieces = None
        if value is not None:
            pieces = []
            for start in range(0, each * size, each):
                piece = torch.zeros_like(rows)
                own = value[start : start + each]
                pieces.append(_bytes(piece))
                piece[: own.size(0)] = own
        self._world.scatter(pieces, _bytes(rows))
        part.copy_(rows[: part.size(0)])

    def _order(self) -> list[int]:
        """The tensors' numbers, in the order of `_values`."""
        ready = [i for i, tensor in enumerate(self._tensors) if not is_fake(tensor.built)]
        if self._recording is not None:
            by_memory = self._by_memory(self._recording)
            for memory in self._recording.order():
                ready += by_memory.get(memory, [])
        return ready

    def _values(self) -> Iterator[tuple[int, Tensor]]:
        for i, tensor in enumerate(self._tensors):
            if not is_fake(tensor.built):
                yield i, tensor.built.detach()
                self._tensors[i] = _Tensor(tensor.places, tensor.built.new_empty(0))
        if self._recording is not None:
            by_memory = self._by_memory(self._recording)
            for memory, content in self._recording.replay():
                for i in by_memory.get(memory, []):
                    yield i, view_of(content, self._tensors[i].built)

    def _by_memory(self, recording: Recording) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for i, tensor in enumerate(self._tensors):
            if is_fake(tensor.built):
                memory = recording.number_of(tensor.built)
                assert memory is not None
                found.setdefault(memory, []).append(i)
        return found

    def _check_alike(self) -> None:
        """Ranks that built different models would wait for each other, or take wrong numbers.

        Raises:
            ConfigError: this rank's is not rank 0's.
        """
        mine = [(p[0].name, tuple(b.shape), str(b.dtype)) for p, b in self._tensors]
        theirs = self._world.broadcast_object(mine)
        if mine != theirs:
            pairs = zip([*mine, None], [*theirs, None], strict=False)
            odd = next((a, b) for a, b in pairs if a != b)
            raise ConfigError(
                f"rank {self._world.rank} has built another model than rank 0: "
                f"{odd[0]} instead of {odd[1]}"
            )


def building_on(world: World) -> AbstractContextManager[None]:
    """Where a model is built: a rank's experts are made, whatever happens to the rest."""
    return spread_over(world, aside=_disable_current_modes)


@torch.no_grad()
def _agree_on_experts(model: nn.Module, world: World) -> None:
    """Give all owners of an expert the same numbers: ranks seed alike, but a plugin may not."""
    for group, experts in replicas_of(model, world):
        if group.size > 1:
            for module, _ in experts:
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.copy_(group.broadcast(tensor.to(world.device)))


def _tensors_of(model: nn.Module) -> list[_Tensor]:
    """Every tensor of a model once: parameters, buffers, and attributes without content.

    Those of experts are left out.
    """
    found: dict[int, _Tensor] = {}
    experts = {part for _, expert, _ in expert_modules(model) for part in expert.modules()}
    for module in model.modules():
        if module in experts:
            continue
        attributes = {k: v for k, v in vars(module).items() if isinstance(v, Tensor) and is_fake(v)}
        for tensors, names in (
            (module._parameters, module._parameters),
            (module._buffers, module._buffers),
            (vars(module), attributes),
        ):
            for name in names:
                tensor = tensors[name]
                if tensor is not None:
                    known = found.setdefault(id(tensor), _Tensor([], tensor))
                    known.places.append(_Place(tensors, name))
    return list(found.values())


def _no_hidden_tensors(model: nn.Module) -> None:
    """Refuse modules that keep tensors in lists and dictionaries, where they cannot be made."""
    own = {"_parameters", "_buffers", "_modules"}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in own and not isinstance(value, Tensor) and _has_fake(value):
                raise CannotDeferError(f"{name or type(module).__name__}.{attribute} holds tensors")


def _has_fake(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_fake(value)
    if isinstance(value, dict):
        return any(map(_has_fake, value.values()))
    return isinstance(value, (list, tuple, set)) and any(map(_has_fake, value))


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, of whatever type: collectives do not know all types."""
    return tensor.reshape(-1).view(torch.uint8)
