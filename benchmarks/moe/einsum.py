"""The dispatch of GShard (Lepikhin et al. 2020), written plainly: products with one-hot tensors.

Every expert has C places, and what goes where is a tensor of S x E x C numbers, almost all of them
zero. It is the yardstick for what sorting saves.

Axes: S tokens, E experts, C places of an expert, M width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EinsumMoE(nn.Module):
    """A mixture of experts.

    Args:
        gate: M to E logits, without bias.
        experts: E of them.
        top_k: 1 or 2.
        factor: an expert has factor * ceil(S / E) places.
    """

    def __init__(
        self, gate: nn.Linear, experts: list[nn.Module], top_k: int, factor: float
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        self.top_k = top_k
        self.factor = factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(S, M) -> (S, M), and the balance loss."""
        count = len(self.experts)
        places = int(self.factor * math.ceil(x.size(0) / count))
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)
        rest, masks = probs, []
        for _ in range(self.top_k):
            masks.append(F.one_hot(rest.argmax(dim=-1), count).float())
            rest = rest.masked_fill(masks[-1].bool(), -math.inf)
        balance = count * (probs.mean(0) * masks[0].mean(0)).sum()
        taken = torch.zeros(count, device=x.device)
        kept, slots = [], []
        for mask in masks:
            before = mask.cumsum(0) - mask + taken
            taken = taken + mask.sum(0)
            kept.append(mask * (before < places))
            slots.append((before * kept[-1]).sum(1).long())
        gates = torch.stack([(probs * mask).sum(1) for mask in kept], dim=1)
        if self.top_k == 2:
            gates = gates / gates.sum(1, keepdim=True).clamp_min(1e-9)
        combine = torch.stack(
            [
                torch.einsum("s,se,sc->sec", gates[:, k], kept[k], F.one_hot(slot, places).float())
                for k, slot in enumerate(slots)
            ]
        ).sum(0)
        inputs = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
        done = torch.stack(
            [expert(part) for expert, part in zip(self.experts, inputs, strict=True)]
        )
        return torch.einsum("sec,ecm->sm", combine.to(done.dtype), done), balance
