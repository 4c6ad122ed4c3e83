"""Decoding one token at a time: a tree of keys and values that is only ever appended to.

All beams of a sentence write into one cache. Each step adds K slots, one a beam; nothing is moved
when beams are reordered. Instead each beam knows which slots its own past lies in: an additive
mask, of which only the rows are exchanged. A beam thus sees the slots of its ancestors, whoever
holds them. Soon most slots are seen by no beam; every few steps those are dropped (on a trained
model 30 to 60 % of them), so long outputs do not pay for beams that died.
Keys and values of the encoder's states are computed once a sentence and shared by its beams. So are
those of a prefix that a language model continues: one pass reads it whole (`prefill`).

Axes: B sentences, K beams, H heads, D width of the model, S source positions, T prefix positions,
V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lite.models.api import EncoderOut, Model
from fairseq_lite.models.attention import (
    MultiheadAttention,
    attend,
    attention_bias,
    causal_blocked,
)
from fairseq_lite.models.transformer import TransformerDecoder, TransformerModel
from fairseq_lite.models.transformer_layers import TransformerDecoderLayer
from fairseq_lite.models.transformer_lm import TransformerLanguageModel

# The caches start with room for this many steps and double when it is used up.
_FIRST_STEPS = 32
# Slots that no beam sees are dropped every so many steps, where that frees at least a tenth.
_COLLECT_EVERY = 8
_WORTHWHILE = 0.9


class IncrementalDecoder(ABC):
    """Prefixes of B sentences x K beams that grow by a token a step."""

    @abstractmethod
    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Append a token to every beam and score the next.

        Args:
            tokens: (B, K), the token that continues beam `parents[b, k]` in place k; (B, 1) at the
                first step, where all beams are the same.
            parents: (B, K), or None where every beam continues itself.

        Returns:
            Logits (B, K, V), or (B, 1, V).
        """

    @abstractmethod
    def keep(self, sentences: Tensor) -> None:
        """Go on with these sentences (indices into the present B) only."""


