"""Checkpoints of ours, and of fairseq: dense, sharded, with experts; one process or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from examples.few_shot.models.api import (
    GenerateRequest,
    Ids,
    Model,
    Progress,
    Ranked,
    ScoreRequest,
    Scores,
)
from examples.few_shot.models.fingerprint import files_identity
from fairseq_lite import hub
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.world import World


class FliteModel(Model):
    """A language model that `hub.load` reads.

    Args:
        path: the checkpoint, or a folder of them.
        world: the processes that share the work and, with experts, the weights.
        max_tokens: tokens computed at a time.
        options: further ones of `hub.load`.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is no language model.
    """

    def __init__(
        self,
        path: str,
        *,
        world: World | None = None,
        batch_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        found = hub.load(path, world=world, **(options or {}))
        if not isinstance(found, hub.LanguageModel):
            raise ConfigError(f"--model-name {path}: translates; this evaluates language models")
        self.lm = found
        self.world = world
        self.batch_tokens = batch_tokens
        self.max_tokens = found.max_tokens
        self._identity = files_identity(path) | {"kind": "fairseq-lite"}

    def encode(self, text: str) -> Ids:
        return self.lm.encode(text)

    def symbols(self, ids: Ids) -> list[str]:
        return [self.lm.dictionary[i] for i in ids.tolist()]

    @property
    def end(self) -> int:
        return self.lm.dictionary.eos()

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        context_scores: bool = False,
        progress: Progress | None = None,
    ) -> list[Scores]:
        found = self.lm.score_branches(
            [hub.Branches(each.context, each.continuations) for each in requests],
            context_scores=context_scores,
            max_tokens=self.batch_tokens,
            progress=progress,
        )
        return [Scores(each.context, each.continuations, each.greedy) for each in found]

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        beam: int = 1,
        progress: Progress | None = None,
    ) -> list[str]:
        found: list[str] = [""] * len(requests)
        # Requests that end alike go together.
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, each in enumerate(requests):
            groups.setdefault((each.max_new_tokens, each.stop), []).append(number)
        for (length, stop), numbers in groups.items():
            texts = self.lm.continue_texts(
                [requests[n].prompt for n in numbers],
                until=stop,
                max_new_tokens=length,
                beam=beam,
            )
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
            if progress is not None:
                progress(sum(map(bool, found)))
        return found

    def rank(
        self,
        contexts: Sequence[Ids],
        wanted: Sequence[int],
        *,
        top: int = 10,
        among: Sequence[int] | None = None,
    ) -> list[Ranked]:
        found = self.lm.rank_tokens(contexts, wanted, top=top, among=among)
        return [Ranked(each.rank, each.log_prob, tuple(each.top)) for each in found]

    def identity(self) -> dict[str, Any]:
        return self._identity

    def agree(self, value: Any) -> Any:
        return value if self.world is None else self.world.broadcast_object(value)

    @property
    def is_main(self) -> bool:
        return self.world is None or self.world.is_main
