"""From scores of pieces to scores of words: `--output-word-probs`, `--output-word-stats`.

A word's log-probability is the sum over its pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.postprocess import post_process
from fairseq_lite.data.text.api import Subword
from fairseq_lite.data.text.bpe import FastBpe, SubwordNmt
from fairseq_lite.errors import ConfigError

Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

_SUFFIX_MARKS = {"@@ ": "@@", "@@": "@@", "subword_nmt": "@@"}
_PREFIX_MARKS = {"sentencepiece": "\u2581", "wordpiece": "_"}


@dataclass(frozen=True)
class Joining:
    """Which pieces belong to one word.

    Attributes:
        goes_on: for each symbol of a dictionary, whether the word goes on behind it.
        begins: for each symbol, whether it begins a word.
        special: how many symbols, the first ones, are no pieces: each is a word of its own.
        spell: the word that pieces make.
    """

    goes_on: Flags
    begins: Flags
    special: int
    spell: Callable[[Sequence[str]], str]

    def to_next(self, tokens: Ids) -> Flags:
        """Which tokens belong to the same word as the token behind them; the last does not."""
        out = np.zeros(len(tokens), dtype=bool)
        first, second = tokens[:-1], tokens[1:]
        out[:-1] = self.goes_on[first] | ~self.begins[second]
        # Not every segmentation marks the first word of a line, which comes behind an end symbol.
        out[:-1] &= (first >= self.special) & (second >= self.special)
        return out


def joining(dictionary: Dictionary, name: str) -> Joining:
    """How `--post-process` joins pieces.

    Raises:
        ConfigError: what marks words is not at the beginning or the end of a piece.
    """
    if name in _SUFFIX_MARKS:
        return _by_ends(dictionary, _SUFFIX_MARKS[name])
    if name in _PREFIX_MARKS:
        mark = _PREFIX_MARKS[name]
        return _by_beginnings(
            dictionary,
            lambda piece: piece.startswith(mark),
            lambda pieces: post_process(" ".join(pieces), name),
        )
    raise ConfigError(
        f"--post-process {name}: flite-eval-lm joins the pieces of subword_nmt ('@@ '),"
        " sentencepiece and wordpiece"
    )


def joining_of(dictionary: Dictionary, subword: Subword) -> Joining | None:
    """How the pieces of a `--bpe` make words; None where single pieces do not tell."""
    if isinstance(subword, SubwordNmt):
        return _by_ends(dictionary, subword.cfg.bpe_separator)
    if isinstance(subword, FastBpe):
        return _by_ends(dictionary, "@@")
    try:
        return _by_beginnings(
            dictionary,
            subword.is_beginning_of_word,
            functools.lru_cache(1 << 16)(lambda pieces: subword.decode(" ".join(pieces)).strip()),
        )
    except ConfigError:
        return None


def _by_ends(dictionary: Dictionary, mark: str) -> Joining:
    found = np.array([symbol.endswith(mark) for symbol in dictionary.symbols])

    def spell(pieces: Sequence[str]) -> str:
        return "".join([*(piece.removesuffix(mark) for piece in pieces[:-1]), pieces[-1]])

    return Joining(found, np.ones_like(found), dictionary.nspecial, spell)


def _by_beginnings(
    dictionary: Dictionary, begins: Callable[[str], bool], spell: Callable[[Sequence[str]], str]
) -> Joining:
    found = np.array([begins(symbol) for symbol in dictionary.symbols])
    return Joining(np.zeros_like(found), found, dictionary.nspecial, spell)


class Word(NamedTuple):
    """A word of a sequence.

    Attributes:
        text: how it is written.
        log_prob: its log-probability, natural.
        in_pieces: whether it has several.
    """

    text: str
    log_prob: float
    in_pieces: bool


def words_of(
    tokens: Ids, scores: Scores, dictionary: Dictionary, join: Joining | None
) -> list[Word]:
    """The words of a sequence.

    Args:
        tokens: (T,).
        scores: (T,), log-probabilities.
        dictionary: of the tokens.
        join: None: every token is a word.
    """
    symbols = [dictionary[i] for i in tokens.tolist()]
    if join is None:
        return [Word(s, score, False) for s, score in zip(symbols, scores.tolist(), strict=True)]
    ends = np.flatnonzero(~join.to_next(tokens)) + 1
    words, start = [], 0
    for end in ends.tolist():
        special = tokens[start] < join.special
        text = symbols[start] if special else join.spell(tuple(symbols[start:end]))
        words.append(Word(text, float(scores[start:end].sum()), end - start > 1))
        start = end
    return words


def word_line(number: int, words: Sequence[Word]) -> str:
    """A line of `--output-word-probs`."""
    return f"{number} " + "\t".join(f"{word.text} [{word.log_prob:2f}]" for word in words)


@dataclass
class WordStat:
    """What `--output-word-stats` says of a word.

    Attributes:
        word: the word.
        is_bpe: whether it was in pieces when it was first seen.
        count: how often it was seen.
        log_prob: the sum of its log-probabilities.
        next_word_prob: the sum of those of the words behind it.
        missing_next_words: how often no word was behind it.
    """

    word: str
    is_bpe: bool
    count: int = 0
    log_prob: float = 0.0
    next_word_prob: float = 0.0
    missing_next_words: int = 0

    def __str__(self) -> str:
        fields = (self.word, self.count, self.log_prob, self.is_bpe, self.next_word_prob)
        return "\t".join(map(str, (*fields, self.count - self.missing_next_words)))


@dataclass
class WordStats:
    """The words of everything that was scored."""

    found: dict[str, WordStat] = field(default_factory=dict)

    def add(self, words: Sequence[Word]) -> None:
        """Take in the words of a sequence."""
        for i, word in enumerate(words):
            stat = self.found.setdefault(word.text, WordStat(word.text, word.in_pieces))
            stat.count += 1
            stat.log_prob += word.log_prob
            if i + 1 < len(words):
                stat.next_word_prob += words[i + 1].log_prob
            else:
                stat.missing_next_words += 1

    def lines(self) -> Iterator[str]:
        """Most frequent first: word, count, log-probabilities, in pieces, next words', count."""
        for stat in sorted(self.found.values(), key=lambda s: s.count, reverse=True):
            yield str(stat)
