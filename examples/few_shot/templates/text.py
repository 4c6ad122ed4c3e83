"""Small changes to sentences that templates make."""

from __future__ import annotations

# What ends a sentence, in the scripts that tasks have, and what may stand behind it.
_STOPS = ".。।۔"
_MARKS = _STOPS + "?!,;:…？！，、；：؟،؛·\"'“”„«»’‘-–—"


def without_stop(text: str) -> str:
    """A sentence without the full stop at its end."""
    text = text.strip()
    return text[:-1].rstrip() if text and text[-1] in _STOPS else text


def without_marks(text: str) -> str:
    """A sentence without any punctuation at its end."""
    return text.strip().rstrip(_MARKS + " ")


def ended(text: str) -> str:
    """A sentence with a full stop, where nothing else ends it."""
    text = text.strip()
    return text if not text or text[-1] in _MARKS else f"{text}."


def capitalised(text: str) -> str:
    """A sentence with its first letter large; the others stay."""
    return text[:1].upper() + text[1:]


def decapitalised(text: str, language: str | None = None) -> str:
    """A sentence with its first letter small, unless it begins with the English I.

    Args:
        text: the sentence.
        language: of it; Turkish has two letters I.
    """
    first = text.split(" ", 1)[0].rstrip(",")
    if language in (None, "en") and (first == "I" or first.startswith(("I'", "I’"))):
        return text
    if language == "tr" and text[:1] in ("I", "İ"):
        return ("ı" if text[0] == "I" else "i") + text[1:]
    return text[:1].lower() + text[1:]
