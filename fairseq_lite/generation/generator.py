"""From a batch of sources to the best outputs of each: fairseq's search, step for step.

Each step offers 2K candidates a sentence, best first. Those among the first K that end are
finished hypotheses; the first K of the others go on. A sentence is done when K hypotheses have
finished, or at the longest length, where every beam is made to end.

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
from fairseq_lite.generation.ensemble import Ensemble
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
        run = _Search(self, src_tokens, src_lengths, prefix_tokens, max_len)
        return run.finished_lists()

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
        if limit is not None:
            max_len = min(max_len, limit - 1)
        if cfg.min_len > max_len:
            raise ConfigError(
                f"--min-len {cfg.min_len} is more than the longest output allowed, {max_len}: lower"
                " it, or raise --max-len-b"
            )
        return max_len


class _Search:
    """The state of one search. Rows are the sentences still going on, `self.rows` their numbers."""

    def __init__(
        self,
        owner: SequenceGenerator,
        src_tokens: Tensor,
        src_lengths: Tensor | None,
        prefix: Tensor | None,
        max_len: int,
    ) -> None:
        self.cfg, self.beam, self.strategy = owner.cfg, owner.beam, owner.strategy
        self.pad, self.unk, self.eos = owner.pad, owner.unk, owner.eos
        self.max_len = max_len
        self.prefix = prefix
        count, device = src_tokens.size(0), src_tokens.device
        self.decoder = owner.ensemble.start(
            src_tokens, src_lengths, beam=self.beam, max_len=max_len
        )
        self.source_length = src_tokens.ne(self.pad).sum(dim=1)
        self.rows = list(range(count))
        self.finished: list[list[Hypothesis]] = [[] for _ in range(count)]
        shape = (count, self.beam)
        self.tokens = torch.full((*shape, max_len + 2), self.pad, device=device)
        self.tokens[:, :, 0] = self.eos
        # scores[..., t]: cumulative log-probability up to and including the token chosen at step t
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
        # All beams begin alike: the first step is computed once a sentence.
        tokens = self.tokens[:, :, step] if step else self.tokens[:, :1, 0]
        logp = self.decoder.step(tokens, self.parents, self.cfg.temperature)
        logp = self._constrain(step, logp).expand(-1, self.beam, -1)
        before = self.scores[:, :, step - 1] if step else self.scores[:, :, 0]
        found = self.strategy.step(step == 0, logp, before)
        ends = found.tokens.eq(self.eos) & found.scores.ne(-math.inf)
        ends[:, : self.beam].masked_fill_(self.ignored, False)
        self._finish(step, found, ends)
        if step == self.max_len:
            self._give_up(step)
            return
        done = self._done(found, ends)
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
        if step == self.max_len:
            last = logp[..., self.eos].clone()
            logp.fill_(-math.inf)
            logp[..., self.eos] = last
            return logp
        forced = None
        if self.prefix is not None and step < self.prefix.size(1):
            forced = self._force(logp, self.prefix[:, step])
        elif step < self.cfg.min_len:
            logp[..., self.eos] = -math.inf
        if self.cfg.no_repeat_ngram_size > 0:
            self._ban_repeats(step, logp, forced)
        return logp

    def _force(self, logp: Tensor, wanted: Tensor) -> Tensor:
        """Leave only the prefix's token; returns which sentences (B,) still have one."""
        forced = wanted.ne(self.pad)
        index = wanted[:, None, None].expand(-1, logp.size(1), 1)
        only = torch.full_like(logp, -math.inf).scatter_(2, index, logp.gather(2, index))
        logp.copy_(torch.where(forced[:, None, None], only, logp))
        return forced

    def _ban_repeats(self, step: int, logp: Tensor, forced: Tensor | None) -> None:
        tokens, banned = search.repeated(
            self.tokens[:, :, 1 : step + 1], self.cfg.no_repeat_ngram_size
        )
        if not tokens.numel():
            return
        if forced is not None:
            banned = banned & ~forced[:, None, None]
        price = torch.zeros_like(logp[:, :, : tokens.size(2)]).masked_fill_(banned, -math.inf)
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
        if not self.cfg.unnormalized:
            totals = totals / (step + 1) ** self.cfg.lenpen
        if self.cfg.match_source_len:
            totals = totals.masked_fill(step > self.source_length[rows], -math.inf)
        tokens, positional = tokens.cpu(), positional.float().cpu()
        for i, (row, score) in enumerate(zip(rows.tolist(), totals.tolist(), strict=True)):
            self._store(row, Hypothesis(tokens[i].clone(), score, positional[i].clone()))

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
        if not self.cfg.unnormalized:
            best = best / (self.max_len + 1) ** self.cfg.lenpen
        hope = best.tolist()
        return {i for i in full if min(h.score for h in self.finished[self.rows[i]]) >= hope[i]}

    def _give_up(self, step: int) -> None:
        """At the longest length all is over; whoever has nothing gets its first beam."""
        for i, n in enumerate(self.rows):
            if not self.finished[n]:
                tokens = self.tokens[i, 0, 1 : step + 2].clone()
                tokens[step] = self.eos
                dead = torch.full((step + 1,), -math.inf)
                self.finished[n].append(Hypothesis(tokens.cpu(), -math.inf, dead))
        self.rows = []

    def _keep(self, chosen: Tensor) -> None:
        """Go on with these rows only."""
        self.decoder.keep(chosen)
        self.strategy.keep(chosen)
        self.tokens, self.scores = self.tokens[chosen], self.scores[chosen]
        self.ignored = self.ignored[chosen]
        self.source_length = self.source_length[chosen]
        if self.prefix is not None:
            self.prefix = self.prefix[chosen]

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
