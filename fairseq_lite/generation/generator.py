"""From a batch of sources to the best outputs of each: fairseq's search, step for step.

Each step offers 2K candidates a sentence, best first. Those among the first K that end are
finished hypotheses; the first K of the others go on. A sentence is done when K hypotheses have
finished, or at the longest length, where every beam is made to end.

A translation may be made to begin with given tokens, step by step. A language model continues a
prefix that it has read before the first step (`Prefixes`), each sentence its own.

Axes: B sentences, K beams, V vocabulary, C candidates, T steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fairseq_lite.config.core import GenerationConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation import search
from fairseq_lite.generation.ensemble import Ensemble, EnsembleDecoder, FusedDecoder
from fairseq_lite.generation.incremental import language_model_decoder
from fairseq_lite.models.api import Model


class TargetVocabulary(Protocol):
    """What generation needs to know of the target dictionary."""

    def __len__(self) -> int: ...
    def __contains__(self, symbol: object) -> bool: ...
    def index(self, symbol: str) -> int:
        """The id of a symbol."""
        ...

    def pad(self) -> int:
        """The id of the padding symbol."""
        ...

    def eos(self) -> int:
        """The id of the symbol that ends a sentence."""
        ...

    def unk(self) -> int:
        """The id of unknown words."""
        ...


@dataclasses.dataclass
class Hypothesis:
    """One output.

    Attributes:
        tokens: (T,), the end symbol included, on the CPU.
        score: log-probability (natural), divided by length ** lenpen unless unnormalised.
        positional_scores: (T,), log-probability of each token, fp32 on the CPU.
        attention: (T, S) over the source with its padding, where asked for.
    """

    tokens: Tensor
    score: float
    positional_scores: Tensor
    attention: Tensor | None = None


def make_strategy(cfg: GenerationConfig, seed: int = 1) -> search.Strategy:
    """The strategy the flags ask for.

    Raises:
        ConfigError: two strategies at once.
    """
    asked = {
        "--sampling": cfg.sampling,
        "--diverse-beam-groups": cfg.diverse_beam_groups > 0,
        "--diversity-rate": cfg.diversity_rate > -1,
        "--match-source-len": cfg.match_source_len,
    }
    chosen = [flag for flag, on in asked.items() if on]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are different ways to search: choose one")
    if cfg.sampling:
        return search.Sampling(cfg.sampling_topk, cfg.sampling_topp, seed)
    if cfg.diverse_beam_groups > 0:
        return search.DiverseBeamSearch(cfg.diverse_beam_groups, cfg.diverse_beam_strength)
    if cfg.diversity_rate > -1:
        return search.DiverseSiblingsSearch(cfg.diversity_rate)
    return search.BeamSearch()


@dataclasses.dataclass
class Prefixes:
    """What the outputs of each sentence begin with, read before the search.

    Attributes:
        tokens: (B, P), padded on the right.
        lengths: (B,).
        log_probs: (B, P), fp32; zero on padding.
        first: (B, 1, V), log-probabilities of the token after the prefix.
        room: (B,), how many tokens may follow before the end symbol.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    first: Tensor
    room: Tensor

    def of(self, rows: Tensor) -> Prefixes:
        """Those of some sentences."""
        return Prefixes(*(value[rows] for value in vars(self).values()))


