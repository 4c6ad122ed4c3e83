"""Which experts a token goes to, with what weight, and who is turned away.

Top-1 (Fedus et al. 2021) and top-2 (Lepikhin et al. 2020) routing with fairseq's rules:

    p = softmax(W x)                          the gate's probabilities, in float32
    first = argmax p                          second = argmax of the rest; in training with noise
    weight of first, second = p_first, p_second   of two, divided by their sum
    C = int(factor * ceil(S / E))             rows that an expert takes at most, where it has a
                                              capacity; ceil(fraction * S) in evaluation

Choices queue at their expert: all first ones before all second ones, tokens by their position or,
batch-prioritised (Riquelme et al. 2021), by their greatest probability. Those that find C before
them are dropped. In evaluation nothing is drawn, and without a capacity a token's way depends on
that token alone.

Axes: S tokens, E experts, K choices of a token, D width, N choices that are kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fairseq_lite.errors import ConfigError
from fairseq_lite.moe.options import RouterOptions
from fairseq_lite.moe.products import compute_dtype


class RouterReport(NamedTuple):
    """What a layer says of one batch, beside its output.

    Attributes:
        balance: E * sum over experts of (mean probability) * (share of first choices); 1 when
            balanced, with gradient (0-dim). As in fairseq and DeepSpeed both are shares of all S
            tokens, masked ones included, which have a probability and no choice.
        z: mean over routed tokens of logsumexp(logits)^2 (Zoph et al. 2022, eq. 5), with gradient
            (0-dim).
        load: (E,) rows that each expert computes for this rank's tokens, dropped ones not counted.
        wanted: (K, E) how often each expert was the first, the second choice, before dropping.
        dropped: (K,) how many first, second choices were dropped.
        tokens: how many tokens were routed (0-dim).
        entropy: sum over routed tokens of the entropy of the gate's probabilities, in nats (0-dim).
        probability: (E,) sum over routed tokens of the gate's probabilities.
    """

    balance: Tensor
    z: Tensor
    load: Tensor
    wanted: Tensor
    dropped: Tensor
    tokens: Tensor
    entropy: Tensor
    probability: Tensor


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        experts: (S, K).
        weights: (S, K) float32, with gradient; zero where not kept.
        kept: (S, K); None when every choice is kept.
        order: (N,) the kept choices by expert, and as they queue there; a choice is the number
            token * K + (0 for the first, 1 for the second).
        report: what to say of it.
    """

    experts: Tensor
    weights: Tensor
    kept: Tensor | None
    order: Tensor
    report: RouterReport


