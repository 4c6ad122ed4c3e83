"""Output projection, log-softmax and (label-smoothed) loss in one pass over chunks of tokens.

The plain path keeps logits, log-probabilities and their gradient for the whole batch, three times
tokens x vocabulary numbers. Here a chunk's gradient is made right after its loss, while its logits
are still at hand, so nothing of that size outlives the chunk (the idea of Liger and Apple's cut
cross entropy). The price: gradients are computed in the forward pass whenever they will be needed.

Axes: N tokens, V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits in one chunk. Fewer chunks add up the gradient of the projection fewer times; 64 MB in
# bf16.
CHUNK_NUMBERS = 1 << 25


class LossSums(NamedTuple):
    """Sums over the tokens that are not padding, in fp32.

    Attributes:
        loss: what to minimise; has the gradient.
        nll: negative log-likelihood, natural logarithm.
        correct: how often the most probable token is the target; 0 unless asked for.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor


def smoothing_weights(epsilon: float, vocabulary: int) -> tuple[float, float]:
    """(weight of the target's nll, weight of the sum over the vocabulary of -log p).

    fairseq spreads epsilon over the V - 1 *other* tokens: the target loses epsilon in all, the sum
    over all V tokens gives epsilon/(V-1) back to it.
    """
    share = epsilon / (vocabulary - 1)
    return 1.0 - epsilon - share, share


def smoothed_loss(
    logits: Tensor, target: Tensor, epsilon: float, padding_idx: int, count_correct: bool = False
) -> LossSums:
    """The plain computation, for any model.

    Args:
        logits: (N, V).
        target: (N,).
        epsilon: label smoothing; 0 for cross-entropy.
        padding_idx: targets that do not count.
        count_correct: also count correct predictions.
    """
    log_probs = F.log_softmax(logits.float(), dim=-1)
    nll = F.nll_loss(log_probs, target, ignore_index=padding_idx, reduction="sum")
    real = target.ne(padding_idx)
    loss = nll
    if epsilon > 0:
        on_target, on_all = smoothing_weights(epsilon, logits.size(-1))
        smooth = -(log_probs.sum(dim=-1) * real).sum()
        loss = on_target * nll + on_all * smooth
    correct = torch.zeros_like(nll)
    if count_correct:
        correct = (log_probs.argmax(dim=-1).eq(target) & real).sum().to(nll.dtype)
    return LossSums(loss, nll.detach(), correct)


def fused_smoothed_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    epsilon: float,
    padding_idx: int,
    count_correct: bool = False,
) -> LossSums:
    """`smoothed_loss(features @ weight.T, …)` without ever holding all logits.

    Under autocast the matrix products run in its lower precision, sums and softmax in fp32.

    Args:
        features: (N, D).
        weight: (V, D).
        target: (N,).
        epsilon: label smoothing; 0 for cross-entropy.
        padding_idx: targets that do not count.
        count_correct: also count correct predictions.
    """
    if _drops_padding(features):
        real = target.ne(padding_idx).nonzero()[:, 0]
        if len(real) < len(target):
            features, target = features.index_select(0, real), target.index_select(0, real)
    out: tuple[Tensor, Tensor, Tensor] = _Fused.apply(  # type: ignore[no-untyped-call]
        features, weight, target, epsilon, padding_idx, count_correct
    )
    return LossSums(*out)


