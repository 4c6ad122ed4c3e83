"""A language model without a command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairseq_lite.config.core import CommonConfig, GenerationConfig
from fairseq_lite.data.prompts import PromptDataset
from fairseq_lite.data.text.api import build_codecs
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.branch_plan import Unit, shared_length
from fairseq_lite.generation.branches import (
    Branches,
    BranchReader,
    BranchScores,
    Numbers,
    Pick,
    Ranked,
    collect,
    pick_ranks,
    pick_scores,
    scores_of,
)
from fairseq_lite.generation.continuation import ContinuationGenerator
from fairseq_lite.generation.evaluate import Output, Texts, Translated
from fairseq_lite.generation.likelihood import TargetScorer
from fairseq_lite.generation.session import DEFAULT_MAX_TOKENS, Session, place
from fairseq_lite.hub.options import generation_config
from fairseq_lite.hub.ranks import Ranks
from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.tasks.api import to_device
from fairseq_lite.tasks.language_modeling import LanguageModelingTask
from fairseq_lite.training.checkpoint.inference import Ensemble

# Tokens read at a time where nothing else is said: on a CPU more are no faster.
_TOKENS_ON_CPU = 4000

# Tokens of the first round of outputs that a string may end; each later one is twice as long.
_FIRST_ROUND = 32

# Options of generation that count prompts, or ask for more than the best continuation of one.
_USELESS = {"max_len_a", "max_len_b", "min_len", "nbest", "prefix_size", "score_reference"}


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """How likely a language model finds a text.

    Attributes:
        text: as it was given.
        tokens: the symbols that were scored.
        log_probs: the log-probability of each, natural.
    """

    text: str
    tokens: list[str]
    log_probs: list[float]

    @property
    def total(self) -> float:
        """The log-probability of the text, natural."""
        return math.fsum(self.log_probs)

    @property
    def perplexity(self) -> float:
        """Of a token; NaN where there is none."""
        return math.exp(-self.total / len(self.tokens)) if self.tokens else math.nan


class LanguageModel:
    """A trained language model, or an ensemble of several.

    Args:
        ensemble: what `load_models` returned.
        common: device and precision: `cpu`, `bf16`, `fp16`, `seed`.
        world: the ranks that loaded it together; None: this process alone. With several, every
            rank calls every method with the same arguments; they share the work, and every rank
            gets all results.
    """

    def __init__(
        self, ensemble: Ensemble, common: CommonConfig, world: World | None = None
    ) -> None:
        task, saved = ensemble.task, ensemble.configs[0]
        assert isinstance(task, LanguageModelingTask)
        self._ensemble, self._task = ensemble, task
        self.dictionary = task.source_dictionary
        device = None if world is None else world.device
        self.device = place(ensemble.models, common, GenerationConfig(), device)
        self._ranks = Ranks(SingleWorld() if world is None else world, ensemble.models)
        self._encode, self._decode = build_codecs(saved.tokenizer, saved.bpe)
        self._scorer = TargetScorer(ensemble.models, self.dictionary.pad())
        self._reader = BranchReader(ensemble.models, self.dictionary.pad())
        self._limit = min(model.max_positions() for model in ensemble.models)

    @property
    def models(self) -> list[Any]:
        """The PyTorch modules, in evaluation mode."""
        return list(self._ensemble.models)

    @property
    def segmentation(self) -> list[str]:
        """The names of what splits texts: a tokenizer, a subword model, as far as it has them."""
        saved = self._ensemble.configs[0]
        return [each.name for each in (saved.tokenizer, saved.bpe) if each.name is not None]

    @property
    def max_tokens(self) -> int:
        """The most tokens a text may have, its prompt included; one goes to the start symbol."""
        return int(self._limit) - 1

    @overload
    def score(  # type: ignore[overload-overlap]
        self,
        text: str,
        prompt: str | None = None,
        *,
        end: bool = False,
        start: str | int | None = None,
    ) -> ScoredText: ...

    @overload
    def score(
        self,
        text: Sequence[str],
        prompt: str | Sequence[str] | None = None,
        *,
        end: bool = False,
        start: str | int | None = None,
    ) -> list[ScoredText]: ...

    def score(
        self,
        text: str | Sequence[str],
        prompt: str | Sequence[str] | None = None,
        *,
        end: bool = False,
        start: str | int | None = None,
    ) -> ScoredText | list[ScoredText]:
        """Score raw text: one, or several at once.

        With a prompt, the text is scored behind it: what counts are the tokens of prompt and text
        together that the prompt alone does not begin with. Nothing is put between the two.

        Args:
            text: a text or a list of them, not segmented.
            prompt: what the text comes behind and is not scored: one for all, or one for each.
            end: score the end of the text too.
            start: the symbol texts begin with, where the model knows several, as `"<de>"`.

        Returns:
            Scores in the order of the texts; one for one string.

        Raises:
            ConfigError: a text is longer than the model takes, or there are not as many prompts.
        """
        texts = [text] if isinstance(text, str) else list(text)
        prompts = [prompt] * len(texts) if prompt is None or isinstance(prompt, str) else prompt
        if len(prompts) != len(texts):
            raise ConfigError(f"score(): {len(texts)} texts and {len(prompts)} prompts")
        ids = [self.encode((p or "") + t) for t, p in zip(texts, prompts, strict=True)]
        skips = [
            0 if not p else shared_length(self.encode(p), whole)
            for p, whole in zip(prompts, ids, strict=True)
        ]
        found = [
            ScoredText(t, [self.dictionary[i] for i in tokens], scores)
            for t, (tokens, scores) in zip(
                texts, self.score_tokens(ids, skips, end=end, start=start), strict=True
            )
        ]
        return found[0] if isinstance(text, str) else found

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of a text, without an end symbol."""
        return self.dictionary.encode_line(self._encode(text), append_eos=False)

    @torch.inference_mode()
    def score_tokens(
        self,
        sequences: Sequence[npt.NDArray[np.int64]],
        skips: Sequence[int] | None = None,
        *,
        end: bool = False,
        start: str | int | None = None,
    ) -> list[tuple[list[int], list[float]]]:
        """Score sequences of ids, in batches by length.

        Args:
            sequences: without start and end symbols.
            skips: how many tokens of each are read and not scored.
            end: score the end symbol too.
            start: see `score`.

        Returns:
            For each sequence the tokens that were scored and their log-probabilities.

        Raises:
            ConfigError: one is longer than the model takes.
        """
        for i, ids in enumerate(sequences):
            self._check_length(i, len(ids))
        pad = self.dictionary.pad()
        dataset = PromptDataset(
            sequences,
            start=self.start_token(start),
            end=self.dictionary.eos() if end else pad,
            pad=pad,
        )

        def score(batch: Sequence[int]) -> dict[int, tuple[list[int], list[float]]]:
            sample = dataset.collate(batch)
            target = self._targets(sample["target"])
            for row, i in enumerate(sample["id"].tolist()):
                target[row, : 0 if skips is None else skips[i]] = pad
            inputs = to_device(sample["net_input"], self.device)
            scores = self._scorer.score(inputs, target.to(self.device)).cpu()
            found = {}
            for row, i in enumerate(sample["id"].tolist()):
                real = target[row].ne(pad)
                found[i] = (sample["target"][row][real].tolist(), scores[row][real].tolist())
            return found

        return self._ranks.batches(dataset, score)

    def _targets(self, target: Tensor) -> Tensor:
        """What the models can predict: a smaller vocabulary knows the rest as unknown."""
        known = self._task.target_dictionary
        return target.masked_fill(target >= len(known), known.unk())

    @torch.inference_mode()
    def score_branches(
        self,
        requests: Sequence[Branches],
        *,
        context_scores: bool = False,
        max_tokens: int | None = None,
        start: str | int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[BranchScores]:
        """Score continuations of contexts; what they begin with in common is computed once.

        That is each context for all its continuations, and what many contexts begin with, as the
        examples of few-shot prompts. Scores depend neither on the order of requests nor on
        `max_tokens`; but for mixtures of experts that drop tokens, see docs/moe.md.

        Args:
            requests: contexts, each with its continuations.
            context_scores: score the tokens of the contexts, too.
            max_tokens: computed at a time; a single request may have more.
            start: see `score`.
            progress: called with how many requests are done so far; of several ranks with this
                one's, and with all in the end.

        Returns:
            Scores in the order of the requests.

        Raises:
            ConfigError: a continuation and its context are longer than the model takes.
        """
        for i, request in enumerate(requests):
            longest = max(map(len, request.continuations), default=0)
            self._check_branch(i, len(request.context), longest)
        units, places = collect(requests, self.start_token(start), context_scores=context_scores)
        pick = pick_scores(*self._predicted())
        log_probs, greedy = self._read(units, pick, max_tokens, progress)
        if progress is not None and self._ranks.world.size > 1:
            progress(len(requests))
        return [scores_of(each, log_probs, greedy) for each in places]

    @torch.inference_mode()
    def rank_tokens(
        self,
        contexts: Sequence[npt.NDArray[np.int64]],
        wanted: Sequence[int],
        *,
        top: int = 10,
        among: Sequence[int] | None = None,
        max_tokens: int | None = None,
        start: str | int | None = None,
    ) -> list[Ranked]:
        """Where tokens stand among all that could follow contexts.

        Args:
            contexts: ids without start symbol.
            wanted: a token for each.
            top: how many of the likeliest to name.
            among: the tokens that count, as candidates for an answer; None: the whole dictionary.
                A wanted one need not be among them. Probabilities are of all in any case.
            max_tokens: see `score_branches`.
            start: see `score`.

        Returns:
            Ranks in the order of the contexts.

        Raises:
            ConfigError: a context is longer than the model takes, there are not as many wanted
                tokens, or nothing is asked for.
        """
        if len(contexts) != len(wanted):
            raise ConfigError(f"rank_tokens(): {len(contexts)} contexts, {len(wanted)} tokens")
        if top < 1 or (among is not None and not len(among)):
            raise ConfigError(f"rank_tokens(): top={top} among {among}: expected at least one")
        for i, context in enumerate(contexts):
            self._check_branch(i, len(context), 1)
        requests = [
            Branches(context, (np.array([token], dtype=np.int64),))
            for context, token in zip(contexts, wanted, strict=True)
        ]
        units, places = collect(requests, self.start_token(start))
        counted = None if among is None else torch.tensor(sorted(set(among)), device=self.device)
        pick = pick_ranks(*self._predicted(), top=top, among=counted)
        log_probs, ranks, best = self._read(units, pick, max_tokens)
        rows = [each.continuations[0].start for each in places]
        return [Ranked(int(ranks[i]), float(log_probs[i]), tuple(best[i].tolist())) for i in rows]

    def _read(
        self,
        units: Sequence[Unit],
        pick: Pick,
        max_tokens: int | None,
        progress: Callable[[int], None] | None = None,
    ) -> Numbers:
        """What all ranks find out about units."""
        if max_tokens is None:
            max_tokens = _TOKENS_ON_CPU if self.device.type == "cpu" else DEFAULT_MAX_TOKENS
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: expected 1 or more")
        return self._ranks.units(
            units,
            lambda part: self._reader.read(part, pick, max_tokens=max_tokens, progress=progress),
        )

    def _predicted(self) -> tuple[int, int]:
        """How many tokens can be predicted, and what the others are scored as."""
        return len(self._task.target_dictionary), self._task.target_dictionary.unk()

    def start_token(self, symbol: str | int | None = None) -> int:
        """The id of the symbol that a text begins with.

        Args:
            symbol: another than the model's own, or its id.

        Raises:
            ConfigError: it is not in the dictionary.
        """
        if symbol is None:
            return self._task.first_token
        if isinstance(symbol, int):
            known, index = 0 <= symbol < len(self.dictionary), symbol
        else:
            known, index = symbol in self.dictionary, self.dictionary.index(symbol)
        if not known:
            raise ConfigError(f"start={symbol!r}: not in the model's dictionary")
        return index

    def _check_branch(self, number: int, context: int, continuation: int) -> None:
        # The last token is predicted and never read: there is room for one more than in a text.
        if context + continuation > self._limit:
            raise ConfigError(
                f"request {number} has {context} tokens of context and {continuation} behind it;"
                f" the model takes {self._limit} together: cut the context"
            )

    @overload
    def sample(
        self,
        text: str,
        *,
        echo: bool = True,
        seed: int | None = None,
        start: str | int | None = None,
        **options: Any,
    ) -> str: ...

    @overload
    def sample(
        self,
        text: Sequence[str],
        *,
        echo: bool = True,
        seed: int | None = None,
        start: str | int | None = None,
        **options: Any,
    ) -> list[str]: ...

    def sample(
        self,
        text: str | Sequence[str],
        *,
        echo: bool = True,
        seed: int | None = None,
        start: str | int | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Go on from raw text: one prefix, or several at once.

        Args:
            text: a prefix or a list of them, not segmented; an empty one begins a text.
            echo: return the prefix as well, as fairseq does; otherwise what comes behind it.
            seed: of sampling; each prefix draws from its own stream.
            start: see `score`.
            options: fields of `GenerationConfig`: beam (1 by default), sampling, sampling_topk,
                sampling_topp, temperature, max_len_b (which counts the prefix), …

        Returns:
            The best output for each prefix, detokenised; one string for one string.

        Raises:
            ConfigError: an option that does not exist or contradicts another, or a prefix that
                leaves no room.
        """
        lines = [text] if isinstance(text, str) else list(text)
        records = self.records(lines, seed=seed, start=start, **options)
        found = [record.outputs[0].detokenised for record in records]
        if not echo:
            found = [
                self._behind(line, record.outputs[0])
                for line, record in zip(lines, records, strict=True)
            ]
        return found[0] if isinstance(text, str) else found

    def records(
        self,
        lines: Sequence[str],
        *,
        seed: int | None = None,
        start: str | int | None = None,
        **options: Any,
    ) -> list[Translated]:
        """As `sample`, with scores and every output (`nbest`); scores count the prefix."""
        cfg = generation_config({"beam": 1, **options}, "sample")
        if cfg.prefix_size or cfg.score_reference:
            raise ConfigError("sample(): prefix_size and score_reference need references")
        prompts = [self.encode(line) for line in lines]
        for i, ids in enumerate(prompts):
            self._check_length(i, len(ids))
            longest = int(cfg.max_len_a * (len(ids) + 1) + cfg.max_len_b)
            if len(ids) >= longest:
                raise ConfigError(
                    f"text {i} has {len(ids)} tokens and leaves no room: max_len_b={cfg.max_len_b}"
                    " counts them too; raise it"
                )
        generator, dataset = self._going_on(prompts, cfg, seed, start)
        texts = Texts(self.dictionary, self.dictionary, decode=self._decode)
        session = Session(generator, self._ensemble.models, texts, cfg, device=self.device)

        def generate(batch: Sequence[int]) -> dict[int, Translated]:
            return {one.id: one for one in session.translate(dataset.collate(batch))}

        return self._ranks.batches(dataset, generate)

    def complete(
        self,
        prompts: Sequence[npt.NDArray[np.int64]],
        *,
        until: Sequence[str] = (),
        max_new_tokens: int = 256,
        seed: int | None = None,
        start: str | int | None = None,
        **options: Any,
    ) -> list[str]:
        """What comes behind prompts given as ids, up to the first of some strings.

        Args:
            prompts: ids without start and end symbols.
            until: an output ends before the first of these; none of them is part of it.
            max_new_tokens: of an output; the model's longest input may end it earlier.
            seed: see `sample`.
            start: see `score`.
            options: see `sample`.

        Returns:
            For each prompt the text behind it, detokenised, as it would follow the prompt's.

        Raises:
            ConfigError: an option that does not exist, or a prompt longer than the model takes.
        """
        stops = [stop for stop in until if stop]
        # The likeliest token does not depend on where a round ends; a drawn one would, and several
        # outputs compete until their end.
        greedy = options.get("beam", 1) == 1 and not options.get("sampling")
        size = _FIRST_ROUND if greedy and stops else max_new_tokens
        found: list[list[int]] = [[] for _ in prompts]
        going, made = list(range(len(prompts))), 0
        while going and made < max_new_tokens:
            size = min(size, max_new_tokens - made)
            rests = self.continue_tokens(
                [np.append(prompts[i], np.array(found[i], dtype=np.int64)) for i in going],
                max_new_tokens=size,
                seed=seed,
                start=start,
                **options,
            )
            for i, rest in zip(going, rests, strict=True):
                found[i] += rest
            going = [
                i
                for i, rest in zip(going, rests, strict=True)
                if len(rest) == size
                and not any(s in self._behind_ids(prompts[i], found[i]) for s in stops)
            ]
            made, size = made + size, 2 * size
        texts = [self._behind_ids(p, ids) for p, ids in zip(prompts, found, strict=True)]
        return [_before(text, stops) for text in texts]

    @torch.inference_mode()
    def continue_tokens(
        self,
        prompts: Sequence[npt.NDArray[np.int64]],
        *,
        max_new_tokens: int,
        seed: int | None = None,
        start: str | int | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """Go on from ids: the likeliest tokens, or with sampling=True drawn ones.

        Args:
            prompts: ids without start and end symbols.
            max_new_tokens: behind each prompt; the model's longest input may end it earlier.
            seed: see `sample`.
            start: see `score`.
            options: see `sample`; lengths are those of the prompts and `max_new_tokens`.

        Returns:
            For each prompt the ids behind it, without the end symbol.

        Raises:
            ConfigError: an option that does not exist, or a prompt longer than the model takes.
        """
        for i, ids in enumerate(prompts):
            self._check_length(i, len(ids))
        for name in sorted(_USELESS.intersection(options)):
            raise ConfigError(f"continue_tokens(): {name} has no use here; leave it out")
        # A length counts the source, of which the start symbol is one.
        lengths = {"max_len_a": 1.0, "max_len_b": max_new_tokens - 1}
        cfg = generation_config({"beam": 1, "min_len": 0, **options, **lengths}, "continue_tokens")
        generator, dataset = self._going_on(prompts, cfg, seed, start)

        def generate(batch: Sequence[int]) -> dict[int, list[int]]:
            sample = to_device(dataset.collate(batch), self.device)
            results = generator.generate(sample)
            found = {}
            for i, hypotheses in zip(sample["id"].tolist(), results, strict=True):
                tokens = hypotheses[0].tokens.tolist()[len(prompts[i]) :]
                found[i] = tokens[:-1] if tokens[-1:] == [generator.eos] else tokens
            return found

        return self._ranks.batches(dataset, generate)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> str:
        """The text of ids: the way back from `encode`, as far as there is one."""
        return self._decode(self.dictionary.string(ids))

    def _going_on(
        self,
        prompts: Sequence[npt.NDArray[np.int64]],
        cfg: GenerationConfig,
        seed: int | None,
        start: str | int | None,
    ) -> tuple[ContinuationGenerator, PromptDataset]:
        """What goes on from prompts, and the prompts as it reads them."""
        first, pad = self.start_token(start), self.dictionary.pad()
        generator = ContinuationGenerator(
            self._ensemble.models,
            self._task.target_dictionary,
            cfg,
            start=first,
            seed=self._task.run.common.seed if seed is None else seed,
        )
        return generator, PromptDataset(prompts, start=first, end=pad, pad=pad)

    def _check_length(self, number: int, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise ConfigError(
                f"text {number} has {tokens} tokens; the model takes {self.max_tokens} behind its"
                " start symbol: cut the text"
            )

    def _behind_ids(self, prompt: npt.NDArray[np.int64], ids: Sequence[int]) -> str:
        """The text of ids behind a prompt's: a space between the two is part of it."""
        head, whole = self.decode(prompt), self.decode([*prompt.tolist(), *ids])
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    def _behind(self, line: str, output: Output) -> str:
        """What an output has behind its prefix."""
        pieces, given = output.text.split(" "), len(self._encode(line).split())
        head = self._decode(" ".join(pieces[:given]))
        if output.detokenised.startswith(head):
            return output.detokenised[len(head) :]
        return self._decode(" ".join(pieces[given:]))


def _before(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some strings."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=None)]
