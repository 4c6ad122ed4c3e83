"""Language models go on from a prefix: `flite-generate`, `flite-interactive`, `hub.sample`.

Prefixes of unequal length share a batch. They are read in one pass, padded on the right, and each
sentence then goes on behind its own; what it gives does not depend on its neighbours. Lengths count
the prefix, as in fairseq: an output has at most `max_len_a * source length + max_len_b` tokens, the
source length being its own here and that of the batch's longest there.

Axes: B sentences, P prefix positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.config.core import GenerationConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.generator import (
    Hypothesis,
    Prefixes,
    Search,
    SequenceGenerator,
    TargetVocabulary,
)
from fairseq_lite.models.api import Model

logger = logging.getLogger(__name__)


class ContinuationGenerator(SequenceGenerator):
    """Searches for the likeliest outputs that begin with a prefix, or samples some.

    Args:
        models: language models over the same dictionaries, in evaluation mode.
        tgt_dict: the target dictionary.
        cfg: the flags.
        start: the symbol every input begins with.
        seed: of sampling.

    Raises:
        ConfigError: flags that contradict each other or need a source.
    """

    def __init__(
        self,
        models: Sequence[Model],
        tgt_dict: TargetVocabulary,
        cfg: GenerationConfig | None = None,
        *,
        start: int,
        seed: int = 1,
    ) -> None:
        super().__init__(models, tgt_dict, cfg, seed=seed)
        self.start = start
        self.vocabulary = len(tgt_dict)
        self._warned = False
        for flag, on in (
            ("--match-source-len", self.cfg.match_source_len),
            ("--print-alignment", self.cfg.print_alignment is not None),
            ("--replace-unk", self.cfg.replace_unk is not None),
        ):
            if on:
                raise ConfigError(f"{flag}: a language model has no source; leave it out")

    @torch.inference_mode()
    def generate(
        self, sample: dict[str, Any], prefix_tokens: Tensor | None = None
    ) -> list[list[Hypothesis]]:
        """Continue prefixes.

        Args:
            sample: a batch as the task's dataset collates it, padded on the right.
            prefix_tokens: (B, P), what the outputs begin with, padded on the right; by default the
                sample's source without the start symbol.

        Returns:
            For each sentence its hypotheses, best first; the prefix is part of their tokens and
            scores. A prefix that holds the end symbol is its sentence's only hypothesis.
        """
        ids = sample["id"]
        # Rows beyond the examples only fill a batch up (--pad-to-fixed-bsz).
        source = sample["net_input"]["src_tokens"][: len(ids)]
        given = self._without_start(source) if prefix_tokens is None else prefix_tokens[: len(ids)]
        longest = self._longest(source)
        tokens, lengths, ended = self._cut(given, longest)
        targets = tokens.masked_fill(tokens >= self.vocabulary, self.unk)
        room = (longest - lengths).clamp(min=0)
        begun = self.ensemble.begin(
            torch.cat([torch.full_like(source[:, :1], self.start), tokens], dim=1),
            lengths + 1,
            targets,
            beam=self.beam,
            max_len=int(room.max()),
            pad=self.pad,
            temperature=self.cfg.temperature,
        )
        scores = begun.log_probs
        if self.cfg.unkpen:
            scores = scores - self.cfg.unkpen * targets.eq(self.unk)
        prefixes = Prefixes(tokens, lengths, scores, begun.first, room)
        results = self._ended(prefixes, ended)
        going = ended.logical_not().nonzero()[:, 0]
        if len(going):
            if len(going) < len(ended):
                begun.decoder.keep(going)
                prefixes = prefixes.of(going)
            self.strategy.begin(ids[going.to(ids.device)].tolist())
            lengths = source.ne(self.pad).sum(dim=1)[going]
            search = Search(
                self, begun.decoder, lengths, int(prefixes.room.max()), prefixes=prefixes
            )
            found = self._joined(search.finished_lists(), prefixes)
            results.update(zip(going.tolist(), found, strict=True))
        return [results[i] for i in range(len(source))]

    def _without_start(self, source: Tensor) -> Tensor:
        """The source, without its first symbol where that is the one every input begins with."""
        begins = source[:, :1].eq(self.start)
        if bool(begins.all()):
            return source[:, 1:]
        shifted = torch.cat([source[:, 1:], torch.full_like(source[:, :1], self.pad)], dim=1)
        return torch.where(begins, shifted, source)

    def _longest(self, source: Tensor) -> Tensor:
        """The greatest number of tokens (B,) an output may have before its end symbol.

        Raises:
            ConfigError: it is below --min-len.
        """
        lengths = source.ne(self.pad).sum(dim=1)
        longest = (self.cfg.max_len_a * lengths + self.cfg.max_len_b).long()
        limit = self.ensemble.max_target_positions()
        if limit is not None:
            longest = longest.clamp(max=limit - 1)
        self.check_min_len(int(longest.min()))
        return longest

    def _cut(self, prefix: Tensor, longest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prefixes (B, P) up to their end symbol or the longest length; lengths; who has ended."""
        lengths = prefix.ne(self.pad).sum(dim=1)
        places = prefix.eq(self.eos).cumsum(dim=1).eq(0).sum(dim=1) + 1
        # An end symbol may stand one place behind the longest output.
        ended = places <= torch.minimum(lengths, longest + 1)
        cut = torch.where(ended, places, torch.minimum(lengths, longest))
        if not self._warned and bool((cut < lengths)[~ended].any()):
            self._warned = True
            logger.warning(
                "a prefix is longer than an output may be and is cut: raise --max-len-b, which"
                " counts the prefix, as far as the model's longest input allows"
            )
        width = int(cut.max()) if len(cut) else 0
        behind = torch.arange(width, device=prefix.device) >= cut[:, None]
        return prefix[:, :width].masked_fill(behind, self.pad), cut, ended

    def _ended(self, prefixes: Prefixes, ended: Tensor) -> dict[int, list[Hypothesis]]:
        """The outputs of sentences whose prefix holds their end."""
        found = {}
        for i in ended.nonzero()[:, 0].tolist():
            n = int(prefixes.lengths[i])
            own = prefixes.log_probs[i, :n]
            score = own.sum() if self.cfg.unnormalized else own.sum() / n**self.cfg.lenpen
            tokens = prefixes.tokens[i, :n].cpu()
            found[i] = [Hypothesis(tokens, float(score), own.cpu())]
        return found

    def _joined(self, found: list[list[Hypothesis]], prefixes: Prefixes) -> list[list[Hypothesis]]:
        """What was searched for, behind its prefix."""
        tokens, scores = prefixes.tokens.cpu(), prefixes.log_probs.cpu()
        for i, (n, hypotheses) in enumerate(zip(prefixes.lengths.tolist(), found, strict=True)):
            for one in hypotheses:
                one.tokens = torch.cat([tokens[i, :n], one.tokens])
                one.positional_scores = torch.cat([scores[i, :n], one.positional_scores])
        return found
