"""A language model that several ranks have together, and only one of them asks.

All ranks of `hub.load(path, world=world)` call the same methods with the same arguments. The
command of another package knows nothing of that. It runs on rank 0 inside of `leading`, where every
question goes to the other ranks first, and they `follow`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fairseq_lite import hub
from fairseq_lite.errors import ConfigError
from fairseq_lite.hub.language_model import LanguageModel
from fairseq_lite.parallel.world import World

_LEADS: ContextVar[World | None] = ContextVar("leads", default=None)


@contextmanager
def leading(world: World) -> Iterator[None]:
    """Inside, what this rank asks of a `LedModel` is asked of it on all ranks of a world."""
    before = _LEADS.set(world)
    ended = False
    try:
        yield
        ended = True
    except SystemExit:  # a command that is through, or has said what is wrong
        ended = True
        raise
    finally:
        _LEADS.reset(before)
        # After another error the others have nothing to wait for: who launched them ends them.
        if ended:
            world.broadcast_object(None)


def follow(world: World) -> None:
    """Ask whatever rank 0 asks, until it ends."""
    model: LanguageModel | None = None
    while (asked := world.broadcast_object(None)) is not None:
        name, args, options = asked
        if model is None or name == "load":
            model = _load(*args, world=world, **options)
        else:
            getattr(model, name)(*args, **options)


class LedModel:
    """A language model, on all ranks of a world that this one leads, or on this one alone.

    Args:
        path: as for `hub.load`.
        device: as for `hub.load`; a world has chosen already.
        options: further ones of `hub.load`.

    Attributes:
        model: this rank's, for what concerns no other rank.

    Raises:
        ConfigError: it translates.
        CheckpointError: no such file, or damaged.
    """

    def __init__(self, path: str, *, device: str | None = None, **options: Any) -> None:
        self._world = _LEADS.get()
        options["device"] = device if self._world is None else None
        self._tell("load", (path,), options)
        self.model = _load(path, world=self._world, **options)

    def ask(self, name: str, *args: Any, **options: Any) -> Any:
        """Call a method of the model, on every rank; returns what it returns."""
        self._tell(name, args, options)
        return getattr(self.model, name)(*args, **options)

    def _tell(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._world is not None:
            self._world.broadcast_object((name, args, options))


def _load(path: str, **options: Any) -> LanguageModel:
    found = hub.load(path, **options)
    if not isinstance(found, LanguageModel):
        raise ConfigError(f"{path}: a model that translates; expected a language model")
    return found