class PrefixDecoder(IncrementalDecoder):
    """One whose sentences may begin with a prefix that is read in one pass."""

    @abstractmethod
    def prefill(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Read the prefixes; comes before the first step, which then continues them.

        Args:
            tokens: (B, T), the start symbol first, padded on the right.
            lengths: (B,), the start symbol included.

        Returns:
            States (B, T, …) that `project` turns into logits of the token after each position.
        """

    @abstractmethod
    def project(self, states: Tensor) -> Tensor:
        """States (…, D) to logits (…, V)."""


def can_cache(model: Model) -> bool:
    """Whether the tree can stand in for the model's own forward pass.

    An architecture that overrides the forward pass of the decoder or of a layer may do anything
    there; it is decoded by running it over the whole prefix.
    """
    if not isinstance(model, (TransformerModel, TransformerLanguageModel)):
        return False
    kind = TransformerModel if isinstance(model, TransformerModel) else TransformerLanguageModel
    return (
        _is_exactly(model, kind)
        and _is_exactly(model.decoder, TransformerDecoder)
        and all(_is_exactly(layer, TransformerDecoderLayer) for layer in model.decoder.layers)
    )


def _is_exactly(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind and has its forward pass."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def incremental_decoder(
    model: Model, src_tokens: Tensor, src_lengths: Tensor | None, *, beam: int, max_len: int
) -> IncrementalDecoder:
    """Encode a batch and make a decoder for it.

    Args:
        model: any encoder-decoder.
        src_tokens: (B, S).
        src_lengths: (B,).
        beam: K.
        max_len: no more than this many steps plus one will be asked for.
    """
    if can_cache(model):
        assert isinstance(model, TransformerModel)
        return TreeDecoder(
            model.decoder, model.encode(src_tokens, src_lengths), beam=beam, max_len=max_len
        )
    return RecomputingDecoder(model, src_tokens, src_lengths, beam=beam)


def language_model_decoder(
    model: Model, *, sentences: int, beam: int, max_len: int, pad: int
) -> PrefixDecoder:
    """Make a decoder for a language model.

    Args:
        model: any language model: its forward pass takes tokens (B, T) and their lengths.
        sentences: B.
        beam: K.
        max_len: no more than this many steps plus one will be asked for, besides `prefill`.
        pad: the padding symbol.
    """
    if can_cache(model):
        assert isinstance(model, TransformerLanguageModel)
        return TreeDecoder(model.decoder, None, beam=beam, max_len=max_len, sentences=sentences)
    return RecomputingLanguageModel(model, sentences=sentences, beam=beam, pad=pad)


class RecomputingDecoder(IncrementalDecoder):
    """Runs the model over the whole prefix at every step: slow, and right for any model."""

    def __init__(
        self, model: Model, src_tokens: Tensor, src_lengths: Tensor | None, *, beam: int
    ) -> None:
        self.model = model
        self.beam = beam
        self.src_tokens = src_tokens.repeat_interleave(beam, dim=0)
        self.src_lengths = (
            None if src_lengths is None else src_lengths.repeat_interleave(beam, dim=0)
        )
        self.prefixes: Tensor | None = None

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """See `IncrementalDecoder.step`."""
        if self.prefixes is None:
            self.prefixes = tokens.new_zeros(*tokens.shape, 0)
        if parents is not None:
            index = parents[..., None].expand(-1, -1, self.prefixes.size(2))
            self.prefixes = self.prefixes.gather(1, index)
        self.prefixes = torch.cat([self.prefixes, tokens[..., None]], dim=2)
        every = self.beam // tokens.size(1)
        lengths = None if self.src_lengths is None else self.src_lengths[::every]
        logits, _ = self.model(self.src_tokens[::every], lengths, self.prefixes.flatten(0, 1))
        return logits[:, -1].unflatten(0, tokens.shape)  # type: ignore[no-any-return]

    def keep(self, sentences: Tensor) -> None:
        """See `IncrementalDecoder.keep`."""
        if self.prefixes is not None:
            self.prefixes = self.prefixes[sentences]
        places = torch.arange(self.beam, device=sentences.device)
        rows = (sentences[:, None] * self.beam + places).flatten()
        self.src_tokens = self.src_tokens[rows]
        if self.src_lengths is not None:
            self.src_lengths = self.src_lengths[rows]


class _LayerState:
    """What one layer remembers: its tree of keys and values, and those of the encoder's states."""

    def __init__(self, layer: TransformerDecoderLayer, encoder_out: EncoderOut | None) -> None:
        self.layer = layer
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        # One product instead of three. Stacked anew for every batch, which costs little and can
        # never be out of date with weights that are still being trained.
        self.weight = torch.cat([p.weight for p in projections])
        self.bias = (
            None if attention.q_proj.bias is None else torch.cat([p.bias for p in projections])
        )
        self.tree: tuple[Tensor, Tensor] | None = None
        self.source: tuple[Tensor, Tensor] | None = None
        if encoder_out is not None and layer.encoder_attn is not None:
            cross = layer.encoder_attn
            self.source = (
                cross.split_heads(cross.k_proj(encoder_out.states)).contiguous(),
                cross.split_heads(cross.v_proj(encoder_out.states)).contiguous(),
            )

    def append(self, k: Tensor, v: Tensor, used: int, room: int) -> tuple[Tensor, Tensor]:
        """Write (B, H, K, width) at slot `used`; return views of all slots written so far."""
        end = used + k.size(2)
        if self.tree is None:
            shape = (k.size(0), k.size(1), room, k.size(3))
            self.tree = (k.new_empty(shape), k.new_empty(shape))
        elif self.tree[0].size(2) < end:
            self.tree = tuple(_resized(t, used, room) for t in self.tree)  # type: ignore[assignment]
        assert self.tree is not None
        for cache, new in zip(self.tree, (k, v), strict=True):
            cache[:, :, used:end] = new
        return self.tree[0][:, :, :end], self.tree[1][:, :, :end]

    def select(self, rows: Tensor, count: int) -> None:
        """Move `count` slots of each (sentence, head) to the front; `rows` are their places."""
        if self.tree is not None:
            for cache in self.tree:
                chosen = cache.view(-1, cache.size(3)).index_select(0, rows)
                cache[:, :, :count] = chosen.view(cache.size(0), cache.size(1), count, -1)

    def keep(self, sentences: Tensor, used: int) -> None:
        if self.tree is not None:
            room = self.tree[0].size(2)
            self.tree = tuple(  # type: ignore[assignment]
                _resized(t[:, :, :used][sentences], used, room) for t in self.tree
            )
        if self.source is not None:
            self.source = (self.source[0][sentences], self.source[1][sentences])


def _resized(cache: Tensor, used: int, room: int) -> Tensor:
    new = cache.new_empty(cache.size(0), cache.size(1), room, cache.size(3))
    new[:, :, :used] = cache[:, :, :used]
    return new


class RecomputingLanguageModel(PrefixDecoder):
    """Runs a language model over everything so far at every step: slow, and right for any model.

    Args:
        model: its forward pass takes tokens (B, T) and their lengths, and returns logits.
        sentences: B.
        beam: K.
        pad: the padding symbol.
    """

    def __init__(self, model: Model, *, sentences: int, beam: int, pad: int) -> None:
        self.model = model
        self.beam = beam
        self.pad = pad
        device = next(model.parameters()).device
        self.tokens = torch.zeros(sentences, beam, 0, dtype=torch.long, device=device)
        self.lengths = torch.zeros(sentences, dtype=torch.long, device=device)

    def prefill(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """See `PrefixDecoder.prefill`."""
        self.tokens = tokens[:, None].expand(-1, self.beam, -1)
        self.lengths = lengths
        logits: Tensor = self.model(tokens, lengths)[0]
        return logits

    def project(self, states: Tensor) -> Tensor:
        """The model has projected them."""
        return states

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """See `IncrementalDecoder.step`."""
        if parents is not None:
            self.tokens = self.tokens.gather(1, parents[..., None].expand_as(self.tokens))
        # Rows are as long as they are: a new token takes the place of the first padding.
        self.tokens = F.pad(self.tokens, (0, 1), value=0)
        place = self.lengths[:, None, None].expand(-1, self.beam, 1)
        every = tokens[..., None].expand(-1, self.beam, -1)
        self.tokens = self.tokens.scatter(2, place, every)
        self.lengths = self.lengths + 1
        lengths = self.lengths.repeat_interleave(self.beam)
        logits = self.model(self._padded().flatten(0, 1), lengths)[0]
        last = (lengths - 1)[:, None, None].expand(-1, 1, logits.size(2))
        found: Tensor = logits.gather(1, last).unflatten(0, (-1, self.beam))[:, :, 0]
        return found[:, : tokens.size(1)]

    def _padded(self) -> Tensor:
        """The tokens; behind a row's own there is padding, which no earlier position sees."""
        width = int(self.lengths.max())
        tokens = self.tokens[:, :, :width]
        behind = torch.arange(width, device=tokens.device) >= self.lengths[:, None]
        return tokens.masked_fill(behind[:, None], self.pad)

    def keep(self, sentences: Tensor) -> None:
        """See `IncrementalDecoder.keep`."""
        self.tokens, self.lengths = self.tokens[sentences], self.lengths[sentences]


class TreeDecoder(PrefixDecoder):
    """A transformer decoder over a tree of prefixes.

    Args:
        decoder: its layers' weights are used as they are, dropout included where it is retained.
        encoder_out: what the encoder returned; None for a language model.
        beam: K.
        max_len: no more than this many steps plus one.
        sentences: B; needed without `encoder_out` only.
    """

    def __init__(
        self,
        decoder: TransformerDecoder,
        encoder_out: EncoderOut | None,
        *,
        beam: int,
        max_len: int,
        sentences: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.beam = beam
        self.steps = 0
        # Slots written so far, slots there is room for now, and slots there can ever be.
        self.used = 0
        self.most = (max_len + 1) * beam
        self.room = min(_FIRST_STEPS * beam, self.most)
        weight = decoder.output_projection.weight
        if encoder_out is not None:
            sentences = encoder_out.states.size(0)
        assert sentences is not None
        self.states = [
            _LayerState(layer, encoder_out)  # type: ignore[arg-type]
            for layer in decoder.layers
        ]
        self.source_bias: Tensor | None = None
        if encoder_out is not None and encoder_out.padding_mask is not None:
            blocked = encoder_out.padding_mask[:, None, None, :]
            self.source_bias = attention_bias(blocked, weight.dtype)
        # What each beam sees of the tree: 0 on its ancestors, a very low number elsewhere.
        self.blind = torch.finfo(weight.dtype).min / 2
        self.sight = weight.new_full((sentences, beam, self.room), self.blind)
        # How many positions each sentence's prefix has; its beams go on behind it.
        self.starts = torch.zeros(sentences, dtype=torch.long, device=weight.device)

    def prefill(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """See `PrefixDecoder.prefill`; the prefix takes one slot a position, seen by all beams."""
        width = tokens.size(1)
        self.room, self.most = self.room + width, self.most + width
        self.sight = F.pad(self.sight, (0, width), value=self.blind)
        behind = torch.arange(width, device=tokens.device) >= lengths[:, None]
        self.sight[:, :, :width] = self.blind * behind[:, None].to(self.sight.dtype)
        x = self.decoder.embed(tokens)
        # Padding is on the right, the future of every token: hiding the future is enough.
        bias = attention_bias(causal_blocked(width, tokens.device), x.dtype)
        for state in self.states:
            x = self._layer(state, x, bias, causal=True)
        self.used = width
        self.starts = lengths
        return self.decoder.finish(x)

    def project(self, states: Tensor) -> Tensor:
        """See `PrefixDecoder.project`."""
        logits: Tensor = self.decoder.output_projection(states)
        return logits

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """See `IncrementalDecoder.step`."""
        bias = self._look(parents, tokens.size(1))
        positions = self.starts[:, None] + (self.decoder.padding_idx + 1 + self.steps)
        x = self.decoder.embed(tokens, positions.expand_as(tokens))
        for state in self.states:
            x = self._layer(state, x, bias)
        self.steps += 1
        self.used += tokens.size(1)
        return self.project(self.decoder.finish(x))

    def keep(self, sentences: Tensor) -> None:
        """See `IncrementalDecoder.keep`."""
        for state in self.states:
            state.keep(sentences, self.used)
        self.sight, self.starts = self.sight[sentences], self.starts[sentences]
        if self.source_bias is not None:
            self.source_bias = self.source_bias[sentences]

    def _look(self, parents: Tensor | None, width: int) -> Tensor:
        """Take over the parents' sight and add the `width` new slots: (B, 1, width, slots)."""
        if parents is not None:
            seen = self.sight[:, :, : self.used]
            self.sight[:, :, : self.used] = seen.gather(1, parents[..., None].expand_as(seen))
        if self.steps and self.steps % _COLLECT_EVERY == 0:
            self._collect()
        end = self.used + width
        if end > self.room:
            self.room = min(2 * self.room, self.most)
            self.sight = F.pad(self.sight, (0, self.room - self.sight.size(2)), value=self.blind)
        new = self.sight[:, :, self.used : end]
        if width == self.beam:
            new.diagonal(dim1=1, dim2=2).zero_()
        else:
            new.zero_()
        return self.sight[:, None, :width, :end]

    def _collect(self) -> None:
        """Drop the slots that no beam sees."""
        seen = self.sight[:, :, : self.used]
        live = seen.eq(0).any(dim=1)
        count = int(live.sum(dim=1).max())
        if count > _WORTHWHILE * self.used:
            return
        # Live slots first, in their order. Sentences with fewer than `count` keep some dead ones.
        order = live.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        kept = seen.gather(2, order[:, None].expand(-1, self.beam, -1))
        self.sight.fill_(self.blind)
        self.sight[:, :, :count] = kept
        for state in self.states:
            if state.tree is not None:
                b, heads, room, _ = state.tree[0].shape
                starts = torch.arange(b * heads, device=order.device).view(b, heads, 1) * room
                state.select((starts + order[:, None]).flatten(), count)
        self.used = count

    def _layer(
        self, state: _LayerState, x: Tensor, bias: Tensor, *, causal: bool = False
    ) -> Tensor:
        layer = state.layer
        x = layer.self_attention(x, lambda inputs: self._attend(state, inputs, bias, causal))
        norm = layer.encoder_attn_layer_norm
        if state.source is not None and norm is not None:
            out = self._cross_attention(state, norm(x) if layer.normalize_before else x)
            x = layer.dropout_module.add(out, x)
            if not layer.normalize_before:
                x = norm(x)
        return layer.feed_forward(x)[0]

    def _attend(self, state: _LayerState, x: Tensor, bias: Tensor, causal: bool) -> Tensor:
        attention = state.layer.self_attn
        qkv = F.linear(x, state.weight, state.bias)
        q, k, v = (attention.split_heads(part) for part in qkv.chunk(3, dim=-1))
        keys, values = state.append(k, v, self.used, self.room)
        return _mix(attention, q, keys, values, bias, causal)

    def _cross_attention(self, state: _LayerState, x: Tensor) -> Tensor:
        attention = state.layer.encoder_attn
        assert attention is not None
        assert state.source is not None
        q = attention.split_heads(attention.q_proj(x))
        return _mix(attention, q, *state.source, self.source_bias)


def _mix(
    attention: MultiheadAttention,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    causal: bool = False,
) -> Tensor:
    # Dropout is active only where --retain-dropout keeps it so.
    dropout_p = attention.dropout_module.active_p
    mixed, _ = attend(q, keys, values, bias=bias, causal=causal, dropout_p=dropout_p)
    out: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return out
