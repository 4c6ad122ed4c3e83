"""flite-interactive: translate lines from the terminal or a file, or continue them, in order."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.config.serial import to_plain
from fairseq_lite.data.text.recorded import adopt
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.generation.evaluate import Translated
from fairseq_lite.generation.lines import generate_for_lines
from fairseq_lite.generation.output import output_lines
from fairseq_lite.generation.session import Session, place, unchanging
from fairseq_lite.tasks.api import Task, build_task, resolve_max_positions
from fairseq_lite.training.checkpoint.inference import (
    Trained,
    load_for,
    with_its_files,
    with_segmentation,
)
from fairseq_lite.training.evaluation import as_trained
from fairseq_lite_cli.entry import run_command
from fairseq_lite_cli.generate import codecs, log_to_stderr, make_generator, make_texts

logger = logging.getLogger("fairseq_lite_cli.interactive")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, then sentences, until they end."""
    registries = load_builtins()
    run = parse("flite-interactive", sys.argv[1:] if argv is None else argv, registries)
    log_to_stderr(run.common)
    run = as_trained(adopt(run, registries), registries)
    size = check(run)
    start = time.perf_counter()
    logger.info("%s", json.dumps(to_plain(run), ensure_ascii=False))
    torch.manual_seed(run.common.seed)
    np.random.seed(run.common.seed)
    task = build_task(run)
    loaded = load_for(run, registries, task)
    run = with_segmentation_of_lines(run, loaded.trained)
    device = place(loaded.models, run.common, run.generation)
    known: dict[int, str] = {}
    first = 0
    generator, models = make_generator(run, task, loaded.models, registries)
    session = Session(
        generator,
        loaded.models,
        make_texts(run, task),
        run.generation,
        device=device,
        source_line=known.get,
    )
    limits = resolve_max_positions(
        task.max_positions(), *(model.max_positions() for model in loaded.models)
    )
    encode, _ = codecs(run, task)
    if size > 1:
        logger.info("Sentence buffer size: %d", size)
    logger.info("NOTE: hypothesis and token scores are output in base 2")
    logger.info("Type the input sentence and press return:")
    with unchanging(models):
        for lines in buffers(read(run.interactive.input), size):
            encoded = [encode(line) for line in lines]
            known.clear()
            known.update(enumerate(encoded, start=first))
            for one, seconds in translate(run, task, session, encoded, first, limits):
                show(one, seconds)
            first += len(lines)
    logger.info(
        "Total time: %.3f seconds; translation time: %.3f",
        time.perf_counter() - start,
        session.seconds,
    )


def check(run: RunConfig) -> int:
    """How many sentences are read before they are translated.

    Raises:
        ConfigError: flags that do not go together.
    """
    size = max(run.interactive.buffer_size, 1)
    if run.dataset.batch_size is not None and run.dataset.batch_size > size:
        raise ConfigError(
            f"--batch-size {run.dataset.batch_size} cannot be larger than --buffer-size {size}"
        )
    if run.generation.score_reference or run.generation.prefix_size:
        raise ConfigError("--score-reference and --prefix-size need references: use flite-generate")
    return size


def with_segmentation_of_lines(run: RunConfig, trained: Trained) -> RunConfig:
    """The run with the segmentation of the model; with --remove-bpe, as typed.

    Who asks for pieces to be joined without saying by what has segmented the lines beforehand, as
    in fairseq's recipes.
    """
    if run.common_eval.post_process is None:
        return with_segmentation(run, trained)
    if trained.segmentation and not (run.bpe.name or run.tokenizer.name):
        logger.info(
            "--remove-bpe %s: lines are taken as segmented; for plain text leave it out",
            run.common_eval.post_process,
        )
    return with_its_files(run, trained)


def read(name: str) -> Iterator[str]:
    """The lines of a file, or of standard input.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        if name == "-":
            if sys.stdin is not None:  # None: it was closed, so there are no lines
                yield from (line.rstrip("\n") for line in sys.stdin)
            return
        with Path(name).open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)
    except OSError as e:
        raise DataError(f"--input {name}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise DataError(f"--input {name}: is not UTF-8 ({e.reason} at byte {e.start})") from None


def buffers(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lines in groups of `size`; the last may be smaller."""
    group: list[str] = []
    for line in lines:
        group.append(line)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def translate(
    run: RunConfig, task: Task, session: Session, lines: list[str], first: int, limits: Any
) -> list[tuple[Translated, float]]:
    """Translate one buffer; every line has its record, in order, with its share of the time."""
    cfg = run.dataset
    by_size = cfg.max_tokens is not None or cfg.batch_size is not None
    return generate_for_lines(
        session,
        task,
        lines,
        max_tokens=cfg.max_tokens,
        max_sentences=cfg.batch_size if by_size else 1,
        max_positions=limits,
        first=first,
    )


def show(one: Translated, seconds: float) -> None:
    """Print the lines of a sentence and flush, so that a program at the other end can go on."""
    if one.source is not None:
        print(f"S-{one.id}\t{one.source}")
    print(f"W-{one.id}\t{seconds:.3f}\tseconds")
    for output in one.outputs:
        for line in output_lines(one.id, output):
            print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_command("flite-interactive", main))
