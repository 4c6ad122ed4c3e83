"""Build a model without its memory; make its tensors afterwards, one by one.

`Recording.of` runs a builder with torch's fake tensors, which have a shape and no content, and
writes down the operations that would have filled them. `Recording.replay` performs these on the
CPU, in the same order and from the same state of the random generator, so every tensor becomes
exactly what a build in memory gives; it hands out each as soon as nothing more happens to it and
forgets it then. No part of a model needs to know of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fairseq_lite.errors import FliteError

R = TypeVar("R")

# These write a whole tensor without reading it.
_OVERWRITES = frozenset(
    "uniform_ normal_ bernoulli_ exponential_ log_normal_ cauchy_ geometric_ random_ fill_ "
    "zero_".split()
)


class CannotDeferError(Exception):
    """The builder does something that has no meaning without memory; the text says what."""


class _Ref(NamedTuple):
    """A tensor as it was when an operation met it: a view of a numbered memory."""

    memory: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Step(NamedTuple):
    """One operation: its arguments and results with references in place of tensors.

    Attributes:
        state: of the random generator before it, when it was seeded anew since the last draw.
        touched: the memories it reads or writes.
    """

    op: Any
    args: Any
    kwargs: Any
    out: Any
    state: bytes | None
    touched: frozenset[int]

    @property
    def draws(self) -> bool:
        return _draws(self.op)

    @property
    def overwrites(self) -> _Ref | None:
        """The tensor that is filled without a look at its content, if that is all it does."""
        known = self.op.overloadpacket.__name__ in _OVERWRITES and len(self.touched) == 1
        return self.args[0] if known else None


class Recording:
    """The operations of a build, in their order."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        # By address of the fake storage; the tensor in it keeps the address from being used again.
        self._numbers: dict[int, tuple[int, Tensor]] = {}
        self._bytes: list[int] = []
        self._begin = self._state = _random_state()

    @classmethod
    def of(cls, build: Callable[[], R]) -> tuple[R, Recording]:
        """Run `build` with fake tensors, which `is_fake` tells from others.

        Raises:
            CannotDeferError: it looks at the content of tensors, or fails for another reason. The
                random generator is as it was.
        """
        recording = cls()
        try:
            # Not torch's meta device: there, some of torch.nn.init's functions silently do nothing.
            with FakeTensorMode(allow_non_fake_inputs=True), _Operations(recording):
                return build(), recording
        except FliteError:
            raise
        except Exception as e:
            # Whatever it is: a build in memory will say it again if the fault is the builder's.
            _set_random_state(recording._begin)
            raise CannotDeferError(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}") from e

    # -- writing down ---------------------------------------------------------------------------

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of a fake tensor's memory; None if the builder did not make it."""
        found = self._numbers.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[0]

    def note(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note an operation that ran on fake tensors."""
        fresh = [t for t in _tensors(out) if is_fake(t) and self.number_of(t) is None]
        if not (fresh or op._schema.is_mutable or _draws(op)):
            return  # a view: the memory it looks at is known
        for tensor in _tensors((args, kwargs)):
            if is_fake(tensor) and self.number_of(tensor) is None:
                raise RuntimeError("it uses tensors without content that it did not make")
        for tensor in fresh:
            self._new(tensor)
        state = None
        if _draws(op):
            now = _random_state()
            if now != self._state:
                state = self._state = now
        args, kwargs, out = (_replaced(part, Tensor, self._ref) for part in (args, kwargs, out))
        touched = frozenset(ref.memory for ref in _found((args, kwargs, out), _Ref))
        self._steps.append(_Step(op, args, kwargs, out, state, touched))

    def _new(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        number = len(self._bytes)
        self._numbers[storage._cdata] = (number, tensor)
        self._bytes.append(storage.nbytes())
        return number

    def _ref(self, tensor: Tensor) -> Any:
        number = self.number_of(tensor) if is_fake(tensor) else None
        if number is None:
            return tensor  # with content: a constant
        return _Ref(
            number,
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
        )

    # -- doing it -------------------------------------------------------------------------------

    def order(self) -> list[int]:
        """The numbers of all memories, in the order in which `replay` hands them out."""
        ends = self._ends()
        return sorted(ends, key=lambda n: (ends[n], n))

    @torch.no_grad()
    def replay(self) -> Iterator[tuple[int, Tensor]]:
        """Fill the tensors.

        Yields:
            The number of a memory and its content, as bytes (1-D, uint8); see `view_of`. In the
            order of `order`; what is not kept by then is gone.
        """
        starts, ends = self._starts(), self._ends()
        memories: dict[int, torch.UntypedStorage] = {}
        _set_random_state(self._begin)
        for i, step in enumerate(self._steps):
            if step.state is not None:
                _set_random_state(step.state)
            if all(i < starts.get(n, 0) for n in step.touched):
                # What it makes is overwritten later, but the next draws depend on its own.
                if step.draws:
                    self._perform(step, {})
            else:
                self._perform(step, memories)
            for number in sorted(n for n in step.touched if ends[n] == i):
                yield number, _bytes_of(memories.pop(number))

    def _ends(self) -> dict[int, int]:
        """The last step that touches each memory."""
        return {n: i for i, step in enumerate(self._steps) for n in step.touched}

    def _starts(self) -> dict[int, int]:
        """For memories that are overwritten as a whole: the last time that happens.

        Of those alone that no other memory is computed from, or a model whose weights are drawn
        anew at the end (`self.apply(init_weights)`) would be held as a whole until then.
        """
        mixed = {n for step in self._steps if len(step.touched) > 1 for n in step.touched}
        starts = {}
        for i, step in enumerate(self._steps):
            ref = step.overwrites
            if ref is not None and ref.memory not in mixed:
                wide = torch.empty((), dtype=ref.dtype).element_size()
                if torch.Size(ref.size).numel() * wide == self._bytes[ref.memory]:
                    starts[ref.memory] = i
        return starts

    def _perform(self, step: _Step, memories: dict[int, torch.UntypedStorage]) -> None:
        def real(ref: _Ref) -> Tensor:
            if ref.memory not in memories:
                memories[ref.memory] = _storage(self._bytes[ref.memory])
            return _as_tensor(memories[ref.memory], ref)

        args, kwargs = (
            # Constants are copied: a result may share their memory, and be changed later.
            _replaced(_replaced(part, Tensor, torch.clone), _Ref, real)
            for part in (step.args, step.kwargs)
        )
        out = step.op(*args, **kwargs)
        for ref, tensor in zip(_found(step.out, _Ref), _tensors(out), strict=True):
            if ref.memory not in memories:
                if tuple(tensor.stride()) != ref.stride:
                    copy = torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype)
                    tensor = copy.copy_(tensor)
                memories[ref.memory] = tensor.untyped_storage()


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape only."""
    return isinstance(tensor, FakeTensor)


def view_of(content: Tensor, fake: Tensor) -> Tensor:
    """The tensor that `fake` stood for, given the bytes of its memory."""
    shape, stride = tuple(fake.shape), tuple(fake.stride())
    ref = _Ref(0, fake.dtype, shape, stride, int(fake.storage_offset()))
    return _as_tensor(content.untyped_storage(), ref)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation on tensors."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        if any(map(is_fake, _tensors((args, kwargs, out)))):
            self._recording.note(func, args, kwargs, out)
        elif _draws(func):
            raise RuntimeError("it draws random numbers into tensors it did not make")
        return out


def _random_state() -> bytes:
    with _disable_current_modes():  # or it would be fake, too
        return torch.get_rng_state().numpy().tobytes()


def _set_random_state(state: bytes) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _draws(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


def _storage(size: int) -> torch.UntypedStorage:
    return torch.UntypedStorage(size)  # type: ignore[no-untyped-call]


def _as_tensor(storage: torch.UntypedStorage, ref: _Ref) -> Tensor:
    empty = torch.empty(0, dtype=ref.dtype)
    return empty.set_(storage, ref.offset, ref.size, ref.stride)  # type: ignore[call-overload, no-any-return]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload, no-any-return]


def _replaced(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with everything of a `kind` in its lists, tuples and dictionaries changed."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, kind, change) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, kind, change) for key, item in value.items()}
    return value


def _found(value: Any, kind: type) -> list[Any]:
    found: list[Any] = []
    _replaced(value, kind, found.append)
    return found


def _tensors(value: Any) -> list[Tensor]:
    return _found(value, Tensor)
