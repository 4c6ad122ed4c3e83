"""Checkpoints of ours, and of fairseq: dense, sharded, with experts; one process or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from examples.few_shot.models.api import (
    GenerateRequest,
    Ids,
    Model,
    Progress,
    Ranked,
    ScoreRequest,
    Scores,
)
from examples.few_shot.models.fingerprint import checkpoint_files, identity_of
from fairseq_lite import hub
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.world import SingleWorld, World

R = TypeVar("R")

# What splits texts -> the package that does it.
_PACKAGES = {
    "sentencepiece": "sentencepiece", "byte_bpe": "sentencepiece", "subword_nmt": "subword-nmt",
    "fastbpe": "fastBPE", "gpt2": "tokenizers", "hf_byte_bpe": "tokenizers", "bert": "tokenizers",
    "hf_tokenizer": "tokenizers", "moses": "sacremoses", "nltk": "nltk",
}  # fmt: skip


class FliteModel(Model):
    """A language model that `hub.load` reads.

    Args:
        path: the checkpoint, a folder of them, or several between colons (an ensemble).
        world: the processes that share the work and, with experts, the weights.
        max_tokens: computed at a time; None: as many as the model chooses.
        max_prompts: answered at a time by each process; None: any number.
        start: the symbol texts begin with, where the model knows several, as "<de>".
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
        max_tokens: int | None = None,
        max_prompts: int | None = None,
        start: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        found = hub.load(path, world=world, **(options or {}))
        if not isinstance(found, hub.LanguageModel):
            raise ConfigError(f"--model-name {path}: translates; this evaluates language models")
        self.lm = found
        self.world = SingleWorld(found.device) if world is None else world
        self.batch_tokens = max_tokens
        self.batch_prompts = None if max_prompts is None else max_prompts * self.world.size
        self.start = start
        found.start_token(start)  # refuses one that the model does not know
        self.max_tokens = found.max_tokens
        files = identity_of(checkpoint_files(path)) if self.world.is_main else None
        self._identity = {"kind": "fairseq-lite", **self.world.broadcast_object(files)}

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
        found: list[Scores] = []
        for part in self._parts(requests):
            done = len(found)
            answers = self.lm.score_branches(
                [hub.Branches(each.context, each.continuations) for each in part],
                context_scores=context_scores,
                max_tokens=self.batch_tokens,
                start=self.start,
                progress=None if progress is None else _from(done, progress),
            )
            found += [Scores(each.context, each.continuations, each.greedy) for each in answers]
        return found

    def _parts(self, items: Sequence[R]) -> Iterator[Sequence[R]]:
        """What is done at a time: all, where nothing limits it."""
        size = self.batch_prompts or max(len(items), 1)
        for start in range(0, len(items), size):
            yield items[start : start + size]

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
        done = 0
        for (length, stop), everything in groups.items():
            for numbers in self._parts(everything):
                texts = self.lm.complete(
                    [requests[n].prompt for n in numbers],
                    until=stop,
                    max_new_tokens=length,
                    start=self.start,
                    beam=beam,
                )
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = text
                done += len(numbers)
                if progress is not None:
                    progress(done)
        return found

    def rank(
        self,
        contexts: Sequence[Ids],
        wanted: Sequence[int],
        *,
        top: int = 10,
        among: Sequence[int] | None = None,
    ) -> list[Ranked]:
        found: list[Ranked] = []
        for part in self._parts(range(len(contexts))):
            answers = self.lm.rank_tokens(
                [contexts[i] for i in part],
                [wanted[i] for i in part],
                top=top,
                among=among,
                max_tokens=self.batch_tokens,
                start=self.start,
            )
            found += [Ranked(each.rank, each.log_prob, tuple(each.top)) for each in answers]
        return found

    def identity(self) -> dict[str, Any]:
        return self._identity

    def packages(self) -> tuple[str, ...]:
        return packages_of(self.lm.segmentation)

    def agree(self, value: Any) -> Any:
        return self.world.broadcast_object(value)


def packages_of(names: Iterable[str]) -> tuple[str, ...]:
    """The packages behind tokenizers and subword models, where there are any."""
    return tuple(_PACKAGES[name] for name in names if name in _PACKAGES)


def _from(done: int, progress: Progress) -> Progress:
    """Progress behind what is done already."""
    return lambda further: progress(done + further)
