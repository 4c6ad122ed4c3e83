"""The texts of a flite-preprocess run, in parts for its workers: as they are, or segmented first.

A text is segmented once, into files beside the result, and then counted and binarised like any
other: what a tokenizer costs is paid once, and memory holds a block at a time.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fairseq_lite.data.binarize import Span, open_text, spans
from fairseq_lite.data.text.segment import Segmenter
from fairseq_lite.data.workers import Workers

logger = logging.getLogger(__name__)

# Bytes for one process at least: starting it has to pay.
_MIN_SPAN = 1 << 20
_MIN_SEGMENTED = 1 << 17
_PROGRESS_SECONDS = 10.0


class Texts:
    """The texts of a run; used in a `with`, at the end of which segmented ones are removed.

    Args:
        folder: where segmented text goes.
        workers: processes.
        segmenter: None leaves the texts as they are.
    """

    def __init__(self, folder: Path, workers: int, segmenter: Segmenter | None) -> None:
        self._folder, self._workers, self._segmenter = folder, workers, segmenter
        self._segmented: dict[tuple[str, str | None], list[Span]] = {}

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def prepare(self, wanted: Iterable[tuple[str, str | None]]) -> None:
        """Segment texts, given as path and language; one wanted twice is segmented once.

        Raises:
            DataError: a text is missing or not UTF-8, or a line cannot be segmented.
        """
        if self._segmenter is None:
            return
        self._folder.mkdir()
        with self._segmenter.workers(self._workers) as workers:
            for path, lang in dict.fromkeys(wanted):
                self._segmented[path, lang] = self._segment(path, lang, self._segmenter, workers)

    def _segment(
        self, path: str, lang: str | None, segmenter: Segmenter, workers: Workers
    ) -> list[Span]:
        began = time.monotonic()
        parts = self._cut(path, _MIN_SEGMENTED)
        names = [str(self._folder / f"{len(self._segmented)}.{n}") for n in range(len(parts))]
        jobs = [segmenter.job(s, lang, name) for s, name in zip(parts, names, strict=True)]
        with ProgressBar(f"{path}: pieces", size_of(parts)) as progress:
            lines = sum(workers.run(jobs, progress))
        seconds = max(time.monotonic() - began, 1e-9)
        logger.info(
            "[%s] %s: %d lines segmented by %s in %.1fs (%d lines/s)",
            *(lang, path, lines, segmenter.segmentation, seconds, lines / seconds),
        )
        return [Span(name, 0, os.path.getsize(name)) for name in names]

    def parts(self, path: str, lang: str | None) -> list[Span]:
        """A text in parts, one for a worker."""
        if self._segmenter is not None:
            return self._segmented[path, lang]
        return self._cut(path, _MIN_SPAN)

    def _cut(self, path: str, shortest: int) -> list[Span]:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        return spans(path, max(1, min(self._workers, size // shortest)))

    def _paths(self, path: str, lang: str | None) -> Iterator[str]:
        return iter(dict.fromkeys(part.path for part in self.parts(path, lang)))

    def lines(self, path: str, lang: str | None) -> Iterator[str]:
        """The lines of a text."""
        for each in self._paths(path, lang):
            open_text(each).close()
            with open(each, encoding="utf-8") as file:
                yield from file

    def copy(self, path: str, lang: str | None, to: Path) -> None:
        """Write a text to another file."""
        with to.open("wb") as out:
            for each in self._paths(path, lang):
                with open_text(each) as file:
                    shutil.copyfileobj(file, out)


def size_of(parts: Sequence[Span]) -> int:
    """Bytes of all parts."""
    return sum(part.end - part.start for part in parts)


class ProgressBar:
    """Shows how far a file is: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._done = 0
        self._began = self._told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total, desc=self._name, unit="B", unit_scale=True, leave=False
            )
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int) -> None:
        self._done += done
        if self._bar is not None:
            self._bar.update(done)
            return
        now = time.monotonic()
        if now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            speed = self._done / (now - self._began) / 1e6
            share = 100 * self._done / max(self._total, 1)
            logger.info("%s: %.0f%% (%.1f MB/s)", self._name, share, speed)
