"""One or several models that predict the next token together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.incremental import IncrementalDecoder, incremental_decoder
from fairseq_lite.models.api import Model


def average(log_probs: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of probabilities given as logarithms."""
    if len(log_probs) == 1:
        return log_probs[0]
    return torch.logsumexp(torch.stack(list(log_probs)), dim=0) - math.log(len(log_probs))


def teacher_forced(
    model: Model, src_tokens: Tensor, src_lengths: Tensor | None, prev: Tensor, *, attention: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, T, V) of every next token, and cross-attention (B, T, S) if asked for.

    Raises:
        ConfigError: the architecture cannot show its attention.
    """
    if not attention:
        out = model(src_tokens, src_lengths, prev)
        return model.get_normalized_probs(out, log_probs=True), None
    try:
        out = model(src_tokens, src_lengths, prev, need_alignment=True)
    except TypeError:
        out = (torch.empty(0), {})
    if out[1].get("attn") is None:
        raise ConfigError(
            f"{type(model).__name__} does not show its attention: leave out --print-alignment and"
            " --replace-unk"
        )
    return model.get_normalized_probs(out, log_probs=True), out[1]["attn"].float()


class Ensemble:
    """Models whose probabilities are averaged.

    Args:
        models: at least one; all predict the same vocabulary.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = list(models)

    def max_target_positions(self) -> int | None:
        """The shortest of the models' longest targets; None where there is no limit."""
        limits = []
        for model in self.models:
            limit = model.max_positions()
            limits.append(limit[-1] if isinstance(limit, (tuple, list)) else limit)
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    def start(
        self, src_tokens: Tensor, src_lengths: Tensor | None, *, beam: int, max_len: int
    ) -> EnsembleDecoder:
        """Encode a batch with every model."""
        return EnsembleDecoder(
            self.models,
            [
                incremental_decoder(m, src_tokens, src_lengths, beam=beam, max_len=max_len)
                for m in self.models
            ],
        )


class EnsembleDecoder:
    """The models' incremental decoders, side by side."""

    def __init__(self, models: Sequence[Model], decoders: Sequence[IncrementalDecoder]) -> None:
        self.models = models
        self.decoders = decoders

    def step(self, tokens: Tensor, parents: Tensor | None, temperature: float = 1.0) -> Tensor:
        """Append tokens; log-probabilities of the next, in fp32. See `IncrementalDecoder.step`."""
        parts = []
        for model, decoder in zip(self.models, self.decoders, strict=True):
            logits = decoder.step(tokens, parents)
            if temperature != 1.0:
                logits = logits / temperature
            parts.append(model.get_normalized_probs((logits, {}), log_probs=True))
        return average(parts)

    def keep(self, sentences: Tensor) -> None:
        """Go on with these sentences of the batch only."""
        for decoder in self.decoders:
            decoder.keep(sentences)