class Router(nn.Module):
    """The gate: a linear map to E logits, and the rules of choice.

    Args:
        dim: D.
        options: the rules.

    Raises:
        ConfigError: fewer experts than a token is to go to.
    """

    def __init__(self, dim: int, options: RouterOptions) -> None:
        super().__init__()
        if options.num_experts < options.top_k:
            raise ConfigError(
                f"a token cannot go to {options.top_k} of {options.num_experts} experts: use more "
                "experts (--moe-expert-count), or --moe-top1-expert"
            )
        self.options = options
        self.wg = nn.Linear(dim, options.num_experts, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        """(S, D) -> (S, E), in float32 or wider."""
        cfg = self.options
        wide = torch.promote_types(x.dtype, torch.float32)
        if cfg.jitter and self.training:
            # 16 bits would know a few factors only.
            noise = torch.empty_like(x, dtype=wide).uniform_(1.0 - cfg.jitter, 1.0 + cfg.jitter)
            x = (x * noise).to(wide if cfg.gate_fp32 else x.dtype)
        dtype = wide if cfg.gate_fp32 else compute_dtype(x)
        logits: Tensor = _Logits.apply(x, self.wg.weight, dtype)  # type: ignore[no-untyped-call]
        return logits.to(wide)

    def capacity(self, tokens: int) -> int | None:
        """How many of a rank's tokens an expert takes.

        Args:
            tokens: S, padding included.

        Returns:
            C; None: as many as come.
        """
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
        weights = probs.gather(1, experts)
        if cfg.top_k == 2 and cfg.normalize_before_dropping:
            weights = _normalised(weights)
        willing: Tensor | None = None  # (S, K): choices that queue
        if routed is not None:
            willing = routed[:, None].expand_as(experts)
        if cfg.top_k == 2 and cfg.second_policy == "random" and self.training:
            luck = torch.rand_like(weights[:, 1]) < 2.0 * weights[:, 1]
            luck = torch.stack([torch.ones_like(luck), luck], dim=1)
            willing = luck if willing is None else willing & luck
        order, kept = self._serve(experts, willing, probs, self.capacity(x.size(0)))
        if kept is not None:
            weights = weights * kept
        if cfg.top_k == 2 and not cfg.normalize_before_dropping:
            weights = _normalised(weights)
        report = self._report(logits, probs, experts, willing, kept, routed)
        return Routing(experts, weights, kept, order, report)

    def _choose(self, logits: Tensor, probs: Tensor) -> Tensor:
        """(S, K) the experts of each token; of equals the one with the lowest number."""
        first = probs.argmax(dim=-1, keepdim=True)
        if self.options.top_k == 1:
            return first
        others = logits.detach()
        if self.training and self.options.second_policy == "sampling":
            noise = torch.empty_like(others).exponential_().log_().neg_()  # Gumbel(0, 1)
            others = others + noise
        second = others.scatter(1, first, -math.inf).argmax(dim=-1, keepdim=True)
        return torch.cat([first, second], dim=1)

    def _queue(self, probs: Tensor) -> Tensor | None:
        """(S,) the tokens in the order in which they queue; None: as they stand."""
        if not self.options.prioritized:
            return None
        return probs.detach().amax(dim=-1).argsort(descending=True, stable=True)

    def _serve(
        self, experts: Tensor, willing: Tensor | None, probs: Tensor, capacity: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Let choices queue at their experts.

        Args:
            experts: (S, K).
            willing: (S, K) which of them do; None: all.
            probs: (S, E).
            capacity: C.

        Returns:
            `Routing`'s `order` and `kept`.
        """
        tokens, choices = experts.shape
        count = self.options.num_experts
        goal = experts if willing is None else experts.masked_fill(~willing, count)
        line = None  # which choice stands where; None: choice 0, choice 1, …
        if capacity is not None:
            queue = self._queue(probs)
            if queue is None:
                queue = torch.arange(tokens, device=experts.device)
            line = (queue * choices + torch.arange(choices, device=queue.device)[:, None]).flatten()
        goal = goal.flatten() if line is None else goal.flatten().index_select(0, line)
        goal, order = goal.sort(stable=True)
        if line is None:
            if willing is not None:  # those who do not queue have come last
                order = order[: int(willing.sum())]
            return order, willing
        assert capacity is not None
        order = line.index_select(0, order)
        before = torch.arange(tokens * choices, device=goal.device) - torch.searchsorted(goal, goal)
        fits = (before < capacity) & (goal < count)
        kept = torch.empty_like(fits)
        kept[order] = fits
        return order[fits], kept.view(tokens, choices)

    def _report(
        self,
        logits: Tensor,
        probs: Tensor,
        experts: Tensor,
        willing: Tensor | None,
        kept: Tensor | None,
        routed: Tensor | None,
    ) -> RouterReport:
        size = max(experts.size(0), 1)
        logsum = logits.logsumexp(dim=-1)
        with torch.no_grad():
            wanted = self._count(experts, willing)
            load = (wanted if kept is willing else self._count(experts, kept)).sum(0)
            asked = wanted.sum(1)
            dropped = torch.zeros_like(asked)
            if kept is not None and kept is not willing:
                dropped = asked - kept.sum(0)
            entropies = logsum - (probs * logits).sum(-1)
            real = probs
            if routed is not None:
                entropies = entropies * routed
                real = probs * routed[:, None]
        squares = logsum.square()
        routed_tokens = asked[0].clone()
        if routed is None:
            z = squares.sum() / size
        else:
            z = (squares * routed).sum() / routed_tokens.clamp_min(1)
        count = self.options.num_experts
        balance = count * (probs.sum(0) / size * (wanted[0] / size)).sum()
        return RouterReport(
            balance=balance,
            z=z,
            load=load,
            wanted=wanted,
            dropped=dropped,
            tokens=routed_tokens,
            entropy=entropies.sum(),
            probability=real.sum(0).detach(),
        )

    def _count(self, experts: Tensor, which: Tensor | None) -> Tensor:
        """(K, E): how often each expert is the first, the second of the choices asked for."""
        hits = experts.new_zeros(experts.size(1), self.options.num_experts)
        ones = torch.ones_like(experts) if which is None else which.long()
        return hits.scatter_add_(1, experts.t(), ones.t())


class _Logits(torch.autograd.Function):
    """x Wᵀ in a type of its own.

    It keeps x as it came and not a copy in that type, and has the weight's gradient computed as
    Gᵀ x: that of a linear layer is xᵀ G, which for as few columns as there are experts takes a CPU
    six times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        with torch.autocast(x.device.type, enabled=False):
            return torch.mm(x.to(dtype), weight.to(dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(ctx.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight.to(ctx.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mm(grad.t(), x.to(ctx.dtype)).to(weight.dtype)
        return grad_x, grad_weight, None


def _normalised(weights: Tensor) -> Tensor:
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.clamp_min(torch.finfo(weights.dtype).eps)
