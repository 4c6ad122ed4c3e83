"""Which source token each output token looked at, read from cross-attention after the search.

The hypotheses are run through the model once more, all positions at a time: the search itself then
never has to keep attention weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.errors import DataError
from fairseq_lite.generation.ensemble import teacher_forced
from fairseq_lite.generation.generator import Hypothesis
from fairseq_lite.models.api import Model

# What `--replace-unk` holds when it was typed without a file: copy the source word.
COPY_SOURCE = "@@"


@torch.inference_mode()
def add_attention(
    models: Sequence[Model],
    sample: Mapping[str, Any],
    results: Sequence[Sequence[Hypothesis]],
    *,
    nbest: int,
    pad: int,
    eos: int,
) -> None:
    """Give the first `nbest` hypotheses of each sentence their attention (T, S), heads averaged.

    Raises:
        ConfigError: the architecture cannot show its attention.
    """
    inputs = sample["net_input"]
    src_tokens, src_lengths = inputs["src_tokens"], inputs.get("src_lengths")
    for n in range(nbest):
        rows = [i for i, found in enumerate(results) if n < len(found)]
        if not rows:
            return
        chosen = [results[i][n] for i in rows]
        prev = _shifted([h.tokens for h in chosen], pad, eos).to(src_tokens.device)
        index = torch.tensor(rows, device=src_tokens.device)
        lengths = None if src_lengths is None else src_lengths[index]
        total: Tensor | None = None
        for model in models:
            _, attention = teacher_forced(model, src_tokens[index], lengths, prev, attention=True)
            assert attention is not None
            total = attention if total is None else total + attention
        assert total is not None
        mean = (total / len(models)).cpu()
        for row, hypothesis in zip(mean, chosen, strict=True):
            hypothesis.attention = row[: len(hypothesis.tokens)]


def _shifted(sequences: Sequence[Tensor], pad: int, eos: int) -> Tensor:
    """What the decoder reads: each sequence behind an end symbol, without its last token."""
    out = torch.full((len(sequences), max(map(len, sequences))), pad)
    for row, tokens in zip(out, sequences, strict=True):
        row[0] = eos
        row[1 : len(tokens)] = tokens[:-1]
    return out


def _positions(tokens: Tensor, left_out: set[int]) -> list[int]:
    return [i for i, token in enumerate(tokens.tolist()) if token not in left_out]


def hard(
    attention: Tensor, source: Tensor, tokens: Tensor, *, pad: int, eos: int
) -> list[tuple[int, int]]:
    """(source word, output word) for every output token; end symbols and padding do not count.

    Args:
        attention: (T, S).
        source: (S,), padded.
        tokens: (T,).
        pad: the padding symbol.
        eos: the end symbol.
    """
    columns, rows = _positions(source, {pad, eos}), _positions(tokens, {pad, eos})
    if not columns or not rows:
        return []
    best = attention[rows][:, columns].argmax(dim=1)
    return [(s, t) for t, s in enumerate(best.tolist())]


def soft(attention: Tensor, source: Tensor, tokens: Tensor, *, pad: int) -> list[list[float]]:
    """For every output token, the end symbol included, its attention on every source token."""
    columns, rows = _positions(source, {pad}), _positions(tokens, {pad})
    return attention[rows][:, columns].tolist() if columns and rows else []  # type: ignore[no-any-return]


def load_dictionary(value: str | None) -> dict[str, str] | None:
    """The replacements `--replace-unk` names: None without the flag, none without a file.

    Args:
        value: the path of a file with a source word and its translation a line.

    Raises:
        DataError: the file is missing, or a line is not two words.
    """
    if value is None:
        return None
    if value.strip() in ("", COPY_SOURCE):
        return {}
    replacements = {}
    try:
        lines = Path(value).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as e:
        raise DataError(f"--replace-unk {value}: cannot be read ({e.strerror})") from None
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) < 2:
            raise DataError(
                f"{value}, line {number}: expected a source word and its translation, found"
                f" {line!r}"
            )
        replacements[words[0]] = words[1]
    return replacements


def replace_unknown(
    words: list[str],
    unknown: str,
    source_words: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    replacements: Mapping[str, str],
) -> list[str]:
    """Put, for each unknown output word, the aligned source word or what the file gives for it.

    Args:
        words: the output.
        unknown: how an unknown word is written.
        source_words: the source, as it was before unknown words were replaced if that is known.
        pairs: the alignment, see `hard`.
        replacements: source word to output word.
    """
    source_of = {target: source for source, target in pairs}
    out = list(words)
    for i, word in enumerate(words):
        position = source_of.get(i)
        if word == unknown and position is not None and position < len(source_words):
            source = source_words[position]
            out[i] = replacements.get(source, source)
    return out
