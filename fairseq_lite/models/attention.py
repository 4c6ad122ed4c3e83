"""Multi-head attention with separate projections, named as fairseq names them.

Axes: B sentences, T queries, S keys, H heads, K head width, D model width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lite.models.dropout import Dropout, dropout
from fairseq_lite.models.layers import XavierLinear

Kernel = Literal["sdpa", "matmul"]

# Up to this many keys the backward pass of torch's fused CPU kernel in bf16 is slower than plain
# products and a softmax. Forward and backward, 1 thread, D=512: with AMX 47 ms against 23 at
# T=32, 74 against 33 at T=128, equal at T=512 (4096 tokens); without it 60 against 28 at T=256, 98
# against 50 at T=512, 122 against 99 at T=1024 (2048 tokens). In fp32 it is never slower.
_SHORT = 512

_BLOCKED = torch.finfo(torch.float16).min / 2


def choose_kernel(
    device: str, dtype: torch.dtype, keys: int, *, grad: bool, dropout_p: float
) -> Kernel:
    """The faster kernel, by measurement.

    - CUDA and others: the fused kernel.
    - CPU with dropout on the weights: plain products, since torch's fused kernel cannot drop there
      and falls back to an unfused one with a slow mask.
    - CPU in bf16 with gradients, short sequences: plain products (see `_SHORT`).
    - CPU otherwise (fp32, or inference): the fused kernel.
    """
    if device != "cpu":
        return "sdpa"
    if dropout_p > 0.0:
        return "matmul"
    if dtype != torch.float32 and grad and keys <= _SHORT:
        return "matmul"
    return "sdpa"


def attention_bias(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores: 0, or a number no score can outweigh where `blocked`.

    It is finite, so that a query that may look nowhere (padding on the left) gets a mean, not NaN,
    and cannot spoil its neighbours: half the least number of float16, which autocast may turn a
    wider bias into, so that no sum overflows.
    """
    bias = torch.zeros(blocked.shape, dtype=dtype, device=blocked.device)
    return bias.masked_fill_(blocked, _BLOCKED)


def causal_blocked(length: int, device: torch.device | None = None) -> Tensor:
    """(T, T), True above the diagonal: the future."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q kᵀ / sqrt(K) + bias) v.

    Args:
        q: (B, H, T, K).
        k: (B, H, S, K).
        v: (B, H, S, K).
        bias: broadcastable to (B, H, T, S), from `attention_bias`.
        causal: hide the future (T == S) and nothing else; `bias` may then be given or not, and some
            kernels need not read it.
        dropout_p: dropout on the attention weights.
        need_weights: also return the weights (B, H, T, S) in fp32, before dropout.
    """
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    kernel = choose_kernel(q.device.type, q.dtype, k.size(2), grad=grad, dropout_p=dropout_p)
    if kernel == "sdpa" and not need_weights:
        mask = None if causal or bias is None else bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal
        )
        return mixed, None
    scale = 1.0 / math.sqrt(q.size(-1))
    if causal and bias is None:
        bias = attention_bias(causal_blocked(q.size(2), q.device), q.dtype)
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores * scale if bias is None else torch.add(bias.to(q.dtype), scores, alpha=scale)
    if need_weights:
        weights = torch.softmax(scores.float(), dim=-1)
        return torch.matmul(dropout(weights, dropout_p).to(v.dtype), v), weights
    # torch's softmax of bf16 computes in fp32 inside and rounds once, as fairseq's does.
    return torch.matmul(dropout(torch.softmax(scores, dim=-1), dropout_p).to(v.dtype), v), None


class MultiheadAttention(nn.Module):
    """Attention of `embed_dim` wide queries over states of any width.

    Args:
        embed_dim: D, width of queries and output.
        num_heads: H, divides D.
        kv_dim: width of the states keys and values are made of; default D.
        dropout: on the attention weights.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_dim = embed_dim if kv_dim is None else kv_dim
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        # One matrix of three stacked projections would have fan_out 3D; gain 1/sqrt(2) keeps that
        # scale for the separate ones. fairseq drops it when the widths differ.
        gain = 1 / math.sqrt(2) if kv_dim == embed_dim else 1.0
        self.k_proj = XavierLinear(kv_dim, embed_dim, gain=gain, zero_bias=False)
        self.v_proj = XavierLinear(kv_dim, embed_dim, gain=gain, zero_bias=False)
        self.q_proj = XavierLinear(embed_dim, embed_dim, gain=gain, zero_bias=False)
        self.out_proj = XavierLinear(embed_dim, embed_dim)
        self.dropout_module = Dropout(dropout, "MultiheadAttention")

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, K), a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        states: Tensor,
        *,
        bias: Tensor | None = None,
        causal: bool = False,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `states`.

        Args:
            query: (B, T, D).
            states: (B, S, kv_dim), which keys and values are projected from; `query` itself for
                self-attention.
            bias: added to the scores, broadcastable to (B, H, T, S); see `attention_bias`.
            causal: hide the future and nothing else, with or without a `bias`; see `attend`.
            need_weights: return the weights too.

        Returns:
            (B, T, D), and the weights (B, H, T, S) or None.
        """
        # Three products: a single one over stacked weights was measured no faster on a CPU.
        q, k, v = (
            self.split_heads(x)
            for x in (self.q_proj(query), self.k_proj(states), self.v_proj(states))
        )
        mixed, weights = attend(
            q,
            k,
            v,
            bias=bias,
            causal=causal,
            dropout_p=self.dropout_module.active_p,
            need_weights=need_weights,
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights
