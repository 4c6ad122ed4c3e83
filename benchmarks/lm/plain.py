"""A GPT and its training loop as a careful user writes them today, in plain PyTorch.

One matrix for query, key and value, `scaled_dot_product_attention(is_causal=True)`, one matrix for
embeddings and output, `F.cross_entropy`, bf16 autocast, fused AdamW, clipping at norm 1: nothing
that costs time and could be left out. It is the yardstick of `run.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import wait


@dataclass(frozen=True)
class Shape:
    """The size of the model and of a batch.

    Attributes:
        length: tokens in a block.
        batch: blocks in a batch.
    """

    vocabulary: int = 10_000
    width: int = 512
    layers: int = 8
    heads: int = 8
    length: int = 256
    batch: int = 16

    @property
    def parameters(self) -> int:
        """Elements of the matrices that a token is multiplied with; positions are not."""
        return 12 * self.layers * self.width**2 + self.vocabulary * self.width

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward: 6 a parameter, and attention over half a block on average."""
        return 6.0 * self.parameters + 6.0 * self.layers * self.length * self.width


@dataclass(frozen=True)
class Mode:
    """How to compute.

    Attributes:
        bf16: autocast to bfloat16.
        compile: through torch.compile.
        device: "cpu" or "cuda".
    """

    bf16: bool = False
    compile: bool = False
    device: str = "cpu"


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.fc1 = nn.Linear(shape.width, 4 * shape.width)
        self.fc2 = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class GPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.scale = math.sqrt(shape.width)
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.length, shape.width))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        nn.init.normal_(self.embed.weight, std=shape.width**-0.5)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """The mean loss of predicting `target` (B, T) from `tokens` (B, T)."""
        x = self.scale * self.embed(tokens) + self.positions[: tokens.size(1)]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def work(shape: Shape, mode: Mode, updates: int) -> Callable[[], float]:
    """A function that trains for so many updates and returns tokens a second."""
    torch.manual_seed(1)
    device = torch.device(mode.device)
    model = GPT(shape).to(device)
    forward = torch.compile(model) if mode.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = (8, shape.batch, shape.length + 1)
    texts = torch.randint(4, shape.vocabulary, size, device=device)

    def update(text: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=mode.bf16):
            loss = forward(text[:, :-1], text[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(lambda i: update(texts[i % len(texts)]), shape, mode, updates)


def timed(
    update: Callable[[int], object], shape: Shape, mode: Mode, updates: int
) -> Callable[[], float]:
    """Tokens a second of `updates` calls of `update`; the first time some more, to warm up."""
    count = 0

    def go(times: int) -> None:
        nonlocal count
        for _ in range(times):
            update(count)
            count += 1
        wait(mode.device)

    def run() -> float:
        if count == 0:
            go(3)
        start = time.perf_counter()
        go(updates)
        return updates * shape.batch * shape.length / (time.perf_counter() - start)

    return run
