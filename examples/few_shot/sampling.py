"""Which samples are shots: a function of seed, trial and task, of nothing else.

The pool is put in one random order; k shots are the first k of it, so those of a smaller k are
among those of a larger one. The sample that is asked about is never among its own shots, nor is a
copy of it, nor its translation: where it would be, the next of the order takes its place.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from examples.few_shot.samples import FewShotSample
from fairseq_lite.errors import ConfigError

logger = logging.getLogger(__name__)


def order(size: int, *, seed: int, trial: int, task: str) -> list[int]:
    """A random order of `size` samples, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{trial}/{task}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return [int(i) for i in generator.permutation(size)]


@dataclass(frozen=True)
class Shots:
    """The shots of a trial.

    Args:
        pool: the samples to draw from.
        ranked: their numbers, in the order of the trial.
        k: how many are taken.
        leak: a sample may be its own shot.
        classes: of each sample of the pool, where there are to be as many shots of each.
        keep_order: shots stand in the order of the file.
        translated: see `translations`.
    """

    pool: Sequence[FewShotSample]
    ranked: tuple[int, ...]
    k: int
    leak: bool = False
    classes: tuple[str, ...] | None = None
    keep_order: bool = False
    translated: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def of(self, sample: FewShotSample) -> list[FewShotSample]:
        """The shots of a sample, in the order in which they stand in its prompt."""
        free: Sequence[int] = self.ranked
        if not self.leak:
            own = self.translated.get(sample.identity, frozenset())
            # The order has to be looked through for few samples.
            if own or sample.content in self._contents:
                free = [i for i in free if i not in own and self.pool[i].content != sample.content]
        taken = list(free[: self.k])
        if self.classes is not None:
            taken = self._per_class(free, self.classes)
        return [self.pool[i] for i in (sorted(taken) if self.keep_order else taken)]

    @functools.cached_property
    def _contents(self) -> frozenset[str]:
        return frozenset(each.content for each in self.pool)

    def _per_class(self, free: Sequence[int], of: Sequence[str]) -> list[int]:
        """The first of each class in turn: classes alternate in the prompt."""
        # A class whose only sample is the question stays a class.
        classes: dict[str, list[int]] = {name: [] for name in of}
        for i in free:
            classes[of[i]].append(i)
        each = self.k // len(classes)
        short = sorted(name for name, members in classes.items() if len(members) < each)
        if short:
            raise ConfigError(
                f"--uniform-sampling: class {short[0]!r} has {len(classes[short[0]])} samples for"
                f" {each} shots; ask for fewer shots"
            )
        names = sorted(classes)
        return [classes[name][i] for i in range(each) for name in names]


def translations(
    asked: Sequence[FewShotSample], pool: Sequence[FewShotSample]
) -> dict[str, frozenset[int]]:
    """What of a set in one language may be a translation of questions of the set in another.

    Sets in several languages have their samples at the same places, or in the same lines of their
    files where rows without a translation are left out.

    Args:
        asked: the questions, from the first of their set on.
        pool: the whole set in the other language.

    Returns:
        For the identity of each question the numbers in the pool.
    """
    by_line: dict[str, list[int]] = {}
    for number, each in enumerate(pool):
        by_line.setdefault(_line(each), []).append(number)
    return {
        sample.identity: frozenset([place, *by_line.get(_line(sample), ())])
        for place, sample in enumerate(asked)
    }


def _line(sample: FewShotSample) -> str:
    return sample.where.rpartition(":")[2]


def classes_of(pool: Sequence[FewShotSample], task: str) -> tuple[str, ...]:
    """The class of each sample, of which `--uniform-sampling` takes equally many.

    It is the right answer where all samples have the same candidates, and its place among them
    where each has candidates of its own, as the alternatives of COPA.

    Args:
        pool: the samples.
        task: what they are called in messages.

    Raises:
        ConfigError: samples without one right answer, or with now more, now fewer candidates of
            their own; or all are of one class.
    """
    no_classes = ConfigError(
        f"--uniform-sampling: samples of {task} do not have one class each; leave it out"
    )
    if any(len(each.correct) != 1 or not each.candidates for each in pool):
        raise no_classes
    if len({frozenset(each.candidates) for each in pool}) == 1:
        found = tuple(each.correct[0] for each in pool)
    elif len({len(each.candidates) for each in pool}) == 1:
        found = tuple(f"answer {each.candidates.index(each.correct[0]) + 1}" for each in pool)
    else:
        raise no_classes
    if len(set(found)) == 1:
        raise ConfigError(
            f"--uniform-sampling: all samples of {task} are of one class, {found[0]!r}; leave it"
            " out"
        )
    return found


def draw(
    pool: Sequence[FewShotSample],
    k: int,
    *,
    seed: int,
    trial: int,
    task: str,
    uniform: bool = False,
    leak: bool = False,
    keep_order: bool = False,
    translated: Mapping[str, frozenset[int]] | None = None,
) -> Shots:
    """The shots of a trial.

    Args:
        pool: the samples to draw from.
        k: how many; no more than there are.
        seed: `--seed`.
        trial: its number.
        task: the task's name.
        uniform: as many of each class, `--uniform-sampling`.
        leak: a sample may be its own shot, `--allow-test-shots`.
        keep_order: shots stand in the order of the file, `--no-shuffle-examples`.
        translated: see `translations`, where pool and questions are one set in two languages.

    Raises:
        ConfigError: `uniform` for samples without classes, or k is no multiple of their number.
    """
    classes = classes_of(pool, task) if uniform and k else None
    if classes is not None and k % len(set(classes)):
        raise ConfigError(
            f"--uniform-sampling: {k} shots are no multiple of the {len(set(classes))} classes of"
            f" {task}: {', '.join(sorted(set(classes)))}"
        )
    if k > len(pool):
        logger.warning("%s: %d shots asked for, %d samples to draw from", task, k, len(pool))
    return Shots(
        pool,
        tuple(order(len(pool), seed=seed, trial=trial, task=task)),
        k,
        leak,
        classes,
        keep_order,
        translated or {},
    )
