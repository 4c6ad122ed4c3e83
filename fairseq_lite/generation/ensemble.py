"""One or several models that predict the next token together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.incremental import (
    IncrementalDecoder,
    PrefixDecoder,
    incremental_decoder,
    language_model_decoder,
)
from fairseq_lite.generation.likelihood import average, log_probs_of, slice_rows
from fairseq_lite.models.api import Model


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

    def begin(
        self,
        tokens: Tensor,
        lengths: Tensor,
        targets: Tensor,
        *,
        beam: int,
        max_len: int,
        pad: int,
        temperature: float = 1.0,
    ) -> Beginning:
        """Read a prefix for each sentence with every model; all are language models.

        Args:
            tokens: (B, 1 + P), the start symbol, then the prefix, padded on the right.
            lengths: (B,), the start symbol included.
            targets: (B, P), the prefix in the output's vocabulary.
            beam: K.
            max_len: no more than this many steps plus one follow.
            pad: the padding symbol.
            temperature: divides the logits.
        """
        decoders, firsts, scores = [], [], []
        real = targets.ne(pad)
        for model in self.models:
            decoder = language_model_decoder(
                model, sentences=tokens.size(0), beam=beam, max_len=max_len, pad=pad
            )
            decoders.append(decoder)
            states = decoder.prefill(tokens, lengths)
            log_softmax = _log_softmax(model, decoder, temperature)
            last = (lengths - 1)[:, None, None].expand(-1, 1, states.size(2))
            firsts.append(log_softmax(states.gather(1, last)))
            rows = slice_rows(firsts[-1].size(2))
            scores.append(log_probs_of(states[:, :-1][real], targets[real], log_softmax, rows))
        each = torch.zeros_like(targets, dtype=torch.float32)
        return Beginning(
            EnsembleDecoder(self.models, decoders),
            average(firsts),
            each.masked_scatter_(real, average(scores)),
        )


def _log_softmax(
    model: Model, decoder: PrefixDecoder, temperature: float
) -> Callable[[Tensor], Tensor]:
    def compute(states: Tensor) -> Tensor:
        logits = decoder.project(states)
        if temperature != 1.0:
            logits = logits / temperature
        return model.get_normalized_probs((logits, {}), log_probs=True)

    return compute


class Beginning(NamedTuple):
    """Prefixes that were read, and what follows from them.

    Attributes:
        decoder: goes on behind them.
        first: (B, 1, V), log-probabilities of the token after each.
        log_probs: (B, P), of the prefix's own tokens; zero on padding.
    """

    decoder: EnsembleDecoder
    first: Tensor
    log_probs: Tensor


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


class FusedDecoder(EnsembleDecoder):
    """Adds a language model to every step (`--lm-path`): log p + weight x log p of the model.

    Args:
        decoder: what is added to.
        model: the language model.
        language_model: its decoder, which has read nothing yet.
        weight: what its log-probabilities are multiplied with.
    """

    def __init__(
        self,
        decoder: EnsembleDecoder,
        model: Model,
        language_model: IncrementalDecoder,
        weight: float,
    ) -> None:
        super().__init__([*decoder.models, model], [*decoder.decoders, language_model])
        self.decoder, self.model, self.language_model = decoder, model, language_model
        self.weight = weight

    def step(self, tokens: Tensor, parents: Tensor | None, temperature: float = 1.0) -> Tensor:
        """See `EnsembleDecoder.step`; no temperature for the language model, as in fairseq."""
        logits = self.language_model.step(tokens, parents)
        added = self.model.get_normalized_probs((logits, {}), log_probs=True)
        return self.decoder.step(tokens, parents, temperature) + self.weight * added
