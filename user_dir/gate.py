"""DeepSpeed's rules of routing, as our router follows them.

Axes: S tokens, E experts, K choices of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_lite.moe.router import Router

from .options import GateOptions


class Gate(Router):
    """Top-1 and top-2 gating with DeepSpeed's capacity, noise and choice of tokens.

    Without noise it gives what DeepSpeed's gate gives, to rounding, but for one thing: which tokens
    a full expert turns away in top-1. DeepSpeed leaves that to torch.topk's order of equal numbers;
    here those that come last go.
    """

    options: GateOptions

    def capacity(self, tokens: int) -> int | None:
        """max(min_capacity, ceil(S / E * factor * K)); None: as many as come."""
        cfg = self.options
        factor = cfg.capacity_factor if self.training else cfg.eval_capacity_factor
        if factor is None:
            return None
        # In float32, as there: rounding decides at whole numbers.
        most = torch.ceil(tokens / cfg.num_experts * torch.tensor(factor * cfg.top_k))
        return max(int(most), cfg.min_capacity)

    def _choose(self, logits: Tensor, probs: Tensor) -> Tensor:
        if not (self.options.rsample and self.training):
            return super()._choose(logits, probs)
        noise = torch.empty_like(logits).exponential_().log_().neg_()  # Gumbel(0, 1)
        return (logits.detach() + noise).argmax(dim=-1, keepdim=True)

    def _queue(self, probs: Tensor) -> Tensor | None:
        if not (self.options.random_tokens and self.training):
            return super()._queue(probs)
        return torch.randperm(probs.size(0), device=probs.device)
