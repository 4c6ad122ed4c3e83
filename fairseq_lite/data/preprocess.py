"""`flite-preprocess`: from text files to a data folder, with fairseq's names, bytes and log lines.

Everything is written into a folder of its own beside the result and moved into place at the end, so
a run that fails, for whatever reason, leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fairseq_lite.config.core import PreprocessConfig
from fairseq_lite.data.binarize import (
    Summary,
    count_lines,
    encode_alignments,
    open_text,
    parse_alignment,
    spans,
)
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedWriter, best_dtype
from fairseq_lite.data.workers import Workers, count_job, encode_job
from fairseq_lite.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_MIN_SPAN = 1 << 20  # bytes; a process has to have something to do
_PROGRESS_SECONDS = 10.0


def run(cfg: PreprocessConfig, settings: Mapping[str, Any] | None = None) -> None:
    """Make the data folder that `cfg` describes.

    Args:
        cfg: what to read and write.
        settings: what the log begins with; the fields of `cfg` when None.

    Raises:
        DataError: a text is missing, not UTF-8 or has another number of lines than its other side;
            a dictionary is there already; or the folder cannot be written.
        ConfigError: flags that contradict each other.
    """
    job = _Preprocessing(cfg, vars(cfg) if settings is None else settings)
    destination = Path(cfg.destdir)
    with _writing(destination) as staging, Workers(cfg.workers) as workers:
        job.run(staging, workers)


@contextlib.contextmanager
def _writing(destination: Path) -> Iterator[Path]:
    """A folder whose content is moved into `destination` when all went well."""
    made = [p for p in (destination, *destination.parents) if not p.exists()]
    staging = None
    try:
        destination.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".preprocess-", dir=destination))
        yield staging
        for path in sorted(staging.iterdir()):
            if path.name == "preprocess.log":
                with (destination / path.name).open("a", encoding="utf-8") as log:
                    log.write(path.read_text(encoding="utf-8"))
            else:
                os.replace(path, destination / path.name)
        made = []
    except OSError as e:
        where = e.filename or destination
        raise DataError(f"cannot write {where}: {e.strerror}; nothing was left behind") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


class _Preprocessing:
    """One run: the files it reads, the files it writes."""

    def __init__(self, cfg: PreprocessConfig, settings: Mapping[str, Any]) -> None:
        if cfg.dataset_impl not in ("mmap", "raw"):
            raise ConfigError(
                f"--dataset-impl {cfg.dataset_impl}: expected mmap or raw; "
                "other formats can be read but are no longer written"
            )
        self.cfg = cfg
        self.settings = settings
        self.langs: list[str | None] = [cfg.source_lang]
        if not cfg.only_source:
            self.langs.append(cfg.target_lang)
        self.splits = [("train", cfg.trainpref)] if cfg.trainpref else []
        for split, prefixes in (("valid", cfg.validpref), ("test", cfg.testpref)):
            for number, prefix in enumerate(prefixes.split(",") if prefixes else []):
                self.splits.append((f"{split}{number or ''}", prefix))

    def run(self, staging: Path, workers: Workers) -> None:
        self.staging = staging
        self.workers = workers
        self._log(
            f"Namespace({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})", "debug"
        )
        self._check_inputs()
        dictionaries = self._dictionaries()
        for lang, dictionary in zip(self.langs, dictionaries, strict=True):
            dictionary.save(staging / self._dict_name(lang))
        if self.cfg.dict_only:
            return
        for lang, dictionary in zip(self.langs, dictionaries, strict=True):
            for split, prefix in self.splits:
                self._make_split(split, prefix, lang, dictionary)
        if self.cfg.align_suffix:
            self._make_alignments(self.cfg.align_suffix)
        self._log(f"Wrote preprocessed data to {self.cfg.destdir}")
        if self.cfg.alignfile:
            self._align(self.cfg.alignfile, dictionaries)

    def _log(self, line: str, level: str = "info") -> None:
        """A line for the user and, as fairseq has it, the same one in preprocess.log."""
        getattr(logger, level)(line)
        # A file name need not be valid UTF-8, and the log must not be what fails.
        log_file = self.staging / "preprocess.log"
        with log_file.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(line + "\n")

    # -- names -------------------------------------------------------------------------------------

    @staticmethod
    def _text(prefix: str, lang: str | None) -> str:
        return prefix if lang is None else f"{prefix}.{lang}"

    @staticmethod
    def _dict_name(lang: str | None) -> str:
        return "dict.txt" if lang is None else f"dict.{lang}.txt"

    def _output(self, split: str, lang: str | None) -> str:
        pair = f"{split}.{self.cfg.source_lang}-{self.cfg.target_lang}"
        if lang is not None:
            return f"{pair}.{lang}"
        return split if self.cfg.only_source else pair

    # -- checks before any work --------------------------------------------------------------------

    def _check_inputs(self) -> None:
        cfg = self.cfg
        given = {cfg.source_lang: cfg.srcdict, cfg.target_lang: cfg.tgtdict}
        for lang in self.langs:
            made = Path(cfg.destdir, self._dict_name(lang))
            either = cfg.joined_dictionary and (cfg.srcdict or cfg.tgtdict)
            if not given[lang] and not either and made.exists():
                raise DataError(
                    f"{made} exists: use it with --srcdict or --tgtdict, remove it, "
                    "or choose another --destdir"
                )
        if cfg.dict_only:
            return
        for _, prefix in self.splits:
            counted = []
            for lang in self.langs:
                path = self._text(prefix, lang)
                if len(self.langs) > 1:
                    counted.append((count_lines(path), path))
                else:
                    open_text(path).close()
            if counted and counted[0][0] != counted[1][0]:
                (fewer, short), (more, long) = sorted(counted)
                raise DataError(
                    f"{long} has {more:,} lines, {short} has {fewer:,}: line {fewer + 1} of {long} "
                    f"has no counterpart; both sides must have the same number of lines"
                )

    # -- dictionaries ------------------------------------------------------------------------------

    def _dictionaries(self) -> list[Dictionary]:
        cfg = self.cfg
        if cfg.joined_dictionary:
            given = cfg.srcdict or cfg.tgtdict
            limits = (cfg.thresholdsrc, cfg.nwordssrc)
            joined = Dictionary.load(given) if given else self._build(self.langs, *limits)
            return [joined] * len(self.langs)
        found = []
        for lang, given, threshold, nwords in (
            (cfg.source_lang, cfg.srcdict, cfg.thresholdsrc, cfg.nwordssrc),
            (cfg.target_lang, cfg.tgtdict, cfg.thresholdtgt, cfg.nwordstgt),
        )[: len(self.langs)]:
            found.append(
                Dictionary.load(given) if given else self._build([lang], threshold, nwords)
            )
        return found

    def _build(self, langs: Sequence[str | None], threshold: int, nwords: int) -> Dictionary:
        if not self.cfg.trainpref:
            raise ConfigError(
                "--trainpref is needed to make a dictionary; or give --srcdict and --tgtdict"
            )
        dictionary = Dictionary()
        for lang in langs:
            path = self._text(self.cfg.trainpref, lang)
            parts = self._spans(path)
            with _ProgressBar(f"{path}: words", parts[-1].end) as progress:
                counts: Counter[str] = Counter()
                for found in self.workers.run([count_job(s) for s in parts], progress):
                    counts.update(found)
            dictionary.add_counts(counts)
        dictionary.finalize(threshold, nwords, self.cfg.padding_factor)
        return dictionary

    # -- splits ------------------------------------------------------------------------------------

    def _spans(self, path: str) -> list[Any]:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        return spans(path, max(1, min(self.workers.count, size // _MIN_SPAN)))

    def _make_split(
        self, split: str, prefix: str, lang: str | None, dictionary: Dictionary
    ) -> None:
        path = self._text(prefix, lang)
        output = self.staging / self._output(split, lang)
        if self.cfg.dataset_impl == "raw":
            shutil.copyfile(path, output)
            return
        self._log(f"[{lang}] Dictionary: {len(dictionary)} types")
        summary = self._binarize(path, dictionary, str(output))
        share = 100 * summary.replaced / max(summary.tokens, 1)
        self._log(
            f"[{lang}] {path}: {summary.sentences} sents, {summary.tokens} tokens, "
            f"{share:.3}% replaced (by {dictionary.unk_word})"
        )

    def _binarize(self, path: str, dictionary: Dictionary, output: str) -> Summary:
        parts = self._spans(path)
        encoder = (dictionary.indices, dictionary.eos(), dictionary.unk())
        prefixes = [output] if len(parts) == 1 else [f"{output}.pt{i}" for i in range(len(parts))]
        jobs = [encode_job(s, encoder, p) for s, p in zip(parts, prefixes, strict=True)]
        with _ProgressBar(path, parts[-1].end) as progress:
            results = self.workers.run(jobs, progress)
        if len(parts) > 1:
            _merge(prefixes, output, len(dictionary))
        return sum(itertools.starmap(Summary, results), Summary())

    # -- alignments --------------------------------------------------------------------------------

    def _make_alignments(self, suffix: str) -> None:
        made = 0
        for split, prefix in self.splits:
            path = f"{prefix}.{suffix}"
            if not os.path.exists(path):
                logger.warning("%s does not exist: no alignments for %s", path, split)
                continue
            pair = f"{self.cfg.source_lang}-{self.cfg.target_lang}"
            count = encode_alignments(path, self.staging / f"{split}.align.{pair}")
            self._log(f"[alignments] {path}: parsed {count} alignments")
            made += 1
        if not made:
            raise DataError(f"--align-suffix {suffix}: no split has a file with this suffix")

    def _align(self, alignfile: str, dictionaries: Sequence[Dictionary]) -> None:
        """The most frequent translation of each source word, from the training text."""
        cfg = self.cfg
        if cfg.only_source or not cfg.trainpref:
            raise ConfigError("--alignfile needs --trainpref with a source and a target side")
        paths = [alignfile, *(self._text(cfg.trainpref, lang) for lang in self.langs)]
        source, target = dictionaries
        frequencies: dict[int, Counter[int]] = {}
        with contextlib.ExitStack() as stack:
            for path in paths:
                open_text(path).close()
            files = [stack.enter_context(open(path, encoding="utf-8")) for path in paths]
            for number, rows in enumerate(itertools.zip_longest(*files), start=1):
                where = f"{alignfile}:{number}"
                if None in rows:
                    raise DataError(f"{where}: the alignments and the texts differ in length")
                pairs = parse_alignment(rows[0], where)
                ids = (source.encode_line(rows[1]), target.encode_line(rows[2]))
                for s, t in zip(pairs[::2], pairs[1::2], strict=True):
                    if s >= len(ids[0]) or t >= len(ids[1]):
                        raise DataError(f"{where}: {s}-{t} is beyond the end of the sentence")
                    word, translation = int(ids[0][s]), int(ids[1][t])
                    if word != source.unk() and translation != target.unk():
                        frequencies.setdefault(word, Counter())[translation] += 1
        name = f"alignment.{cfg.source_lang}-{cfg.target_lang}.txt"
        with (self.staging / name).open("w", encoding="utf-8", newline="\n") as out:
            for word, found in frequencies.items():
                best = max(found, key=found.__getitem__)
                out.write(f"{source[word]} {target[best]}\n")


def _merge(prefixes: Sequence[str], output: str, vocabulary: int) -> None:
    writer = IndexedWriter(output, best_dtype(vocabulary))
    try:
        for prefix in prefixes:
            writer.append(prefix)
            for suffix in (".bin", ".idx"):
                os.remove(prefix + suffix)
        writer.finalize()
    finally:
        writer.close()


class _ProgressBar:
    """Shows how far a file is: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._done = 0
        self._began = self._told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _ProgressBar:
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
