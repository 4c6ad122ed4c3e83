"""The processes of a run, seen from one of them: rank, size, device, and how they exchange data.

Every part of the library that needs another process asks a `World`. A run of one process has one
too, with the same methods, so nothing else asks whether a run is distributed.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_lite.parallel.groups import REDUCE_OPS, Group, ReduceOp

# The block that `ProcessWorld.sum` exchanges: four numbers that tell whether all ranks hold the
# same names, then room for values: so many at first, later as many as all ranks have had before.
_HEADER = 4
_ROOM = 60


class World(ABC):
    """All processes of a run, as one of them sees them.

    Methods that exchange something must be called by every rank, in the same order.

    Attributes:
        rank: this process, from 0 to `size - 1`.
        size: the number of processes.
        local_rank: this process among those of its machine; the GPU it uses.
        device: where this process computes.
    """

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes files."""
        return self.rank == 0

    @abstractmethod
    def sum(self, values: Mapping[str, float | Tensor]) -> dict[str, Any]:
        """Add up a dictionary of numbers over all ranks, in float64 and in one collective.

        Args:
            values: numbers, tensors of one element or vectors, on any device. Ranks may hold
                different names; a name counts as zero where it is missing.

        Returns:
            The sums, the same on every rank: floats, and vectors (float64, on the CPU).
        """

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Combine `tensor` over all ranks, in place, and return it."""

    @abstractmethod
    def all_reduce_start(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum `tensor` in place; call what is returned to wait for the end."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Overwrite `tensor` with that of rank `src`, and return it."""

    @abstractmethod
    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """The object of rank `src`, on every rank; what other ranks pass does not matter."""

    @abstractmethod
    def gather_objects(self, obj: Any) -> list[Any]:
        """The objects of all ranks in rank order, on every rank."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """The tensors of all ranks, in rank order, on rank 0; None elsewhere.

        Args:
            tensor: on `device`, of the same shape and type on every rank.
        """

    @abstractmethod
    def scatter(self, tensors: Sequence[Tensor] | None, out: Tensor) -> Tensor:
        """Overwrite `out` with this rank's tensor of those that rank 0 gives, and return it.

        Args:
            tensors: one for each rank, all like `out`; None except on rank 0.
            out: on `device`, of the same shape and type on every rank.
        """

    @abstractmethod
    def gather_aside(self, *, main_only: bool = False) -> Callable[[Any], list[Any]]:
        """A `gather_objects` that another thread may call while this one exchanges other things.

        Called on every rank; each call forms a new group.

        Args:
            main_only: rank 0 alone gets the objects, the others an empty list.
        """

    @abstractmethod
    def split(self, groups: tuple[tuple[int, ...], ...]) -> Group:
        """Divide the ranks into groups; returns this rank's.

        Called on every rank. Dividing them again in the same way forms nothing new.

        Args:
            groups: each rank is in exactly one of them.
        """

    @abstractmethod
    def max(self, value: float) -> float:
        """The largest of the ranks' values."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""

    @abstractmethod
    def form_group(self) -> None:
        """Have torch's default process group exist, which sharded tensors want in one process too.

        Doing it twice is a no-op; `close` ends it.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the group; the last thing a rank does."""

    def broadcast_state(self, state: Any, src: int = 0) -> Any:
        """As `broadcast_object`, for nested dictionaries, lists and tuples that hold tensors.

        The tensors travel as tensors and arrive on `device`, which costs a fraction of pickling
        them. On rank `src` the state is returned as it is.
        """
        tensors: list[Tensor] = []
        skeleton = self.broadcast_object(
            _take_tensors(state, tensors) if self.rank == src else None, src
        )
        if self.rank == src:
            for tensor in tensors:
                self.broadcast(tensor.detach().to(self.device).contiguous(), src)
            return state

        def receive(slot: _Slot) -> Tensor:
            empty = torch.empty(slot.shape, dtype=slot.dtype, device=self.device)
            return self.broadcast(empty, src)

        return _put_tensors(skeleton, receive)


