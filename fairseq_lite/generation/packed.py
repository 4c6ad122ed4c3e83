"""Rows of several continuations each through a transformer, behind keys and values read before.

Tokens of all rows stand end to end, without padding: everything but attention goes token by token.
In attention a token sees the stem, its row's context up to itself, and of the tree of continuations
those that it follows. On a CPU each row has a call of its own, and writes its keys and values
behind the stem's, which are never copied. Elsewhere many calls would leave the device idle: rows
are padded to blocks, as large as copies of the stem's keys and values allow.

Axes: N tokens, W wanted ones, H heads, K head width, D width, R rows of a block, T longest of them,
S tokens of the stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lite.data.indexed import Ids
from fairseq_lite.generation.branch_plan import Row
from fairseq_lite.models.attention import (
    MultiheadAttention,
    attend,
    attention_bias,
    causal_blocked,
)
from fairseq_lite.models.transformer import TransformerDecoder
from fairseq_lite.models.transformer_layers import TransformerDecoderLayer

# Numbers of keys, values and masks that a block may need: half a gigabyte in 16 bits.
_BLOCK_NUMBERS = 1 << 28


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a block are when its rows are padded.

    Attributes:
        index: (R, T), which token of the block stands there; some token where none does.
        back: (n,), where each of the block's tokens stands in it, flat.
    """

    index: Tensor
    back: Tensor


@dataclass(frozen=True)
class Block:
    """Rows whose attention is computed in one call.

    Attributes:
        first: the number of their first token.
        last: that of their last, plus one.
        bias: (R, 1, T, T), what hides a row's tokens from each other; None: the future alone.
        padding: None for a single row.
    """

    first: int
    last: int
    bias: Tensor | None
    padding: Padding | None = None


@dataclass(frozen=True)
class Packed:
    """Rows without their stem, end to end.

    Attributes:
        tokens: (N,).
        places: (N,), in the text, the start symbol's being 0.
        blocks: what is computed together.
    """

    tokens: Tensor
    places: Tensor
    blocks: tuple[Block, ...]


def pack(
    rows: Sequence[Row], read: int, *, width: int, device: torch.device, dtype: torch.dtype
) -> Packed:
    """Lay out rows.

    Args:
        rows: of which at least one has tokens behind the stem.
        read: S.
        width: D.
        device: where they are read.
        dtype: of the masks.
    """
    tokens, places = [], []
    for row in rows:
        tokens += [row.prefix[read:], row.tree.tokens]
        places += [np.arange(read, len(row.prefix)), len(row.prefix) + row.tree.depths]
    blocks, first = [], 0
    for part in _together([row for row in rows if row.size > read], read, width, device):
        lengths = [row.size - read for row in part]
        last = first + sum(lengths)
        padding = _padding(lengths, device) if len(part) > 1 else None
        blocks.append(Block(first, last, _bias(part, read, device, dtype), padding))
        first = last
    return Packed(
        torch.from_numpy(np.concatenate(tokens)).to(device),
        torch.from_numpy(np.concatenate(places)).to(device),
        tuple(blocks),
    )


def pack_stem(tokens: Ids, read: int, *, device: torch.device, dtype: torch.dtype) -> Packed:
    """Lay out a stem of which `read` tokens have been read."""
    length = len(tokens) - read
    bias = attention_bias(causal_blocked(length, device), dtype)[None, None] if read else None
    places = torch.arange(read, len(tokens), device=device)
    return Packed(torch.from_numpy(tokens[read:]).to(device), places, (Block(0, length, bias),))


def _together(rows: Sequence[Row], read: int, width: int, device: torch.device) -> list[list[Row]]:
    """Neighbours, shortest first, that make a block."""
    found: list[list[Row]] = []
    for row in rows:
        numbers = row.size * (2 * width + row.size - read)
        if not found or device.type == "cpu" or (len(found[-1]) + 1) * numbers > _BLOCK_NUMBERS:
            found.append([])
        found[-1].append(row)
    return found


def _padding(lengths: Sequence[int], device: torch.device) -> Padding:
    sizes = np.array(lengths)
    column = np.arange(sizes.max())
    real = column < sizes[:, None]
    index = np.where(real, (np.cumsum(sizes) - sizes)[:, None] + column, 0)
    back = torch.from_numpy(np.flatnonzero(real))
    return Padding(torch.from_numpy(index).to(device), back.to(device))


