"""A model without weights for tests: log-probabilities are a function of the tokens alone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.few_shot.models.api import (
    GenerateRequest,
    Ids,
    Model,
    Progress,
    Ranked,
    ScoreRequest,
    Scores,
)


class DummyModel(Model):
    """Tokens are bytes; each has a probability that its two neighbours in front of it give.

    Args:
        max_tokens: the longest text it takes.
    """

    def __init__(self, max_tokens: int = 2048) -> None:
        self.max_tokens = max_tokens

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def symbols(self, ids: Ids) -> list[str]:
        return [chr(i) if i < 256 else "</s>" for i in ids.tolist()]

    @property
    def end(self) -> int:
        return 256

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        context_scores: bool = False,
        progress: Progress | None = None,
    ) -> list[Scores]:
        found = []
        for request in requests:
            n = len(request.context)
            texts = [np.concatenate([request.context, c]) for c in request.continuations]
            context = self._log_probs(request.context) if context_scores else None
            tails = tuple(self._log_probs(text)[n:] for text in texts)
            found.append(Scores(context, tails, tuple(False for _ in tails)))
            if progress is not None:
                progress(len(found))
        return found

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        beam: int = 1,
        progress: Progress | None = None,
    ) -> list[str]:
        """The last word of the prompt."""
        texts = ["".join(self.symbols(each.prompt)) for each in requests]
        return [(text.split() or [""])[-1] for text in texts]

    def rank(
        self,
        contexts: Sequence[Ids],
        wanted: Sequence[int],
        *,
        top: int = 10,
        among: Sequence[int] | None = None,
    ) -> list[Ranked]:
        known = list(range(257)) if among is None else list(among)
        found = []
        for context, token in zip(contexts, wanted, strict=True):
            one = {t: float(self._log_probs(np.append(context, t))[-1]) for t in {*known, token}}
            best = [t for _, t in sorted((-one[t], t) for t in known)]
            better = sum(s > one[token] for t, s in one.items() if t != token)
            found.append(Ranked(better + 1, one[token], tuple(best[:top])))
        return found

    def identity(self) -> dict[str, Any]:
        return {"kind": "dummy", "max_tokens": self.max_tokens}

    @staticmethod
    def _log_probs(ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        padded = [0, 0, *ids.tolist()]
        made = [
            zlib.crc32(bytes(i % 251 for i in padded[n : n + 3])) / 2**32
            for n in range(len(padded) - 2)
        ]
        return np.array([-0.1 - 5 * x for x in made], dtype=np.float32)