class SequenceGenerator:
    """Searches for the outputs a model, or several together, find likeliest.

    Args:
        models: encoder-decoders over the same dictionaries, in evaluation mode.
        tgt_dict: the target dictionary.
        cfg: the flags.
        seed: of sampling.

    Raises:
        ConfigError: flags that contradict each other, or an unknown --eos-token.
    """

    def __init__(
        self,
        models: Sequence[Model],
        tgt_dict: TargetVocabulary,
        cfg: GenerationConfig | None = None,
        *,
        seed: int = 1,
    ) -> None:
        self.cfg = cfg = GenerationConfig() if cfg is None else cfg
        self.ensemble = Ensemble(models)
        self.pad, self.unk, self.eos = tgt_dict.pad(), tgt_dict.unk(), tgt_dict.eos()
        if cfg.eos_token is not None:
            if cfg.eos_token not in tgt_dict:
                raise ConfigError(
                    f"--eos-token {cfg.eos_token}: not in the target dictionary; type one of its"
                    " symbols"
                )
            self.eos = tgt_dict.index(cfg.eos_token)
        # Padding is never chosen, so there are no more different first tokens than this.
        self.beam = min(cfg.beam, len(tgt_dict) - 1)
        self.strategy = make_strategy(cfg, seed)
        self._fused: tuple[Model, float] | None = None
        if cfg.lm_path is not None:
            raise ConfigError(
                "lm_path: flite-generate and flite-interactive add a language model, with"
                " --lm-path; here it cannot be added"
            )

    def fuse(self, language_model: Model, weight: float) -> None:
        """Add a language model's log-probabilities, times `weight`, at every step.

        Args:
            language_model: over the target dictionary, in evaluation mode.
            weight: `--lm-weight`.
        """
        self._fused = language_model, weight

    @property
    def ignored_symbols(self) -> set[int]:
        """What is left out when an output is printed, besides what always is."""
        return {self.eos}

    @torch.inference_mode()
    def generate(
        self, sample: dict[str, Any], prefix_tokens: Tensor | None = None
    ) -> list[list[Hypothesis]]:
        """Search.

        Args:
            sample: a batch as the task's dataset collates it.
            prefix_tokens: (B, P), what every output must begin with; padded on the right.

        Returns:
            For each sentence its hypotheses, best first: --beam of them, or fewer where the model
            leaves no more.
        """
        net_input = sample["net_input"]
        src_tokens, src_lengths = net_input["src_tokens"], net_input.get("src_lengths")
        ids = sample.get("id")
        self.strategy.begin(range(len(src_tokens)) if ids is None else ids.tolist())
        max_len = self.longest(src_tokens)
        decoder = self.ensemble.start(src_tokens, src_lengths, beam=self.beam, max_len=max_len)
        if self._fused is not None:
            decoder = self._with_language_model(decoder, len(src_tokens), max_len)
        lengths = src_tokens.ne(self.pad).sum(dim=1)
        return Search(self, decoder, lengths, max_len, forced=prefix_tokens).finished_lists()

    def _with_language_model(
        self, decoder: EnsembleDecoder, sentences: int, max_len: int
    ) -> FusedDecoder:
        assert self._fused is not None
        model, weight = self._fused
        own = language_model_decoder(
            model, sentences=sentences, beam=self.beam, max_len=max_len, pad=self.pad
        )
        return FusedDecoder(decoder, model, own, weight)

    def longest(self, src_tokens: Tensor) -> int:
        """The greatest number of tokens an output may have before its end symbol.

        Raises:
            ConfigError: it is below --min-len.
        """
        cfg = self.cfg
        # With `a` this depends on the longest source of the batch, as in fairseq.
        if cfg.match_source_len:
            max_len = int(src_tokens.ne(self.pad).sum(dim=1).max())
        else:
            max_len = int(cfg.max_len_a * src_tokens.size(1) + cfg.max_len_b)
        limit = self.ensemble.max_target_positions()
        if self._fused is not None:
            limit = min(limit or max_len + 1, self._fused[0].max_positions())
        if limit is not None:
            max_len = min(max_len, limit - 1)
        self.check_min_len(max_len)
        return max_len

    def check_min_len(self, max_len: int) -> None:
        """Refuse a --min-len above the longest output.

        Raises:
            ConfigError: it is.
        """
        if self.cfg.min_len > max_len:
            raise ConfigError(
                f"--min-len {self.cfg.min_len} is more than the longest output allowed, {max_len}:"
                " lower it, or raise --max-len-b"
            )