class SingleWorld(World):
    """A run of one process."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(0, 1, 0, torch.device(device))
        self._formed = False
        self._group = Group((0,), 0)

    def sum(self, values: Mapping[str, float | Tensor]) -> dict[str, Any]:
        return _from_block(values, _to_block(values.values(), self.device).cpu())

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        return tensor

    def all_reduce_start(self, tensor: Tensor) -> Callable[[], object]:
        return _nothing

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        return tensor

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        return obj

    def broadcast_state(self, state: Any, src: int = 0) -> Any:
        return state

    def gather_objects(self, obj: Any) -> list[Any]:
        return [obj]

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        return [tensor]

    def scatter(self, tensors: Sequence[Tensor] | None, out: Tensor) -> Tensor:
        assert tensors is not None
        return out.copy_(tensors[0])

    def gather_aside(self, *, main_only: bool = False) -> Callable[[Any], list[Any]]:
        return self.gather_objects

    def split(self, groups: tuple[tuple[int, ...], ...]) -> Group:
        return self._group

    def max(self, value: float) -> float:
        return float(value)

    def barrier(self) -> None:
        pass

    def form_group(self) -> None:
        if not dist.is_initialized():
            cuda = self.device.type == "cuda"
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=dist.HashStore(),
                rank=0,
                world_size=1,
                device_id=self.device if cuda else None,
            )
            self._formed = True

    def close(self) -> None:
        if self._formed and dist.is_initialized():
            dist.destroy_process_group()
        self._formed = False


class ProcessWorld(World):
    """A run of several processes, over torch's default process group (gloo or NCCL).

    The group must have been initialised; `launch` does.
    """

    def __init__(self, local_rank: int, device: torch.device | str) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size(), local_rank, torch.device(device))
        self._groups: dict[tuple[tuple[int, ...], ...], Group] = {}
        self._room = _ROOM

    def sum(self, values: Mapping[str, float | Tensor]) -> dict[str, Any]:
        mine = {name: values[name] for name in sorted(values)}
        numbers = _to_block(mine.values(), self.device)
        room, size = self._room, numbers.numel()
        block = torch.zeros(_HEADER + room, dtype=torch.float64, device=self.device)
        # Two digests of 16 bits: the sums of their squares stay exact in a float64.
        names = "\0".join(f"{name} {_size(value)}" for name, value in mine.items())
        low, high = divmod(zlib.crc32(names.encode()), 1 << 16)
        header = [low, low * low, high, high * high]
        block[:_HEADER] = torch.tensor(header, dtype=torch.float64)
        block[_HEADER : _HEADER + min(size, room)] = numbers[:room]
        dist.all_reduce(block)
        summed = block.cpu()
        low, low2, high, high2 = (int(x) for x in summed[:_HEADER].tolist())
        # By Cauchy-Schwarz these are equal only if all digests are; and as only sums are compared,
        # all ranks take the same branch.
        if self.size * low2 != low * low or self.size * high2 != high * high:
            return self._sum_by_name(_from_block(mine, numbers.cpu()))
        result = summed[_HEADER : _HEADER + min(size, room)]
        if size > room:
            rest = self.all_reduce(numbers[room:].contiguous())
            result = torch.cat([result, rest.cpu()])
            self._room = size  # on all ranks: they have just agreed upon the names
        by_name = _from_block(mine, result)
        return {name: by_name[name] for name in values}  # in the caller's order

    def _sum_by_name(self, values: dict[str, Any]) -> dict[str, Any]:
        """The way for ranks that hold different names, for example without a batch."""
        sums: dict[str, Any] = {}
        for each in self.gather_objects(values):
            for name, value in each.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        dist.all_reduce(tensor, REDUCE_OPS[op])
        return tensor

    def all_reduce_start(self, tensor: Tensor) -> Callable[[], object]:
        wait: Callable[[], object] = dist.all_reduce(tensor, async_op=True).wait
        return wait

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        dist.broadcast(tensor, src)
        return tensor

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        box = [obj if self.rank == src else None]
        dist.broadcast_object_list(box, src, device=self.device)
        return box[0]

    def gather_objects(self, obj: Any) -> list[Any]:
        return _gather_objects(self.size, None, obj)

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        box = [torch.empty_like(tensor) for _ in range(self.size)] if self.is_main else None
        dist.gather(tensor, box)
        return box

    def scatter(self, tensors: Sequence[Tensor] | None, out: Tensor) -> Tensor:
        dist.scatter(out, None if tensors is None else list(tensors))
        return out

    def gather_aside(self, *, main_only: bool = False) -> Callable[[Any], list[Any]]:
        # gloo even beside NCCL: objects are exchanged on the CPU, and no stream waits for them.
        group = dist.new_group(backend="gloo")
        if main_only:
            return partial(_gather_on_main, self.size if self.is_main else 0, group)
        return partial(_gather_objects, self.size, group)

    def split(self, groups: tuple[tuple[int, ...], ...]) -> Group:
        if groups not in self._groups:
            mine = None
            for ranks in groups:
                handle = None
                if len(ranks) == self.size:
                    handle = dist.group.WORLD
                elif len(ranks) > 1:
                    # Every rank forms every group, as torch demands, those it is not in too.
                    handle = dist.new_group(list(ranks))
                if self.rank in ranks:
                    mine = Group(ranks, self.rank, handle)
            assert mine is not None, f"rank {self.rank} is in none of {groups}"
            self._groups[groups] = mine
        return self._groups[groups]

    def max(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(self.all_reduce(tensor, "max").item())

    def barrier(self) -> None:
        # A reduction that is read back also waits for the GPU, which dist.barrier need not.
        self.max(0.0)

    def form_group(self) -> None:
        pass

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _gather_objects(size: int, group: dist.ProcessGroup | None, obj: Any) -> list[Any]:
    box: list[Any] = [None] * size
    dist.all_gather_object(box, obj, group=group)
    return box


def _gather_on_main(size: int, group: dist.ProcessGroup, obj: Any) -> list[Any]:
    """The objects of all ranks on rank 0; `size` is 0 on the others, which get nothing."""
    box: list[Any] = [None] * size
    dist.gather_object(obj, box if size else None, dst=0, group=group)
    return box


def _nothing() -> None:
    pass


def _to_block(values: Any, device: torch.device) -> Tensor:
    """Numbers and vectors end to end as one float64 tensor on `device`, without a sync each."""
    items: Sequence[float | Tensor] = list(values)
    if not items:
        return torch.empty(0, dtype=torch.float64, device=device)
    plain = torch.tensor(
        [float(x) for x in items if not isinstance(x, Tensor)], dtype=torch.float64
    ).to(device)
    numbers = iter(torch.split(plain, 1) if plain.numel() else ())
    return torch.cat(
        [
            x.detach().reshape(-1).to(device, torch.float64)
            if isinstance(x, Tensor)
            else next(numbers)
            for x in items
        ]
    )


def _size(value: float | Tensor) -> int:
    return value.numel() if isinstance(value, Tensor) else 1


def _from_block(like: Mapping[str, float | Tensor], block: Tensor) -> dict[str, Any]:
    """The numbers of a block on the CPU by name: floats, and vectors where `like` has some."""
    pieces = torch.split(block, [_size(value) for value in like.values()])
    return {
        name: piece.item() if piece.numel() == 1 else piece
        for name, piece in zip(like, pieces, strict=True)
    }


class _Slot:
    """Where a tensor was in a nested structure, and how it looked."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype


def _take_tensors(state: Any, taken: list[Tensor]) -> Any:
    if isinstance(state, Tensor):
        taken.append(state)
        return _Slot(state)
    if isinstance(state, Mapping):
        return {key: _take_tensors(value, taken) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_take_tensors(value, taken) for value in state)
    return state


def _put_tensors(state: Any, receive: Any) -> Any:
    if isinstance(state, _Slot):
        return receive(state)
    if isinstance(state, dict):
        return {key: _put_tensors(value, receive) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_put_tensors(value, receive) for value in state)
    return state
