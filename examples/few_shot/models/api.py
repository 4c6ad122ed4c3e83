"""A model is something that answers requests: score these continuations, go on from that text.

Planning an evaluation needs none of it, so nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ScoreRequest:
    """Continuations that share a context.

    Attributes:
        context: ids, without a start symbol.
        continuations: each of one token at least.
        unprompted: nothing stands in front of the candidates, and the context is only what they
            begin with in common. A model whose texts have no start symbol gives such a text one.
    """

    context: Ids
    continuations: tuple[Ids, ...]
    unprompted: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the context with its longest continuation."""
        return len(self.context) + max((len(c) for c in self.continuations), default=0)


@dataclass(frozen=True)
class Scores:
    """The answer to a `ScoreRequest`: log-probabilities, natural.

    Attributes:
        context: of each token of the context; None where it was not asked for.
        continuations: of each token of each continuation.
        greedy: for each continuation, whether every token of it is the likeliest one there.
    """

    context: npt.NDArray[np.float32] | None
    continuations: tuple[npt.NDArray[np.float32], ...]
    greedy: tuple[bool, ...]


@dataclass(frozen=True)
class GenerateRequest:
    """Text to go on from.

    Attributes:
        prompt: ids, without a start symbol; with what may be written no more than the model takes.
        max_new_tokens: how many tokens are written at most.
        stop: texts that end the answer and are not part of it.
    """

    prompt: Ids
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranked:
    """Where one token stands among all that could follow a context.

    Attributes:
        rank: 1 for the likeliest.
        log_prob: natural.
        top: the likeliest tokens, best first.
    """

    rank: int
    log_prob: float
    top: tuple[int, ...]


class Model(ABC):
    """What predictors need of a language model.

    Attributes:
        max_tokens: the most tokens of a text, its start symbol not counted.
    """

    max_tokens: int

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """A text as ids, without start and end symbols."""

    @abstractmethod
    def symbols(self, ids: Ids) -> list[str]:
        """The names of tokens."""

    @property
    @abstractmethod
    def end(self) -> int:
        """The id of the end symbol, which `--replace-newline-with-eos` puts between lines."""

    @abstractmethod
    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        context_scores: bool = False,
        progress: Progress | None = None,
    ) -> list[Scores]:
        """Answer requests, in their order; what is answered does not depend on the others.

        Args:
            requests: none longer than `max_tokens`.
            context_scores: score the contexts too.
            progress: is told how many requests are done.
        """

    @abstractmethod
    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        beam: int = 1,
        progress: Progress | None = None,
    ) -> list[str]:
        """What the model writes behind each prompt, without the prompt."""

    @abstractmethod
    def rank(
        self,
        contexts: Sequence[Ids],
        wanted: Sequence[int],
        *,
        top: int = 10,
        among: Sequence[int] | None = None,
    ) -> list[Ranked]:
        """Rank one token behind each context, among all or some of the vocabulary."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this model from others: plain values for results files (hash, size, …)."""

    def packages(self) -> tuple[str, ...]:
        """Packages whose versions its answers may depend on, besides torch."""
        return ()

    def agree(self, value: Any) -> Any:
        """The first process's value, in every process that shares the model."""
        return value
