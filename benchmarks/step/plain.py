"""A transformer training step as one would write it without thinking about speed.

fp32, eager, one operation after another: time-major states, attention as two batched matrix
products with a softmax between them, torch's dropout, a log-softmax over the whole batch for the
label-smoothed loss, and Adam as a loop over the parameters. It is the yardstick of `run.py`,
written here, not fairseq.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: transformer_iwslt_de_en by default."""

    vocabulary: int = 10_000
    width: int = 512
    inner: int = 1024
    heads: int = 4
    layers: int = 6
    dropout: float = 0.3
    pad: int = 1


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dim = shape.width // shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(shape.width, shape.width) for _ in range(4)
        )

    def forward(self, query: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        length, batch, width = query.shape

        def split(x: Tensor) -> Tensor:
            return x.contiguous().view(-1, batch * self.heads, self.dim).transpose(0, 1)

        q = split(self.q_proj(query) * self.dim**-0.5)
        k, v = split(self.k_proj(states)), split(self.v_proj(states))
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        mixed = torch.bmm(weights, v).transpose(0, 1).contiguous().view(length, batch, width)
        out: Tensor = self.out_proj(mixed)
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape, cross: bool) -> None:
        super().__init__()
        self.p = shape.dropout
        self.self_attn = Attention(shape)
        self.cross_attn = Attention(shape) if cross else None
        self.fc1 = nn.Linear(shape.width, shape.inner)
        self.fc2 = nn.Linear(shape.inner, shape.width)
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(3 if cross else 2))

    def forward(self, x: Tensor, states: Tensor | None, mask: Tensor | None) -> Tensor:
        y = F.dropout(self.self_attn(x, x, mask), self.p, self.training)
        x = self.norms[0](x + y)
        if self.cross_attn is not None and states is not None:
            y = F.dropout(self.cross_attn(x, states, None), self.p, self.training)
            x = self.norms[1](x + y)
        y = F.dropout(self.fc2(F.relu(self.fc1(x))), self.p, self.training)
        out: Tensor = self.norms[-1](x + y)
        return out


class PlainTransformer(nn.Module):
    """Post-norm encoder-decoder with one shared embedding matrix and sinusoidal positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width, padding_idx=shape.pad)
        nn.init.normal_(self.embed.weight, std=shape.width**-0.5)
        self.encoder = nn.ModuleList(Layer(shape, cross=False) for _ in range(shape.layers))
        self.decoder = nn.ModuleList(Layer(shape, cross=True) for _ in range(shape.layers))
        half = shape.width // 2
        step = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        angles = torch.arange(1026.0)[:, None] * step
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)

    def states(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1)) + self.shape.pad + 1
        x = math.sqrt(self.shape.width) * self.embed(tokens) + self.table[positions]
        return F.dropout(x, self.shape.dropout, self.training).transpose(0, 1)

    def forward(self, source: Tensor, previous: Tensor) -> Tensor:
        x = self.states(source)
        for layer in self.encoder:
            x = layer(x, None, None)
        y = self.states(previous)
        future = torch.full((previous.size(1),) * 2, float("-inf")).triu(1)
        for layer in self.decoder:
            y = layer(y, x, future)
        return F.linear(y.transpose(0, 1), self.embed.weight)


def smoothed_loss(logits: Tensor, target: Tensor, epsilon: float, pad: int) -> Tensor:
    """Label-smoothed cross-entropy, summed."""
    log_probs = F.log_softmax(logits.flatten(0, 1), dim=-1, dtype=torch.float32)
    target = target.flatten()[:, None]
    real = target.ne(pad)
    nll = -(log_probs.gather(1, target) * real).sum()
    smooth = -(log_probs.sum(dim=-1, keepdim=True) * real).sum()
    share = epsilon / (log_probs.size(-1) - 1)
    return (1.0 - epsilon - share) * nll + share * smooth


class LoopAdam:
    """Adam with decoupled weight decay, one parameter after another."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.params, self.lr, self.weight_decay, self.steps = params, lr, weight_decay, 0
        self.first = [torch.zeros_like(p) for p in params]
        self.second = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, scale: float, max_norm: float) -> None:
        """Scale the gradients, clip them, and move."""
        grads = [p.grad for p in self.params if p.grad is not None]
        for g in grads:
            g.mul_(scale)
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        for g in grads:
            g.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        self.steps += 1
        size = self.lr * math.sqrt(1 - 0.98**self.steps) / (1 - 0.9**self.steps)
        for p, m, v in zip(self.params, self.first, self.second, strict=True):
            if p.grad is None:
                continue
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.98).addcmul_(p.grad, p.grad, value=0.02)
            p.mul_(1 - self.weight_decay * self.lr)
            p.addcdiv_(m, v.sqrt().add_(1e-8), value=-size)
            p.grad = None
