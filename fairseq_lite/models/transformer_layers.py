"""The encoder's and the decoder's layer.

A layer is two or three residual blocks. Each block normalises either its input (pre-norm) or the
sum of its output and input (post-norm, the default). The inner network of `feed_forward` is two
linear maps, or a mixture of experts, which `build_mixture` makes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairseq_lite.models.attention import MultiheadAttention
from fairseq_lite.models.config import StackConfig
from fairseq_lite.models.dropout import Dropout
from fairseq_lite.models.layers import ACTIVATIONS, LayerNorm
from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.moe.router import RouterReport


class Expert(nn.Module):
    """The inner network of one expert: (N, D) -> (N, D).

    Args:
        cfg: the shape; the inner width is `cfg.moe.ffn_dim`.
        owner: whose the dropout is.
    """

    def __init__(self, cfg: StackConfig, owner: str) -> None:
        super().__init__()
        assert cfg.moe is not None
        inner = cfg.moe.ffn_dim
        self.activation = ACTIVATIONS[cfg.activation_fn]
        self.activation_dropout_module = Dropout(cfg.activation_dropout, owner)
        self.ffn_layernorm = LayerNorm(inner) if cfg.scale_fc else None
        self.fc1 = nn.Linear(cfg.embed_dim, inner)
        self.fc2 = nn.Linear(inner, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Compute rows, none of them included."""
        out: Tensor = self.fc2(self.between(self.fc1(x)))
        return out

    def between(self, inner: Tensor) -> Tensor:
        """(N, F) -> (N, F), row by row: all that happens between the two products."""
        inner = self.activation_dropout_module(self.activation(inner))
        if self.ffn_layernorm is not None:
            inner = self.ffn_layernorm(inner)
        return inner


class _Layer(nn.Module):
    """What both layers share: dropout, order of normalisation, two of the residual blocks.

    With NormFormer's additions (Shleifer et al. 2021; `cfg.scale_*`), y being a block's input,
    a the attention and f(x) = dropout(activation(fc1(x))):

        y + dropout(attn_ln(c_attn * a(norm(y))))        c_attn: one factor for each head
        w_resid * y + dropout(fc2(ffn_layernorm(f(norm(y)))))

    As in fairseq, and unlike the paper, c_attn multiplies slices of what the output projection
    gives, not of what it takes.
    """

    self_attn: MultiheadAttention
    attn_ln: LayerNorm | None
    self_attn_layer_norm: LayerNorm
    ffn_layernorm: LayerNorm | None
    fc1: nn.Linear
    fc2: nn.Linear
    moe_layer: nn.Module | None
    final_layer_norm: LayerNorm

    def __init__(self, cfg: StackConfig, name: str) -> None:
        super().__init__()
        self.name = name
        owner = type(self).__name__
        self.embed_dim = cfg.embed_dim
        self.normalize_before = cfg.normalize_before
        self.activation = ACTIVATIONS[cfg.activation_fn]
        self.dropout_module = Dropout(cfg.dropout, owner)
        self.activation_dropout_module = Dropout(cfg.activation_dropout, owner)
        self.c_attn = _factors(cfg.attention_heads) if cfg.scale_heads else None
        self.w_resid = _factors(cfg.embed_dim) if cfg.scale_resids else None

    # The blocks are built in fairseq's order of parameters: optimizer states go by position.

    def _build_self_attention(self, cfg: StackConfig) -> None:
        self.self_attn = MultiheadAttention(
            cfg.embed_dim, cfg.attention_heads, dropout=cfg.attention_dropout
        )
        self.attn_ln = LayerNorm(cfg.embed_dim) if cfg.scale_attn else None
        self.self_attn_layer_norm = LayerNorm(cfg.embed_dim)

    def _build_feed_forward(self, cfg: StackConfig) -> None:
        if cfg.moe is not None:
            self.moe_layer = self.build_mixture(cfg)
        else:
            self.moe_layer = None
            self.ffn_layernorm = LayerNorm(cfg.ffn_embed_dim) if cfg.scale_fc else None
            self.fc1 = nn.Linear(cfg.embed_dim, cfg.ffn_embed_dim)
            self.fc2 = nn.Linear(cfg.ffn_embed_dim, cfg.embed_dim)
        self.final_layer_norm = LayerNorm(cfg.embed_dim)

    def build_mixture(self, cfg: StackConfig) -> nn.Module:
        """Make the mixture of experts; a layer with another one overrides this.

        Returns:
            A module that maps states (…, D) and a padding mask (…) or None to states (…, D) and a
            `RouterReport`.
        """
        assert cfg.moe is not None
        return MoELayer(cfg.embed_dim, cfg.moe, lambda: Expert(cfg, type(self).__name__), self.name)

    def reset_parameters(self) -> None:
        """Start the factors at one."""
        with torch.no_grad():
            for factors in (self.c_attn, self.w_resid):
                if factors is not None:
                    factors.fill_(1.0)

    def self_attention(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The whole residual block of self-attention.

        Args:
            x: (…, D).
            attend: from normalised states to what attention gives; decoding step by step has its
                own.
        """
        norm = self.self_attn_layer_norm
        out = attend(norm(x) if self.normalize_before else x)
        if self.c_attn is not None:
            heads = self.c_attn.to(out.dtype)[:, None]
            out = (out.unflatten(-1, (heads.size(0), -1)) * heads).flatten(-2)
        if self.attn_ln is not None:
            out = self.attn_ln(out)
        x = self.dropout_module.add(out, x)
        return x if self.normalize_before else norm(x)

    def feed_forward(
        self, x: Tensor, padding: Tensor | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """The whole residual block.

        Args:
            x: (…, D).
            padding: (…), True on padding, for a mixture of experts; None where there is none.

        Returns:
            (…, D), and what a mixture of experts reports.
        """
        norm = self.final_layer_norm
        out, report = norm(x) if self.normalize_before else x, None
        if self.moe_layer is not None:
            out, report = self.moe_layer(out, padding)
        else:
            out = self.activation_dropout_module(self.activation(self.fc1(out)))
            if self.ffn_layernorm is not None:
                out = self.ffn_layernorm(out)
            out = self.fc2(out)
        if self.w_resid is not None:
            x = x * self.w_resid.to(x.dtype)
        x = self.dropout_module.add(out, x)
        return x if self.normalize_before else norm(x), report


def _factors(count: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(count))


class TransformerEncoderLayer(_Layer):
    """Self-attention, then feed-forward."""

    def __init__(self, cfg: StackConfig, name: str = "") -> None:
        super().__init__(cfg, name)
        self._build_self_attention(cfg)
        self._build_feed_forward(cfg)

    def forward(
        self, x: Tensor, bias: Tensor | None, padding: Tensor | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """One step of the stack.

        Args:
            x: (B, S, D).
            bias: (B, 1, 1, S), hides padding.
            padding: (B, S), for a mixture of experts.

        Returns:
            (B, S, D), and what a mixture of experts reports.
        """
        x = self.self_attention(x, lambda states: self.self_attn(states, states, bias=bias)[0])
        return self.feed_forward(x, padding)


class TransformerDecoderLayer(_Layer):
    """Causal self-attention, attention to the encoder (where there is one), then feed-forward."""

    encoder_attn: MultiheadAttention | None
    encoder_attn_layer_norm: LayerNorm | None

    def __init__(self, cfg: StackConfig, name: str = "") -> None:
        super().__init__(cfg, name)
        self._build_self_attention(cfg)
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
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, RouterReport | None]:
        """One step of the stack.

        Args:
            x: (B, T, D).
            bias: hides the future, and padding where it must; broadcastable to (B, H, T, T).
            causal: hide the future and nothing else; `bias`, where given, does just that.
            encoder_states: (B, S, D'), or None without an encoder.
            encoder_bias: (B, 1, 1, S), hides source padding.
            need_weights: return the cross-attention weights.
            padding: (B, T), for a mixture of experts.

        Returns:
            (B, T, D), the weights (B, H, T, S) or None, and what a mixture of experts reports.
        """

        def attend(states: Tensor) -> Tensor:
            out: Tensor = self.self_attn(states, states, bias=bias, causal=causal)[0]
            return out

        x = self.self_attention(x, attend)
        weights = None
        if encoder_states is not None and self.encoder_attn is not None:
            x, weights = self._cross_attention(x, encoder_states, encoder_bias, need_weights)
        x, report = self.feed_forward(x, padding)
        return x, weights, report

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
