"""Which experts a token goes to, with what weight, and who is turned away.

Top-1 (Fedus et al. 2021) and top-2 (Lepikhin et al. 2020) routing with fairseq's rules. Axes: S
tokens, E experts, K choices of a token, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lite.moe.options import RouterOptions


class RouterReport(NamedTuple):
    """What a layer says of one batch, beside its output.

    Attributes:
        balance: E * sum over experts of (mean probability) * (share of first choices); 1 when
            balanced, with gradient (0-dim).
        z: mean over tokens of logsumexp(logits)^2 (Zoph et al. 2022, eq. 5), with gradient (0-dim).
        load: (E,) rows that each expert computes for this rank's tokens, dropped ones not counted.
        wanted: (K, E) how often each expert was the first, the second choice, before dropping.
        dropped: (K,) how many first, second choices were dropped.
        tokens: how many tokens were routed (0-dim).
        entropy: sum over tokens of the entropy of the gate's probabilities, in nats (0-dim).
    """

    balance: Tensor
    z: Tensor
    load: Tensor
    wanted: Tensor
    dropped: Tensor
    tokens: Tensor
    entropy: Tensor


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        experts: (S, K).
        weights: (S, K) float32, with gradient; zero where not kept.
        kept: (S, K); None when every choice is kept.
        report: what to say of it.
    """

    experts: Tensor
    weights: Tensor
    kept: Tensor | None
    report: RouterReport


class Router(nn.Module):
    """The gate: a linear map to E logits, and the rules of choice.

    Args:
        dim: D.
        options: the rules.
    """

    def __init__(self, dim: int, options: RouterOptions) -> None:
        super().__init__()
        self.options = options
        self.wg = nn.Linear(dim, options.num_experts, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        """(S, D) -> (S, E) float32."""
        if self.options.jitter and self.training:
            low, high = 1.0 - self.options.jitter, 1.0 + self.options.jitter
            x = x * torch.empty_like(x).uniform_(low, high)
        if not self.options.gate_fp32:
            return self.wg(x).float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.wg.weight.float())

    def capacity(self, tokens: int) -> int | None:
        """How many of a rank's tokens an expert takes; None: as many as come."""
        cfg = self.options
        fraction = cfg.eval_capacity_fraction
        if not self.training and (fraction is None or fraction >= 0):
            return None if fraction is None else math.ceil(fraction * tokens)
        if cfg.capacity_factor is None:
            return None
        return int(cfg.capacity_factor * math.ceil(tokens / cfg.num_experts))

    def forward(self, x: Tensor, routed: Tensor | None = None) -> Routing:
        """Route a batch.

        Args:
            x: (S, D).
            routed: (S,) False for tokens that go nowhere; None when all go.
        """
        cfg = self.options
        logits = self.logits(x)
        probs = F.softmax(logits, dim=-1)
        experts = self._choose(logits, probs)
        chosen = probs.gather(1, experts)
        weights = chosen
        if cfg.top_k == 2 and cfg.normalize_before_dropping:
            weights = _normalised(chosen)
        kept: Tensor | None = None
        if routed is not None:
            kept = routed[:, None].expand_as(experts).clone()
        if cfg.top_k == 2 and cfg.second_policy == "random" and self.training:
            kept = torch.ones_like(experts, dtype=torch.bool) if kept is None else kept
            kept[:, 1] &= torch.rand_like(weights[:, 1]) < 2 * weights[:, 1]
        wanted = _count(experts, kept, cfg.num_experts)
        capacity = self.capacity(x.size(0))
        before = kept
        if capacity is not None:
            kept = self._within(experts, kept, probs, capacity)
        if kept is not None:
            weights = weights * kept
        if cfg.top_k == 2 and not cfg.normalize_before_dropping:
            weights = _normalised(weights)
        report = self._report(logits, probs, experts, wanted, before, kept, routed)
        return Routing(experts, weights, kept, report)

    def _choose(self, logits: Tensor, probs: Tensor) -> Tensor:
        first = probs.argmax(dim=-1, keepdim=True)
        if self.options.top_k == 1:
            return first
        others = logits.detach()
        if self.training and self.options.second_policy == "sampling":
            noise = torch.empty_like(others).exponential_().log_().neg_()  # Gumbel(0, 1)
            others = others + noise
        second = others.scatter(1, first, -math.inf).argmax(dim=-1, keepdim=True)
        return torch.cat([first, second], dim=1)

    def _within(self, experts: Tensor, kept: Tensor | None, probs: Tensor, capacity: int) -> Tensor:
        """Which choices find a place; all first choices queue before all second ones."""
        tokens, choices = experts.shape
        queue = torch.arange(tokens, device=experts.device)
        if self.options.prioritized:
            queue = probs.detach().amax(dim=-1).argsort(descending=True, stable=True)
        hits = F.one_hot(experts.index_select(0, queue), self.options.num_experts)  # (S, K, E)
        if kept is not None:
            hits = hits * kept.index_select(0, queue)[..., None]
        in_line = hits.transpose(0, 1).reshape(choices * tokens, -1)  # by choice, then by token
        before = in_line.cumsum(0) - in_line
        fits = ((before < capacity) & in_line.bool()).any(dim=-1).view(choices, tokens).t()
        result = torch.empty_like(fits)
        result[queue] = fits
        return result

    def _report(
        self,
        logits: Tensor,
        probs: Tensor,
        experts: Tensor,
        wanted: Tensor,
        before: Tensor | None,
        kept: Tensor | None,
        routed: Tensor | None,
    ) -> RouterReport:
        count, size = self.options.num_experts, max(experts.size(0), 1)
        balance = count * (probs.sum(0) / size * (wanted[0] / size)).sum()
        z = logits.logsumexp(dim=-1).square().sum() / size
        with torch.no_grad():
            load = _count(experts, kept, count).sum(0)
            asked = experts.new_tensor([experts.size(0)] * experts.size(1))
            if before is not None:
                asked = before.sum(0)
            held = asked if kept is before else kept.sum(0) if kept is not None else asked
            entropies = -(probs * probs.clamp_min(1e-30).log()).sum(-1)
            if routed is not None:
                entropies = entropies * routed
            tokens = asked[0].clone()
        return RouterReport(balance, z, load, wanted, asked - held, tokens, entropies.sum())


def _normalised(weights: Tensor) -> Tensor:
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.clamp_min(torch.finfo(weights.dtype).eps)


def _count(experts: Tensor, kept: Tensor | None, count: int) -> Tensor:
    """(K, E): how often each expert is the first, second choice."""
    hits = torch.zeros(experts.size(1), count, dtype=torch.int64, device=experts.device)
    ones = torch.ones_like(experts) if kept is None else kept.long()
    return hits.scatter_add_(1, experts.t(), ones.t())
