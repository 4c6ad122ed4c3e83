"""The encoder's and the decoder's layer.

A layer is two or three residual blocks. Each block normalises either its input (pre-norm) or the
sum of its output and input (post-norm, the default). `feed_forward` is a block of its own, so that
another kind of inner network, such as a mixture of experts, replaces one method.
"""

from __future__ import annotations

from torch import Tensor, nn

from fairseq_lite.models.attention import MultiheadAttention
from fairseq_lite.models.config import StackConfig
from fairseq_lite.models.dropout import Dropout
from fairseq_lite.models.layers import ACTIVATIONS, LayerNorm


class _Layer(nn.Module):
    """What both layers share: dropout, order of normalisation, the feed-forward block."""

    fc1: nn.Linear
    fc2: nn.Linear
    final_layer_norm: LayerNorm

    def __init__(self, cfg: StackConfig) -> None:
        super().__init__()
        owner = type(self).__name__
        self.embed_dim = cfg.embed_dim
        self.normalize_before = cfg.normalize_before
        self.activation = ACTIVATIONS[cfg.activation_fn]
        self.dropout_module = Dropout(cfg.dropout, owner)
        self.activation_dropout_module = Dropout(cfg.activation_dropout, owner)

    def _build_feed_forward(self, cfg: StackConfig) -> None:
        # Called last, so that parameters come in fairseq's order: optimizer states go by position.
        self.fc1 = nn.Linear(cfg.embed_dim, cfg.ffn_embed_dim)
        self.fc2 = nn.Linear(cfg.ffn_embed_dim, cfg.embed_dim)
        self.final_layer_norm = LayerNorm(cfg.embed_dim)

    def _self_attention(
        self,
        attention: MultiheadAttention,
        norm: LayerNorm,
        x: Tensor,
        bias: Tensor | None,
        causal: bool,
    ) -> Tensor:
        states = norm(x) if self.normalize_before else x
        out, _ = attention(states, states, bias=bias, causal=causal)
        x = self.dropout_module.add(out, x)
        return x if self.normalize_before else norm(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The whole residual block (…, D) -> (…, D)."""
        norm = self.final_layer_norm
        inner = self.activation(self.fc1(norm(x) if self.normalize_before else x))
        out = self.fc2(self.activation_dropout_module(inner))
        x = self.dropout_module.add(out, x)
        return x if self.normalize_before else norm(x)


class TransformerEncoderLayer(_Layer):
    """Self-attention, then feed-forward."""

    def __init__(self, cfg: StackConfig) -> None:
        super().__init__(cfg)
        self.self_attn = MultiheadAttention(
            cfg.embed_dim, cfg.attention_heads, dropout=cfg.attention_dropout
        )
        self.self_attn_layer_norm = LayerNorm(cfg.embed_dim)
        self._build_feed_forward(cfg)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, D); `bias` (B, 1, 1, S) hides padding."""
        x = self._self_attention(self.self_attn, self.self_attn_layer_norm, x, bias, False)
        return self.feed_forward(x)


class TransformerDecoderLayer(_Layer):
    """Causal self-attention, attention to the encoder (where there is one), then feed-forward."""

    encoder_attn: MultiheadAttention | None
    encoder_attn_layer_norm: LayerNorm | None

    def __init__(self, cfg: StackConfig) -> None:
        super().__init__(cfg)
        self.self_attn = MultiheadAttention(
            cfg.embed_dim, cfg.attention_heads, dropout=cfg.attention_dropout
        )
        self.self_attn_layer_norm = LayerNorm(cfg.embed_dim)
        if cfg.encoder_dim is None:
            self.encoder_attn = self.encoder_attn_layer_norm = None
        else:
            self.encoder_attn = MultiheadAttention(
                cfg.embed_dim,
                cfg.attention_heads,
                kv_dim=cfg.encoder_dim,
                dropout=cfg.attention_dropout,
            )
            self.encoder_attn_layer_norm = LayerNorm(cfg.embed_dim)
        self._build_feed_forward(cfg)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        causal: bool,
        encoder_states: Tensor | None = None,
        encoder_bias: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One step of the stack.

        Args:
            x: (B, T, D).
            bias: hides the future, and padding where it must; broadcastable to (B, H, T, T).
            causal: `bias` hides the future and nothing else.
            encoder_states: (B, S, D'), or None without an encoder.
            encoder_bias: (B, 1, 1, S), hides source padding.
            need_weights: return the cross-attention weights.

        Returns:
            (B, T, D), and the weights (B, H, T, S) or None.
        """
        x = self._self_attention(self.self_attn, self.self_attn_layer_norm, x, bias, causal)
        weights = None
        if encoder_states is not None and self.encoder_attn is not None:
            x, weights = self._cross_attention(x, encoder_states, encoder_bias, need_weights)
        return self.feed_forward(x), weights

    def _cross_attention(
        self, x: Tensor, states: Tensor, bias: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        norm = self.encoder_attn_layer_norm
        assert self.encoder_attn is not None
        assert norm is not None
        out, weights = self.encoder_attn(
            norm(x) if self.normalize_before else x,
            states,
            bias=bias,
            need_weights=need_weights,
        )
        x = self.dropout_module.add(out, x)
        return (x if self.normalize_before else norm(x)), weights
