r"""Pieces of a tokenizer as symbols of a `dict.txt`: any string without whitespace, and back.

A symbol is the piece itself, but for what a line of symbols separated by spaces could not hold:

- whitespace of any kind inside a piece is written `\uXXXX`, four hexadecimal digits;
- the empty piece is `\u{}`;
- a piece called like one of our four special symbols has its first character written so:
  `\u003c/s>` is the tokenizer's own `</s>`, `</s>` always ours;
- a number without a piece, or with the piece of an earlier number, has its number: `\u{258}`,
  `▁a\u{258}`;
- a backslash that would begin such a sequence by itself is `\u005c`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

UNKNOWN = "<unk>"
SPECIAL = frozenset({"<s>", "<pad>", "</s>", UNKNOWN})

_SEQUENCE = re.compile(r"\\u(?:([0-9a-f]{4})|\{\d*\})")
_ODD = re.compile(r"\s|\\(?=u(?:[0-9a-f]{4}|\{\d*\}))")


def _code(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"


def escape(piece: str) -> str:
    """The symbol of a piece."""
    if not piece:
        return r"\u{}"
    symbol = _ODD.sub(_code, piece)
    return f"\\u{ord(symbol[0]):04x}{symbol[1:]}" if symbol in SPECIAL else symbol


def unescape(symbol: str) -> str:
    """The piece of a symbol; a symbol of ours stands for itself."""
    if "\\u" not in symbol:
        return symbol
    return _SEQUENCE.sub(lambda found: chr(int(found[1], 16)) if found[1] else "", symbol)


def symbols(pieces: Sequence[str | None]) -> list[str]:
    """A symbol of its own for every number of a vocabulary; None marks a number without a piece."""
    made: list[str] = []
    seen: set[str] = set()
    for number, piece in enumerate(pieces):
        symbol = "" if piece is None else escape(piece)
        if piece is None or symbol in seen:
            symbol += f"\\u{{{number}}}"
        made.append(symbol)
        seen.add(symbol)
    return made
