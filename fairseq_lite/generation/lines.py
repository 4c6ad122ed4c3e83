"""Lines of text through a session, in input order: for the terminal and for Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.evaluate import Translated
from fairseq_lite.generation.session import Session
from fairseq_lite.tasks.api import Task


def generate_for_lines(
    session: Session,
    task: Task,
    lines: Sequence[str],
    *,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    max_positions: Any = None,
    first: int = 0,
) -> list[tuple[Translated, float]]:
    """Translate segmented lines, or continue them: every line has its record, in order.

    Args:
        session: the generator with its models and texts.
        task: what the models were built for.
        lines: symbols of the source dictionary, separated by spaces.
        max_tokens: tokens in a batch, padding included.
        max_sentences: lines in a batch.
        max_positions: the longest source; longer lines get an empty output of score -inf.
        first: the number of the first line.

    Returns:
        For each line its record and its share of its batch's seconds.

    Raises:
        ConfigError: the task does not read lines.
    """
    source = task.source_dictionary
    if source is None:
        raise ConfigError(f"--task {task.run.task.name}: this task has no source dictionary")
    dataset = task.build_dataset_for_inference([source.encode_line(line) for line in lines])
    return generate_in_order(
        session,
        dataset,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        max_positions=max_positions,
        first=first,
    )


def generate_in_order(
    session: Session,
    dataset: Any,
    *,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    max_positions: Any = None,
    first: int = 0,
) -> list[tuple[Translated, float]]:
    """As `generate_for_lines`, of everything in a dataset."""
    batches = dataset.batches(
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        max_positions=max_positions,
        skip_invalid=True,
        name="input",
    )
    found: dict[int, tuple[Translated, float]] = {}
    for batch in batches:
        found.update(_run(session.translate, dataset, batch, first))
    for index in range(len(dataset)):
        if first + index not in found:
            found.update(_run(session.untranslated, dataset, [index], first))
    return [found[first + index] for index in range(len(dataset))]


def _run(
    function: Callable[[Any], list[Translated]], dataset: Any, batch: Any, first: int
) -> dict[int, tuple[Translated, float]]:
    sample = dataset.collate(batch)
    # Numbers run on from buffer to buffer.
    sample["id"] = sample["id"] + first
    start = time.perf_counter()
    results = function(sample)
    seconds = (time.perf_counter() - start) / max(len(results), 1)
    return {one.id: (one, seconds) for one in results}