def _drops_padding(x: Tensor) -> bool:
    """Whether padding is taken out first: it costs as much as a token.

    Not where finding it would have the host wait for the device.
    """
    return x.device.type == "cpu"


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        epsilon: float,
        padding_idx: int,
        count_correct: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = features.device.type
        dtype = features.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            work = _Chunks(weight.to(dtype), epsilon, padding_idx, count_correct)
            sums, grads = work.run(features, target, (ctx.needs_input_grad[0:2]))
        ctx.save_for_backward(*grads)
        ctx.dtypes = features.dtype, weight.dtype
        ctx.mark_non_differentiable(sums[1], sums[2])
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = (
            None if grad is None else (grad * grads[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*made, None, None, None, None)


class _Chunks:
    """The loss, chunk by chunk.

    With weights a on the target and b on all V tokens, a + V b = 1, so the gradient of a token's
    loss with respect to its logits is softmax - a [target] - b. The last term is the same for all
    tokens and all logits: its part of the gradients, and of the loss, comes from sums over V and
    over N, and never touches the logits.
    """

    def __init__(
        self, weight: Tensor, epsilon: float, padding_idx: int, count_correct: bool
    ) -> None:
        self.weight = weight
        self.padding_idx = padding_idx
        self.count_correct = count_correct
        self.on_target, self.on_all = smoothing_weights(epsilon, weight.size(0))
        self.smooth = epsilon > 0
        if not self.smooth:
            self.on_target, self.on_all = 1.0, 0.0
        self.sum_weight = weight.sum(dim=0, dtype=torch.float32)

    def run(
        self, features: Tensor, target: Tensor, needed: tuple[bool, bool]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        """The three sums, and the gradients of the first."""
        rows = max(64, CHUNK_NUMBERS // self.weight.size(0))
        count = max(1, math.ceil(features.size(0) / rows))
        nll, lse_sum, correct = features.new_zeros(3, dtype=torch.float32).unbind()
        grad_features = []
        grad_weight = None
        sum_features = torch.zeros_like(self.sum_weight)
        for x, y in zip(features.tensor_split(count), target.tensor_split(count), strict=True):
            x = x.to(self.weight.dtype)
            real = y.ne(self.padding_idx)
            grad, lse, at_target, hits = self._softmax(torch.mm(x, self.weight.t()), y)
            nll = nll + ((lse - at_target) * real).sum()
            lse_sum = lse_sum + (lse * real).sum()
            correct = correct + (hits & real).sum()
            if self.smooth:
                sum_features += (x * real[:, None].to(x.dtype)).sum(dim=0, dtype=torch.float32)
            if not any(needed):
                continue
            if not _drops_padding(x):
                grad.mul_(real[:, None])
            if needed[0]:
                grad_features.append(self._grad_features(grad, real))
            if needed[1]:
                part = torch.mm(grad.t(), x)
                grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
        loss = nll
        if self.smooth:
            smooth = lse_sum * self.weight.size(0) - sum_features.dot(self.sum_weight)
            loss = self.on_target * nll + self.on_all * smooth
            if grad_weight is not None:
                grad_weight.sub_((self.on_all * sum_features).to(grad_weight.dtype))
        made = torch.cat(grad_features) if needed[0] else None
        return (loss, nll.clone(), correct), (made, grad_weight)

    def _softmax(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """softmax - a [target], log-sum-exp, the target's logit, and whether it is the greatest."""
        index = y[:, None]
        top = logits.amax(dim=-1)
        at_target = logits.gather(1, index)[:, 0]
        hits = at_target == top
        if self.count_correct:
            hits = logits.argmax(dim=-1) == y
        # One kernel, fp32 inside. The greatest probability is the one known best, so the
        # log-sum-exp is taken from it; in bf16 its rounding is far below that of the logits
        # themselves.
        probs = torch.softmax(logits, dim=-1)
        lse = top.float() - probs.amax(dim=-1).float().log()
        minus = (probs.gather(1, index)[:, 0].float() - self.on_target).to(probs.dtype)
        # Not scatter_, which copies the whole chunk on a CPU.
        probs.index_put_((torch.arange(len(y), device=y.device), y), minus)
        return probs, lse, at_target.float(), hits

    def _grad_features(self, grad: Tensor, real: Tensor) -> Tensor:
        made = torch.mm(grad, self.weight)
        if self.smooth:
            share = (self.on_all * self.sum_weight).to(made.dtype)
            made.sub_(share * real[:, None])
        return made
