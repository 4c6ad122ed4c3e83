"""Tokenizers and subwords; importing the package registers all of them."""

from __future__ import annotations

from fairseq_lite.data.text import bpe, byte_level, hf, tokenizers

__all__ = ["bpe", "byte_level", "hf", "tokenizers"]
