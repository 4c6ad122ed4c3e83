"""Doing something on every rank such that an error on one is an error on all: none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from fairseq_lite.errors import FliteError
from fairseq_lite.parallel.world import World

T = TypeVar("T")


def together(gather: Callable[[Any], list[Any]], action: Callable[[], T]) -> T:
    """Do something on every rank.

    Args:
        gather: `World.gather_objects`, or that of another group.
        action: must not need other ranks itself.

    Raises:
        FliteError: on every rank, when it was raised on one.
    """
    result: Any = None
    error: FliteError | None = None
    try:
        result = action()
    except FliteError as e:
        error = e
    errors = gather(error)
    for each in [error, *errors]:  # its own first: it has the cause attached
        if each is not None:
            raise each
    return cast("T", result)


def on_main(world: World, action: Callable[[], T]) -> T:
    """Do something on rank 0 and give every rank its result, or its error."""
    result: Any = None
    if world.is_main:
        try:
            result = action()
        except FliteError as e:
            result = e
    result = world.broadcast_object(result)
    if isinstance(result, FliteError):
        raise result
    return cast("T", result)
