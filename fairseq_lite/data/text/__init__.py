"""Tokenizers and subwords."""
