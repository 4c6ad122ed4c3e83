"""Small parts of a stack: weights with fairseq's initialisation, positions, activations.

Each part draws its own weights in `reset_parameters`, so a model can be built on the meta device
and filled in later, part by part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as run_again_in_backward


class XavierLinear(nn.Linear):
    """A linear layer with Xavier-uniform weights.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        gain: factor on the bound.
        zero_bias: start the bias at zero; otherwise torch's default, U(±1/sqrt(in_features)).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gain: float = 1.0,
        zero_bias: bool = True,
    ) -> None:
        self.gain = gain
        self.zero_bias = zero_bias
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight, gain=self.gain)
        if self.bias is not None and self.zero_bias:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Token embeddings: N(0, 1/sqrt(width)), the padding row zero."""

    def __init__(self, num: int, width: int, padding_idx: int) -> None:
        super().__init__(num, width, padding_idx=padding_idx)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self._fill_padding_idx_with_zero()


class OutputProjection(nn.Linear):
    """Features to logits, without bias: N(0, 1/sqrt(width)), or the embedding's own matrix."""

    def __init__(self, width: int, num: int, tied_to: nn.Embedding | None = None) -> None:
        self.tied = False
        super().__init__(width, num, bias=False)
        if tied_to is not None:
            self.tie(tied_to)

    def tie(self, embedding: nn.Embedding) -> None:
        """Use the embedding's matrix from now on."""
        self.tied = True
        self.weight = embedding.weight

    def reset_parameters(self) -> None:
        # A tied matrix is drawn by its embedding, whose padding row must stay zero.
        if not self.tied:
            nn.init.normal_(self.weight, std=self.in_features**-0.5)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation whose output has the dtype of its input; sums are in fp32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if x.device.type == "cpu" and x.dtype == torch.float32 != self.weight.dtype:
            # Weights gathered in 16 bits by a sharded backend; torch's kernel wants them as wide.
            weight, bias = self.weight.float(), self.bias.float()
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        if x.device.type == "cpu" or x.dtype != torch.bfloat16:
            return super().forward(x)
        # Autocast would widen to fp32 here, and every following addition with it.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def to_compute_dtype(x: Tensor) -> Tensor:
    """Under bf16 autocast, `x` in bf16, so that states stay narrow between the matrix products too.

    This is what fairseq's `--bf16` computes in; autocast alone would keep the residual stream in
    fp32 and cast it before each product.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return x.to(torch.bfloat16)
    return x


def positions_of(tokens: Tensor, padding_idx: int) -> Tensor:
    """Position numbers (B, T): padding_idx + 1, + 2, … over real tokens, padding_idx elsewhere."""
    real = tokens.ne(padding_idx)
    return real.cumsum(dim=1).mul_(real) + padding_idx


class LearnedPositions(nn.Embedding):
    """One trained vector a position; row padding_idx stays zero."""

    def __init__(self, max_positions: int, width: int, padding_idx: int) -> None:
        self.max_positions = max_positions
        super().__init__(max_positions + padding_idx + 1, width, padding_idx=padding_idx)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self._fill_padding_idx_with_zero()

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) position numbers to (B, T, D)."""
        return super().forward(positions)


class SinusoidalPositions(nn.Module):
    """Sines then cosines of the position (Vaswani et al. 2017, section 3.5).

    In tensor2tensor's layout: the first half of the width holds sines, the second cosines, of
    position * 10000^(-i / (D/2 - 1)). The table is computed, so it is not part of a checkpoint; it
    grows when a longer input comes.
    """

    weights: Tensor

    def __init__(self, max_positions: int, width: int, padding_idx: int) -> None:
        super().__init__()
        self.width = width
        self.padding_idx = padding_idx
        rows = max_positions + padding_idx + 1
        self.register_buffer("weights", self._table(rows), persistent=False)

    def _table(self, rows: int, device: torch.device | None = None) -> Tensor:
        half = self.width // 2
        step = math.log(10000) / max(half - 1, 1)
        frequencies = torch.exp(torch.arange(half, dtype=torch.float, device=device) * -step)
        angles = torch.arange(rows, dtype=torch.float, device=device)[:, None] * frequencies
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        table = F.pad(table, (0, self.width - 2 * half))
        table[self.padding_idx] = 0
        return table

    def reset_parameters(self) -> None:
        self.weights = self._table(self.weights.size(0), self.weights.device)

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) position numbers to (B, T, D)."""
        # The greatest number possible follows from the shape: nothing waits for the device.
        needed = positions.size(1) + self.padding_idx + 1
        if needed > self.weights.size(0):
            self.weights = self._table(needed, self.weights.device).to(self.weights.dtype)
        return F.embedding(positions, self.weights)


Positions = LearnedPositions | SinusoidalPositions


def make_positions(max_positions: int, width: int, padding_idx: int, learned: bool) -> Positions:
    """Learned or sinusoidal positions."""
    kind = LearnedPositions if learned else SinusoidalPositions
    return kind(max_positions, width, padding_idx)


def gelu_accurate(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), in the input's precision."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_fast": gelu_accurate,
    "gelu_accurate": gelu_accurate,
    "linear": lambda x: x,
    "tanh": torch.tanh,
}


def kept_layers(layers: nn.ModuleList, layerdrop: float, training: bool) -> Iterator[nn.Module]:
    """The layers to run now: in training each is left out with probability `layerdrop`.

    All decisions are drawn at once and first, so they do not depend on the size of the batch.
    Layers of experts always run: ranks draw each for itself, and have to meet in those.
    """
    if layerdrop <= 0.0 or not training:
        yield from layers
        return
    draws = torch.rand(len(layers)).tolist()
    for layer, draw in zip(layers, draws, strict=True):
        if draw > layerdrop or getattr(layer, "moe_layer", None) is not None:
            yield layer


def run_layer(layer: nn.Module, *args: Any, checkpoint: bool, offload: bool, **kwargs: Any) -> Any:
    """Call a layer; with `checkpoint` keep only its input and run it again in the backward pass.

    With `offload`, the inputs kept wait in host memory.
    """
    if not (checkpoint and torch.is_grad_enabled()):
        return layer(*args, **kwargs)
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
        return run_again_in_backward(layer, *args, use_reentrant=False, **kwargs)
