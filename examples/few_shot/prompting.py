"""Prompts: shots and a question as text, then as tokens that fit the model.

Shots are dropped whole, from the last on, until the longest candidate fits; then the description
goes; only then is the question itself cut, from the left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.few_shot.models.api import Ids, Model, ScoreRequest
from examples.few_shot.samples import FewShotSample
from examples.few_shot.scoring import branching, common_prefix, common_suffix
from examples.few_shot.templates.api import FewShotTemplate


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens of a model.

    Args:
        model: whose tokens.
        limit: the most tokens of a text.
        newline_to_end: every line break becomes the model's end symbol and empty lines go,
            `--replace-newline-with-eos`.
    """

    model: Model
    limit: int
    newline_to_end: bool = False

    def __call__(self, text: str) -> Ids:
        """The tokens of a text."""
        if not self.newline_to_end:
            return self.model.encode(text)
        parts: list[Ids] = []
        for line in filter(str.strip, text.split("\n")):
            if parts:
                parts.append(np.array([self.model.end], dtype=np.int64))
            parts.append(self.model.encode(line))
        if text.endswith("\n") and parts:
            parts.append(np.array([self.model.end], dtype=np.int64))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Prompt:
    """The texts of one question.

    Attributes:
        sample: the question.
        before: description, shots and the question up to its mask.
        answers: the words of each candidate; none where the model writes.
        after: what stands behind the mask.
        shots: how many shots stand in it.
        left_out: how many more there would have been, had they fitted.
    """

    sample: FewShotSample
    before: str
    answers: tuple[str, ...]
    after: str
    shots: int
    left_out: int = 0

    @property
    def texts(self) -> list[str]:
        """The whole text of each candidate."""
        return [self.before + answer + self.after for answer in self.answers]


@dataclass(frozen=True)
class Encoded:
    """A prompt as tokens.

    Attributes:
        prompt: the texts.
        request: the context that all candidates share, and what is different.
        starts: where each candidate's own words begin, from the end of the context.
        suffix: how many tokens all candidates end with.
        cut: how many tokens were cut off on the left.
    """

    prompt: Prompt
    request: ScoreRequest
    starts: tuple[int, ...]
    suffix: int
    cut: int


def compose(
    template: FewShotTemplate,
    sample: FewShotSample,
    shots: Sequence[str],
    description: str = "",
) -> Prompt:
    """A question behind its shots.

    Args:
        template: how the question is put.
        sample: the question.
        shots: the texts of the shots.
        description: what is said first; empty for nothing.
    """
    before, after = template.split(sample)
    parts = [*filter(None, [description]), *shots]
    # The separator stands between shots and question even where the question begins with its mask.
    return Prompt(
        sample,
        template.sep.join([*parts, before]),
        tuple(template.verbalize(sample, each) for each in sample.candidates),
        after,
        len(shots),
    )


def fitted(
    template: FewShotTemplate,
    sample: FewShotSample,
    shots: Sequence[str],
    description: str,
    encoding: Encoding,
    room: int = 0,
    most: int | None = None,
) -> tuple[Prompt, list[Ids]]:
    """The prompt with as many shots as fit, and its tokens (of each candidate, or of the prompt).

    Args:
        template: how the question is put.
        sample: the question.
        shots: all that there might be.
        description: said first.
        encoding: tokens and their limit.
        room: tokens kept free for a written answer.
        most: no more shots than these, though more may fit; None for no such limit.
    """

    def attempt(count: int, said: str) -> tuple[Prompt, list[Ids]]:
        prompt = compose(template, sample, shots[:count], said)
        prompt = dataclasses.replace(prompt, left_out=len(shots) - count)
        texts = prompt.texts if sample.candidates else [prompt.before.rstrip(" ")]
        return prompt, [encoding(text) for text in texts]

    def fits(found: tuple[Prompt, list[Ids]]) -> bool:
        return max(map(len, found[1])) + room <= encoding.limit

    count = len(shots) if most is None else min(most, len(shots))
    found = attempt(count, description)
    if fits(found) or not (count or description):
        return found
    fewest, most = 0, count - 1
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (
            (middle, most) if fits(attempt(middle, description)) else (fewest, middle - 1)
        )
    found = attempt(fewest, description)
    return found if fewest or fits(found) else attempt(0, "")


def encode(prompt: Prompt, sequences: Sequence[Ids], encoding: Encoding) -> Encoded:
    """The candidates of a prompt as one request, cut to the limit on the left.

    Args:
        prompt: the texts.
        sequences: their tokens.
        encoding: tokens and their limit.
    """
    fork = branching(sequences) if len(sequences) > 1 else len(sequences[0]) - 1
    words = encoding(prompt.before)
    starts = tuple(common_prefix([words, each]) for each in sequences)
    fork = max(0, min(fork, *starts) if len(sequences) == 1 else fork)
    over = max(0, max(map(len, sequences)) - encoding.limit)
    context, tails = sequences[0][:fork], [each[fork:] for each in sequences]
    cut = min(over, fork)
    tails = [tail[-encoding.limit :] for tail in tails]
    return Encoded(
        prompt,
        ScoreRequest(context[cut:], tuple(tails), unprompted=not prompt.before),
        tuple(start - fork for start in starts),
        min(common_suffix(sequences), *(len(tail) for tail in tails)) if len(tails) > 1 else 0,
        over,
    )
