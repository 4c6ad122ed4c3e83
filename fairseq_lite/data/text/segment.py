"""Text files to files of segmented text: what `--bpe` and `--tokenizer` do in flite-preprocess.

Each worker is a process of its own with its own tokenizer. The pieces of a line depend on that line
alone, so the text is the same for any number of workers. This module, run, is such a worker.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fairseq_lite.data.text  # noqa: F401  registers the entries
from fairseq_lite.config.core import Choice
from fairseq_lite.config.serial import choice_from_plain, choice_to_plain
from fairseq_lite.data.binarize import Progress, Span, chunks, count_lines, lines_of
from fairseq_lite.data.text.api import (
    BPE,
    TOKENIZERS,
    Subword,
    TextCodec,
    Tokenizer,
    build_bpe,
    build_tokenizer,
)
from fairseq_lite.data.text.bpe import SentencepieceConfig
from fairseq_lite.data.workers import Workers, main
from fairseq_lite.errors import ConfigError, DataError, FliteError
from fairseq_lite.plugins import import_user_dir

_MODULE = "fairseq_lite.data.text.segment"


@dataclass(frozen=True)
class Segmentation:
    """How raw text becomes words or pieces; where nothing is chosen, it stays as it is.

    Attributes:
        tokenizer: the entry of --tokenizer.
        bpe: the entry of --bpe.
        user_dir: the plugin to import for them.
    """

    tokenizer: Choice = Choice()
    bpe: Choice = Choice()
    user_dir: str | None = None

    def __bool__(self) -> bool:
        return self.tokenizer.name is not None or self.bpe.name is not None

    def __str__(self) -> str:
        chosen = (("--tokenizer", self.tokenizer), ("--bpe", self.bpe))
        return " ".join(f"{flag} {choice.name}" for flag, choice in chosen if choice.name)

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for a worker."""
        return {
            "user_dir": self.user_dir,
            "tokenizer": choice_to_plain(self.tokenizer),
            "bpe": choice_to_plain(self.bpe),
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Segmentation:
        """The segmentation whose `to_plain` is `values`; its plugin is imported."""
        if values["user_dir"]:
            import_user_dir(values["user_dir"])
        return cls(
            choice_from_plain(TOKENIZERS, values["tokenizer"]),
            choice_from_plain(BPE, values["bpe"]),
            values["user_dir"],
        )


class Segmenter:
    """A segmentation at work: its models are read once.

    Args:
        segmentation: what to do.
    """

    def __init__(self, segmentation: Segmentation) -> None:
        self.segmentation = segmentation
        self._tokenizers: dict[str | None, Tokenizer | None] = {}

    @functools.cached_property
    def subword(self) -> Subword | None:
        """The entry of --bpe."""
        return build_bpe(self.segmentation.bpe)

    def codecs(self, lang: str | None) -> list[TextCodec]:
        """What a line of a language goes through, in this order."""
        if lang not in self._tokenizers:
            self._tokenizers[lang] = build_tokenizer(self.segmentation.tokenizer, lang, lang)
        both = (self._tokenizers[lang], self.subword)
        return [codec for codec in both if codec is not None]

    def check(self, langs: Sequence[str | None]) -> None:
        """Read what it needs, before any work.

        Raises:
            FliteError: it cannot be used.
        """
        cfg = self.segmentation.bpe.config
        if isinstance(cfg, SentencepieceConfig) and cfg.sentencepiece_enable_sampling:
            raise ConfigError(
                "--sentencepiece-enable-sampling: the data would hold one draw and the dictionary "
                "another; leave it out"
            )
        for lang in langs:
            segment([""], self.codecs(lang))

    def drops_text(self) -> bool:
        """Whether text that is not known leaves no piece at all, as far as can be told."""
        return self.subword is not None and self.subword.drops_text()

    def workers(self, count: int) -> Workers:
        """Processes that do the jobs of `job`."""
        return Workers(count, {"segment": self.perform}, _MODULE)

    def job(self, span: Span, lang: str | None, out: str) -> dict[str, Any]:
        """The job of writing the text of a span segmented; its result is the number of lines."""
        return {
            "job": "segment",
            "segmentation": self.segmentation.to_plain(),
            "span": [span.path, span.start, span.end],
            "lang": lang,
            "out": out,
        }

    def perform(self, job: dict[str, Any], progress: Progress) -> int:
        """Do a job of this segmentation in this process."""
        return segment_span(Span(*job["span"]), self.codecs(job["lang"]), job["out"], progress)


def segment(lines: Sequence[str], codecs: Sequence[TextCodec]) -> list[str]:
    """Lines of raw text as lines of words or pieces."""
    found = list(lines)
    for codec in codecs:
        found = codec.encode_lines(found)
    return found


def segment_span(span: Span, codecs: Sequence[TextCodec], out: str, progress: Progress) -> int:
    """Write the text of a span segmented; returns the number of lines.

    Raises:
        DataError: a line that is not UTF-8 or that a tokenizer fails on; the message names it.
    """
    count = 0
    with open(out, "wb") as file:
        for data, begin in chunks(span, progress):
            lines = lines_of(data)
            try:
                found = segment(lines, codecs)
            except (FliteError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as e:  # a panic of a library is no Exception
                raise _culprit(span.path, begin, lines, codecs, e) from None
            file.write(_joined(found).encode("utf-8"))
            count += len(lines)
    return count


def _joined(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    if text.count("\n") != len(lines) - 1 or "\r" in text:
        # A line end inside a piece would make two lines of one.
        text = "\n".join(re.sub(r"[\r\n]+", " ", line) for line in lines)
    return text + "\n"


def _culprit(
    path: str, begin: int, lines: Sequence[str], codecs: Sequence[TextCodec], error: BaseException
) -> DataError:
    """The error of a block as the error of its first line that fails by itself."""
    before = count_lines(path, begin, partial=False)
    for number, line in enumerate(lines, start=before + 1):
        try:
            segment([line], codecs)
        except BaseException as e:
            why = " ".join(str(e).split())
            return DataError(f"{path}:{number}: cannot be segmented: {why}")
    why = " ".join(str(error).split())
    return DataError(f"{path}: lines from {before + 1} on cannot be segmented: {why}")


@functools.lru_cache(maxsize=1)
def _segmenter(plain: str) -> Segmenter:
    return Segmenter(Segmentation.from_plain(json.loads(plain)))


def _perform(job: dict[str, Any], progress: Progress) -> int:
    return _segmenter(json.dumps(job["segmentation"])).perform(job, progress)


if __name__ == "__main__":
    main({"segment": _perform})