class Search:
    """The state of one search. Rows are the sentences still going on, `self.rows` their numbers.

    Args:
        owner: the flags.
        decoder: has read the sources, or the prefixes.
        source_lengths: (B,).
        max_len: the greatest number of tokens that are searched for, the end symbol left out.
        forced: (B, P), what every output must begin with; padded on the right.
        prefixes: what every output begins with and `decoder` has read.
    """

    def __init__(
        self,
        owner: SequenceGenerator,
        decoder: EnsembleDecoder,
        source_lengths: Tensor,
        max_len: int,
        *,
        forced: Tensor | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.cfg, self.beam, self.strategy = owner.cfg, owner.beam, owner.strategy
        self.pad, self.unk, self.eos = owner.pad, owner.unk, owner.eos
        self.decoder, self.max_len, self.forced = decoder, max_len, forced
        self.source_length = source_lengths
        count, device = len(source_lengths), source_lengths.device
        self.rows = list(range(count))
        self.finished: list[list[Hypothesis]] = [[] for _ in range(count)]
        self.prefixes = prefixes
        shape = (count, self.beam)
        self.tokens = torch.full((*shape, max_len + 2), self.pad, device=device)
        self.tokens[:, :, 0] = self.eos
        # scores[..., t]: cumulative log-probability of the tokens chosen up to and including step t
        self.scores = torch.zeros(*shape, max_len + 1, device=device)
        self.ignored = torch.zeros(shape, dtype=torch.bool, device=device)
        self.parents: Tensor | None = None

    def finished_lists(self) -> list[list[Hypothesis]]:
        """Run to the end."""
        for step in range(self.max_len + 1):
            self._step(step)
            if not self.rows:
                break
        for hypotheses in self.finished:
            hypotheses.sort(key=lambda h: h.score, reverse=True)
        return self.finished

    def _step(self, step: int) -> None:
        before = self.scores[:, :, step - 1] if step else self.scores[:, :, 0]
        logp = self._constrain(step, self._next(step)).expand(-1, self.beam, -1)
        found = self.strategy.step(step == 0, logp, before)
        ends = found.tokens.eq(self.eos) & found.scores.ne(-math.inf)
        ends[:, : self.beam].masked_fill_(self.ignored, False)
        self._finish(step, found, ends)
        over = self._over(step)
        self._give_up(step, over)
        done = self._done(found, ends).union(over)
        if done:
            kept = [i for i in range(len(self.rows)) if i not in done]
            self.rows = [self.rows[i] for i in kept]
            if not kept:
                return
            chosen = torch.tensor(kept, device=ends.device)
            found = search.Candidates(*(each[chosen] for each in found))
            ends = ends[chosen]
            self._keep(chosen)
        self._advance(step, found, ends)

    def _next(self, step: int) -> Tensor:
        """Log-probabilities of the next token; all beams begin alike, so at first (B, 1, V)."""
        if step == 0 and self.prefixes is not None:
            return self.prefixes.first
        tokens = self.tokens[:, :, step] if step else self.tokens[:, :1, 0]
        return self.decoder.step(tokens, self.parents, self.cfg.temperature)

    def _over(self, step: int) -> list[int]:
        """Rows that are at their longest length, where they must end."""
        if self.prefixes is None:
            return list(range(len(self.rows))) if step == self.max_len else []
        return self.prefixes.room.eq(step).nonzero()[:, 0].tolist()  # type: ignore[no-any-return]

    def _constrain(self, step: int, logp: Tensor) -> Tensor:
        """Apply everything that forbids, forces or prices tokens; may write into `logp`."""
        # One NaN or infinite logit makes a whole row NaN: no token of that beam can be chosen.
        broken = logp[..., 0].isnan()
        if bool(broken.any()):
            logp.masked_fill_(broken[..., None], -math.inf)
        logp[..., self.pad] = -math.inf
        if self.cfg.unkpen:
            logp[..., self.unk] -= self.cfg.unkpen
        if self.cfg.match_source_len:
            # The end is forbidden before the source's length, and free from there on.
            early = (step < self.source_length)[:, None]
            logp[..., self.eos] = torch.zeros_like(logp[..., 0]).masked_fill_(early, -math.inf)
        over = self._over(step)
        if over:
            last = logp[over, :, self.eos]
            logp[over] = -math.inf
            logp[over, :, self.eos] = last
            if len(over) == len(self.rows):
                return logp
        forced = None
        if self.forced is not None and step < self.forced.size(1):
            forced = self._force(logp, self.forced[:, step])
        self._forbid_early_ends(step, logp, forced)
        if self.cfg.no_repeat_ngram_size > 0:
            self._ban_repeats(step, logp, forced)
        return logp

    def _forbid_early_ends(self, step: int, logp: Tensor, forced: Tensor | None) -> None:
        """No end below --min-len, but where a prefix has it."""
        if self.prefixes is not None:
            early = self.prefixes.lengths + step < self.cfg.min_len
        elif step < self.cfg.min_len:
            early = torch.ones_like(logp[:, 0, 0], dtype=torch.bool)
        else:
            return
        if forced is not None:
            early = early & ~forced
        logp[..., self.eos] = logp[..., self.eos].masked_fill(early[:, None], -math.inf)

    def _force(self, logp: Tensor, wanted: Tensor) -> Tensor:
        """Leave only the prefix's token; returns which sentences (B,) still have one."""
        forced = wanted.ne(self.pad)
        index = wanted[:, None, None].expand(-1, logp.size(1), 1)
        only = torch.full_like(logp, -math.inf).scatter_(2, index, logp.gather(2, index))
        logp.copy_(torch.where(forced[:, None, None], only, logp))
        return forced

    def _ban_repeats(self, step: int, logp: Tensor, forced: Tensor | None) -> None:
        past = self.tokens[:, :, 1 : step + 1]
        if self.prefixes is not None:
            shown = _right_aligned(self.prefixes.tokens, self.prefixes.lengths, self.pad)
            past = torch.cat([shown[:, None].expand(-1, self.beam, -1), past], dim=2)
        size = self.cfg.no_repeat_ngram_size
        tokens, banned = search.repeated(past[:, : logp.size(1)], size)
        if not tokens.numel():
            return
        if forced is not None:
            banned = banned & ~forced[:, None, None]
        # Padding before a short prefix is no n-gram.
        tail = past[:, : logp.size(1), past.size(2) - size + 1 :]
        banned = banned & tail.ne(self.pad).all(dim=2, keepdim=True)
        banned = banned & tokens.ne(self.pad)
        price = torch.zeros_like(logp[:, :, :1]).expand_as(banned).masked_fill(banned, -math.inf)
        logp.scatter_add_(2, tokens, price)

    def _finish(self, step: int, found: search.Candidates, ends: Tensor) -> None:
        """Store the hypotheses that end among the first K candidates."""
        rows, places = ends[:, : self.beam].nonzero(as_tuple=True)
        if not len(rows):
            return
        beams = found.beams[rows, places]
        tokens = self.tokens[rows, beams, 1 : step + 2]
        tokens[:, step] = self.eos
        positional = self.scores[rows, beams, : step + 1]
        totals = found.scores[rows, places]
        positional[:, step] = totals
        positional[:, 1:] = positional[:, 1:] - positional[:, :-1]
        totals = self._normalised(totals, rows, step)
        if self.cfg.match_source_len:
            totals = totals.masked_fill(step > self.source_length[rows], -math.inf)
        tokens, positional = tokens.cpu(), positional.float().cpu()
        for i, (row, score) in enumerate(zip(rows.tolist(), totals.tolist(), strict=True)):
            self._store(row, Hypothesis(tokens[i].clone(), score, positional[i].clone()))

    def _normalised(self, totals: Tensor, rows: Tensor, step: int | Tensor) -> Tensor:
        """Scores of outputs that end at this step; `rows` (N,) says whose they are."""
        length = step + 1
        if self.prefixes is not None:
            totals = totals + self.prefixes.log_probs[rows].sum(dim=1)
            length = length + self.prefixes.lengths[rows]
        return totals if self.cfg.unnormalized else totals / length**self.cfg.lenpen

    def _store(self, row: int, hypothesis: Hypothesis) -> None:
        own = self.finished[self.rows[row]]
        if len(own) < self.beam:
            own.append(hypothesis)
        elif self.cfg.no_early_stop:
            worst = min(range(len(own)), key=lambda i: own[i].score)
            if hypothesis.score > own[worst].score:
                own[worst] = hypothesis

    def _done(self, found: search.Candidates, ends: Tensor) -> set[int]:
        """Rows that need no more search."""
        best = found.scores.masked_fill(ends, -math.inf).amax(dim=1)
        # Nothing can go on from a prefix that ended its sentence.
        dead = best.eq(-math.inf).tolist()
        counts = [len(self.finished[n]) for n in self.rows]
        full = {i for i, c in enumerate(counts) if c >= self.beam or (c and dead[i])}
        if not full or not self.cfg.no_early_stop:
            return full
        # Go on while the best prefix could still beat the worst hypothesis. Scores only fall as a
        # prefix grows; dividing by the greatest length is the most it can gain.
        last = self.max_len if self.prefixes is None else self.prefixes.room
        rows = torch.arange(len(best), device=best.device)
        hope = self._normalised(best, rows, last).tolist()
        return {i for i in full if min(h.score for h in self.finished[self.rows[i]]) >= hope[i]}

    def _give_up(self, step: int, over: list[int]) -> None:
        """Who has nothing at the longest length gets its first beam."""
        for i in over:
            if not self.finished[self.rows[i]]:
                tokens = self.tokens[i, 0, 1 : step + 2].clone()
                tokens[step] = self.eos
                dead = torch.full((step + 1,), -math.inf)
                self._store(i, Hypothesis(tokens.cpu(), -math.inf, dead))

    def _keep(self, chosen: Tensor) -> None:
        """Go on with these rows only."""
        self.decoder.keep(chosen)
        self.strategy.keep(chosen)
        self.tokens, self.scores = self.tokens[chosen], self.scores[chosen]
        self.ignored = self.ignored[chosen]
        self.source_length = self.source_length[chosen]
        if self.forced is not None:
            self.forced = self.forced[chosen]
        if self.prefixes is not None:
            self.prefixes = self.prefixes.of(chosen)

    def _advance(self, step: int, found: search.Candidates, ends: Tensor) -> None:
        """Let the first K candidates that did not end be the new beams."""
        passed = ends.clone()
        passed[:, : self.beam] |= self.ignored
        count = passed.size(1)
        order = passed * count + torch.arange(count, device=passed.device)
        rank, active = order.topk(self.beam, dim=1, largest=False)
        # Fewer than K may be left: the places after them hold what has ended, and are ignored.
        self.ignored = rank >= count
        beams = found.beams.gather(1, active)
        index = beams[..., None]
        done = step + 1
        self.tokens[:, :, :done] = self.tokens[:, :, :done].gather(1, index.expand(-1, -1, done))
        self.tokens[:, :, done] = found.tokens.gather(1, active)
        if step:
            self.scores[:, :, :step] = self.scores[:, :, :step].gather(
                1, index.expand(-1, -1, step)
            )
        self.scores[:, :, step] = found.scores.gather(1, active)
        self.parents = beams


def _right_aligned(tokens: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """(B, P) padded on the right, as (B, P) padded on the left."""
    width = tokens.size(1)
    places = torch.arange(width, device=tokens.device) - (width - lengths)[:, None]
    return tokens.gather(1, places.clamp(min=0)).masked_fill(places < 0, pad)
