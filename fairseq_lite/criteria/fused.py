"""Output projection, log-softmax and (label-smoothed) loss in one pass over chunks of tokens.

The plain path keeps logits, log-probabilities and their gradient for the whole batch, three times
tokens x vocabulary numbers. Here a chunk's gradient is made right after its loss, while its logits are
still at hand, so nothing of that size outlives the chunk (the idea of Liger and Apple's cut cross
entropy). The price: gradients are computed in the forward pass whenever they will be needed.

Axes: N tokens, V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Numbers in one chunk of logits: 16 MB in fp32, around the size of a last-level cache.
CHUNK_NUMBERS = 1 << 22


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

    fairseq spreads epsilon over the V - 1 *other* tokens: the target loses epsilon in all, the sum over
    all V tokens gives epsilon/(V-1) back to it.
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
    out: tuple[Tensor, Tensor, Tensor] = _Fused.apply(  # type: ignore[no-untyped-call]
        features, weight, target, epsilon, padding_idx, count_correct
    )
    return LossSums(*out)


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
        grad_features = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            sums = _over_chunks(
                features,
                weight.to(dtype),
                target,
                (epsilon, padding_idx, count_correct),
                grad_features,
                grad_weight,
            )
        ctx.save_for_backward(grad_features, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(sums[1], sums[2])
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad_features, grad_weight = ctx.saved_tensors
        if grad_features is not None:
            grad_features = grad_features * scale
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_features, grad_weight, None, None, None, None


def _over_chunks(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    how: tuple[float, int, bool],
    grad_features: Tensor | None,
    grad_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    epsilon, padding_idx, count_correct = how
    on_target, on_all = smoothing_weights(epsilon, weight.size(0))
    zero = torch.zeros((), dtype=torch.float32, device=features.device)
    nll_sum, smooth_sum, correct = zero.clone(), zero.clone(), zero.clone()
    rows = max(64, CHUNK_NUMBERS // weight.size(0))
    count = math.ceil(features.size(0) / rows)
    for x, y, slot in zip(
        features.tensor_split(count),
        target.tensor_split(count),
        grad_features.tensor_split(count) if grad_features is not None else (None,) * count,
        strict=True,
    ):
        x = x.to(weight.dtype)
        logits = torch.mm(x, weight.t()).float()
        lse = torch.logsumexp(logits, dim=-1)
        real = y.ne(padding_idx)
        index = y[:, None]
        nll_sum += ((lse - logits.gather(1, index)[:, 0]) * real).sum()
        if epsilon > 0:
            smooth_sum += ((lse * weight.size(0) - logits.sum(dim=-1)) * real).sum()
        if count_correct:
            correct += (logits.argmax(dim=-1).eq(y) & real).sum()
        if slot is None and grad_weight is None:
            continue
        # d loss / d logits = (on_target + V on_all) softmax - on_target [target] - on_all, and the
        # first factor is 1 for any smoothing; 0 on padding.
        grad = logits.sub_(lse[:, None]).exp_()
        grad.mul_(on_target + weight.size(0) * on_all)
        if epsilon > 0:
            grad.sub_(on_all)
        grad.scatter_add_(1, index, grad.new_full((), -on_target).expand(index.shape))
        grad = grad.mul_(real[:, None]).to(weight.dtype)
        if slot is not None:
            slot.copy_(torch.mm(grad, weight))
        if grad_weight is not None:
            grad_weight += torch.mm(grad.t(), x)
    loss = on_target * nll_sum + on_all * smooth_sum if epsilon > 0 else nll_sum.clone()
    return loss, nll_sum, correct
