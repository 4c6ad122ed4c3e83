"""From subword pieces back to words: the values of `--post-process` and `--remove-bpe`."""

from __future__ import annotations

import re

from fairseq_lite.errors import ConfigError

# name -> the mark that stands for a word boundary when pieces are written apart
_BOUNDARY_MARKS = {"sentencepiece": "\u2581", "wordpiece": "_", "letter": "|", "_EOW": "_EOW"}
NAMES = ("subword_nmt", "@@ ", *_BOUNDARY_MARKS, "silence", "none")


def post_process(text: str, symbol: str | None) -> str:
    """Join the pieces of a line into words.

    Args:
        text: pieces separated by single spaces.
        symbol: one of `NAMES`, the two characters `@@`, or None to leave the text as it is.

    Raises:
        ConfigError: an unknown symbol.
    """
    if symbol is None or symbol == "none":
        return text
    if symbol in _BOUNDARY_MARKS:
        return text.replace(" ", "").replace(_BOUNDARY_MARKS[symbol], " ").strip()
    if symbol == "silence":
        return re.sub(" +", " ", text.replace("<SIL>", "")).strip()
    if symbol in ("subword_nmt", "@@ ", "@@"):
        mark = "@@ " if symbol == "subword_nmt" else symbol
        # The added space lets a mark at the very end of the line go as well.
        return (text + " ").replace(mark, "").rstrip()
    raise ConfigError(f"--post-process {symbol}: expected one of {', '.join(NAMES)}")
