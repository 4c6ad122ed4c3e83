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
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_lite.config.core import PreprocessConfig
from fairseq_lite.data.binarize import (
    Summary,
    count_lines,
    encode_alignments,
    open_text,
    parse_alignment,
)
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedWriter, best_dtype
from fairseq_lite.data.text import recorded
from fairseq_lite.data.text.segment import Segmentation, Segmenter
from fairseq_lite.data.texts import ProgressBar, Texts, size_of
from fairseq_lite.data.workers import Workers, count_job, encode_job
from fairseq_lite.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def run(
    cfg: PreprocessConfig,
    settings: Mapping[str, Any] | None = None,
    segmentation: Segmentation | None = None,
) -> None:
    """Make the data folder that `cfg` describes.

    Args:
        cfg: what to read and write.
        settings: what the log begins with; the fields of `cfg` when None.
        segmentation: how plain text becomes pieces; None takes the text's words.

    Raises:
        DataError: a text is missing, not UTF-8 or has another number of lines than its other side;
            a dictionary is there already; or the folder cannot be written.
        ConfigError: flags that contradict each other, or a tokenizer that cannot be used.
    """
    segmenter = Segmenter(segmentation) if segmentation else None
    job = _Preprocessing(cfg, vars(cfg) if settings is None else settings, segmenter)
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
                if path.is_dir():  # a folder takes the place of an empty one only
                    shutil.rmtree(destination / path.name, ignore_errors=True)
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

    def __init__(
        self, cfg: PreprocessConfig, settings: Mapping[str, Any], segmenter: Segmenter | None
    ) -> None:
        if cfg.dataset_impl not in ("mmap", "raw"):
            raise ConfigError(
                f"--dataset-impl {cfg.dataset_impl}: expected mmap or raw; "
                "other formats can be read but are no longer written"
            )
        self.cfg = cfg
        if cfg.dict_from_tokenizer and (segmenter is None or segmenter.subword is None):
            raise ConfigError(
                "--dict-from-tokenizer needs the tokenizer: --bpe hf_tokenizer --hf-tokenizer PATH"
            )
        self.settings = settings
        self.segmenter = segmenter
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
        with Texts(staging / "text", self.cfg.workers, self.segmenter) as self.texts:
            self.texts.prepare(self._texts_wanted())
            self._make(self._dictionaries())
        if self.segmenter is not None:
            recorded.write(staging, self.segmenter.segmentation)

    def _make(self, dictionaries: Sequence[Dictionary]) -> None:
        for lang, dictionary in zip(self.langs, dictionaries, strict=True):
            dictionary.save(self.staging / self._dict_name(lang))
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
        for lang in self.langs:
            made = Path(cfg.destdir, self._dict_name(lang))
            if not self._given(lang) and made.exists():
                raise DataError(
                    f"{made} exists: use it with --srcdict or --tgtdict, remove it, "
                    "or choose another --destdir"
                )
        self._check_segmentation()
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

    def _check_segmentation(self) -> None:
        """Everything in a folder is segmented alike, as its record says."""
        found = recorded.read(self.cfg.destdir)
        now = self.segmenter.segmentation if self.segmenter is not None else Segmentation()
        if found is not None and not recorded.same(found, now):
            raise DataError(
                f"{Path(self.cfg.destdir, recorded.FILE)}: this folder is segmented by {found}, "
                f"not by {now or 'nothing'}: choose another --destdir, or remove what is in it"
            )
        if self.segmenter is not None:
            self.segmenter.check(self.langs)
            if self.segmenter.drops_text():
                logger.warning(
                    "%s leaves out what it does not know, without a trace: it has neither an "
                    "unknown symbol nor bytes to fall back on",
                    now,
                )

    def _texts_wanted(self) -> Iterator[tuple[str, str | None]]:
        """Every text that is read, and its language."""
        cfg = self.cfg
        for lang in self.langs:
            if not cfg.dict_only:
                for _, prefix in self.splits:
                    yield self._text(prefix, lang), lang
            elif cfg.trainpref and not (cfg.dict_from_tokenizer or self._given(lang)):
                yield self._text(cfg.trainpref, lang), lang

    def _given(self, lang: str | None) -> str | None:
        """The dictionary that was given for a language."""
        cfg = self.cfg
        if cfg.joined_dictionary:
            return cfg.srcdict or cfg.tgtdict
        return cfg.srcdict if lang == cfg.source_lang else cfg.tgtdict

    # -- dictionaries ------------------------------------------------------------------------------

    def _dictionaries(self) -> list[Dictionary]:
        cfg = self.cfg
        if cfg.dict_from_tokenizer:
            return [self._whole_vocabulary()] * len(self.langs)
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

    def _whole_vocabulary(self) -> Dictionary:
        """The tokenizer's vocabulary: number n there is number n + 4 here, after our specials."""
        assert self.segmenter is not None and self.segmenter.subword is not None
        dictionary = Dictionary()
        for number, symbol in enumerate(self.segmenter.subword.vocabulary()):
            if dictionary.add_symbol(symbol, n=0) != number + dictionary.nspecial:
                raise DataError(f"--dict-from-tokenizer: {symbol!r} stands twice in the vocabulary")
        dictionary.pad_to_multiple_(self.cfg.padding_factor)
        return dictionary

    def _build(self, langs: Sequence[str | None], threshold: int, nwords: int) -> Dictionary:
        if not self.cfg.trainpref:
            raise ConfigError(
                "--trainpref is needed to make a dictionary; or give --srcdict and --tgtdict"
            )
        dictionary = Dictionary()
        for lang in langs:
            path = self._text(self.cfg.trainpref, lang)
            parts = self.texts.parts(path, lang)
            with ProgressBar(f"{path}: words", size_of(parts)) as progress:
                counts: Counter[str] = Counter()
                for found in self.workers.run([count_job(s) for s in parts], progress):
                    counts.update(found)
            dictionary.add_counts(counts)
        dictionary.finalize(threshold, nwords, self.cfg.padding_factor)
        return dictionary

    # -- splits ------------------------------------------------------------------------------------

    def _make_split(
        self, split: str, prefix: str, lang: str | None, dictionary: Dictionary
    ) -> None:
        path = self._text(prefix, lang)
        output = self.staging / self._output(split, lang)
        if self.cfg.dataset_impl == "raw":
            self.texts.copy(path, lang, output)
            return
        self._log(f"[{lang}] Dictionary: {len(dictionary)} types")
        summary = self._binarize(path, lang, dictionary, str(output))
        # An unknown word in segmented text is text, as in fairseq; what a tokenizer of ours does
        # not know it has replaced already, and nobody has been told yet.
        replaced = summary.replaced if self.segmenter is None else summary.unknown
        share = 100 * replaced / max(summary.tokens, 1)
        self._log(
            f"[{lang}] {path}: {summary.sentences} sents, {summary.tokens} tokens, "
            f"{share:.3}% replaced (by {dictionary.unk_word})"
        )

    def _binarize(
        self, path: str, lang: str | None, dictionary: Dictionary, output: str
    ) -> Summary:
        parts = self.texts.parts(path, lang)
        encoder = (dictionary.indices, dictionary.eos(), dictionary.unk())
        prefixes = [output] if len(parts) == 1 else [f"{output}.pt{i}" for i in range(len(parts))]
        jobs = [encode_job(s, encoder, p) for s, p in zip(parts, prefixes, strict=True)]
        with ProgressBar(path, size_of(parts)) as progress:
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
        sides = [self.texts.lines(self._text(cfg.trainpref, lang), lang) for lang in self.langs]
        source, target = dictionaries
        frequencies: dict[int, Counter[int]] = {}
        open_text(alignfile).close()
        with open(alignfile, encoding="utf-8") as alignments:
            for number, rows in enumerate(itertools.zip_longest(alignments, *sides), start=1):
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