def _bias(
    rows: Sequence[Row], read: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    if read == 0 and len(rows) == 1 and not len(rows[0].tree.tokens):
        return None
    width = max(row.size for row in rows) - read
    seen = np.zeros((len(rows), 1, width, width), dtype=np.bool_)
    # What stands behind the end of a row is the future of all its tokens.
    seen[:] = np.tri(width, dtype=np.bool_)
    for row, own in zip(rows, seen[:, 0], strict=True):
        tree = slice(len(row.prefix) - read, row.size - read)
        own[tree, tree] = row.tree.sight()
    return attention_bias(~torch.from_numpy(seen).to(device), dtype)


class _Heads(NamedTuple):
    """Queries, keys and values of the n tokens of a block, (1, H, n, K) each."""

    q: Tensor
    k: Tensor
    v: Tensor


class PackedReader:
    """Reads rows with one decoder, behind what it remembers.

    Args:
        decoder: of a language model.

    Attributes:
        length: how many tokens are remembered; fewer, when it is set to less.
        room: the most that ever are, with those of a row behind them. To be set before the first.
    """

    def __init__(self, decoder: TransformerDecoder) -> None:
        self.decoder = decoder
        self.length = 0
        self.room = 0
        # Of each layer, (1, H, room, K) each.
        self._past: list[tuple[Tensor, Tensor]] = []

    def read(self, packed: Packed, wanted: Tensor, *, keep: bool = False) -> Tensor:
        """Features of some tokens.

        Args:
            packed: what is read behind the first `length` tokens.
            wanted: (W,), their numbers.
            keep: remember the tokens, which are those of one row.

        Returns:
            (W, D').
        """
        decoder = self.decoder
        # A token a row: the table of positions takes the length of rows for the longest text.
        places = packed.places[:, None] + (decoder.padding_idx + 1)
        x = decoder.embed(packed.tokens[:, None], places).transpose(0, 1)
        for number, layer in enumerate(decoder.layers[:-1]):
            assert isinstance(layer, TransformerDecoderLayer)
            attend_to = partial(self._attend, number, layer.self_attn, packed, keep)
            x = layer.feed_forward(layer.self_attention(x, attend_to))[0]
        x = self._last_layer(x, packed, wanted, keep)
        if keep:
            self.length += packed.tokens.size(0)
        return decoder.finish(x[0])

    def _last_layer(self, x: Tensor, packed: Packed, wanted: Tensor, keep: bool) -> Tensor:
        """States (1, N, D) to those of the wanted tokens, (1, W, D): nothing reads the others."""
        layer = self.decoder.layers[-1]
        assert isinstance(layer, TransformerDecoderLayer)
        states = layer.self_attn_layer_norm(x) if layer.normalize_before else x

        def attend_to(_: Tensor) -> Tensor:
            number = len(self.decoder.layers) - 1
            return self._attend(number, layer.self_attn, packed, keep, states, wanted)

        return layer.feed_forward(layer.self_attention(x.index_select(1, wanted), attend_to))[0]

    def _attend(
        self,
        number: int,
        attention: MultiheadAttention,
        packed: Packed,
        keep: bool,
        x: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """What attention makes of (1, N, D); of (W,) wanted tokens where only those matter."""
        q, k, v = (
            attention.split_heads(project(x))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if keep and number == len(self._past):
            shape = (1, k.size(1), self.room, k.size(3))
            self._past.append((k.new_empty(shape), v.new_empty(shape)))
        past = self._past[number] if keep or self.length else None
        dropout_p = attention.dropout_module.active_p
        parts = []
        for block in packed.blocks:
            own = _Heads(*(t[:, :, block.first : block.last] for t in (q, k, v)))
            mix = self._mix if block.padding is None else self._mix_padded
            parts.append(mix(block, past, own, dropout_p))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if wanted is not None:
            mixed = mixed.index_select(1, wanted)
        out: Tensor = attention.out_proj(mixed.flatten(2))
        return out

    def _mix(
        self,
        block: Block,
        past: tuple[Tensor, Tensor] | None,
        own: _Heads,
        dropout_p: float,
    ) -> Tensor:
        """One row to (1, n, H, K)."""
        (q, k, v), bias = own, block.bias
        if past is not None:
            end = self.length + k.size(2)
            for kept, new in zip(past, (k, v), strict=True):
                kept[:, :, self.length : end] = new
            k, v = (kept[:, :, :end] for kept in past)
            bias = None if bias is None else F.pad(bias, (self.length, 0))
        mixed = attend(q, k, v, bias=bias, causal=bias is None, dropout_p=dropout_p)[0]
        return mixed.transpose(1, 2)

    def _mix_padded(
        self,
        block: Block,
        past: tuple[Tensor, Tensor] | None,
        own: _Heads,
        dropout_p: float,
    ) -> Tensor:
        """Rows end to end to (1, n, H, K)."""
        padding, bias = block.padding, block.bias
        assert padding is not None and bias is not None
        q, k, v = (t[0].transpose(0, 1)[padding.index].transpose(1, 2) for t in own)
        if past is not None:
            stems = [t[:, :, : self.length].expand(k.size(0), -1, -1, -1) for t in past]
            k, v = (torch.cat(both, dim=2) for both in zip(stems, (k, v), strict=True))
            bias = F.pad(bias, (self.length, 0))
        mixed = attend(q, k, v, bias=bias, dropout_p=dropout_p)[0]
        return mixed.transpose(1, 2).flatten(0, 1).index_select(0, padding.back)[None]
