"""Tokenizers: words and punctuation apart, and together again."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fairseq_lite.config.flags import flag
from fairseq_lite.data.text.api import TOKENIZERS, Tokenizer
from fairseq_lite.errors import MissingDependency


@dataclass(frozen=True)
class MosesConfig:
    """Flags of the Moses tokenizer."""

    moses_no_dash_splits: bool = flag(False, "leave words with dashes in one piece")
    moses_no_escape: bool = flag(False, "leave & | < > ' \" [ ] as they are")


@TOKENIZERS.register("moses", config=MosesConfig)
class Moses(Tokenizer):
    """The Moses tokenizer, as sacremoses has it."""

    cfg: MosesConfig

    def __init__(self, cfg: MosesConfig, source_lang: str = "en", target_lang: str = "en") -> None:
        super().__init__(cfg, source_lang, target_lang)
        # Its import takes longer than all others of a command that never tokenises.
        from sacremoses import MosesDetokenizer, MosesTokenizer

        self._tokenizer = MosesTokenizer(lang=source_lang)
        self._detokenizer = MosesDetokenizer(lang=target_lang)

    def encode(self, text: str) -> str:
        """Separate words and punctuation."""
        tokens: str = self._tokenizer.tokenize(
            text,
            aggressive_dash_splits=not self.cfg.moses_no_dash_splits,
            return_str=True,
            escape=not self.cfg.moses_no_escape,
        )
        return tokens

    def decode(self, text: str) -> str:
        """Put words and punctuation together."""
        line: str = self._detokenizer.detokenize(text.split())
        return line


@TOKENIZERS.register("space")
class Space(Tokenizer):
    """Words as the text has them, separated by single spaces."""

    def encode(self, text: str) -> str:
        """Make every run of whitespace one space."""
        return re.sub(r"\s+", " ", text).strip()

    def decode(self, text: str) -> str:
        """The text as it is."""
        return text


@TOKENIZERS.register("nltk")
class Nltk(Tokenizer):
    """NLTK's `word_tokenize`, which has no inverse."""

    def encode(self, text: str) -> str:
        """Separate words and punctuation.

        Raises:
            MissingDependency: nltk, or its "punkt_tab" data, is not installed.
        """
        try:
            from nltk.tokenize import word_tokenize
        except ImportError:
            raise MissingDependency("--tokenizer nltk needs nltk: pip install nltk") from None
        try:
            return " ".join(word_tokenize(text))
        except LookupError:
            raise MissingDependency(
                "--tokenizer nltk needs its data: python -m nltk.downloader punkt_tab"
            ) from None

    def decode(self, text: str) -> str:
        """The text as it is."""
        return text
