"""`flite-eval-lm` from its configuration on: load language models, score a split, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fairseq_lite.config.core import GenerationConfig, RunConfig
from fairseq_lite.config.serial import to_plain
from fairseq_lite.criteria.cross_entropy import perplexity
from fairseq_lite.data.context import ContextWindow
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.iterators import EpochBatchIterator
from fairseq_lite.data.monolingual import BlockDataset
from fairseq_lite.data.postprocess import post_process
from fairseq_lite.data.text.api import build_bpe, build_codecs
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.generation.likelihood import TargetScorer
from fairseq_lite.generation.perplexity import Perplexity, Scored, TextSize, scored_examples
from fairseq_lite.generation.session import place, unchanging
from fairseq_lite.generation.words import (
    Joining,
    WordStats,
    joining,
    joining_of,
    word_line,
    words_of,
)
from fairseq_lite.models.api import Model
from fairseq_lite.parallel.experts import expert_parameters, shared_parameters
from fairseq_lite.parallel.free import free_running
from fairseq_lite.parallel.stream import Ordered, worked
from fairseq_lite.parallel.world import World
from fairseq_lite.registry import Registry
from fairseq_lite.tasks.api import build_task, to_device
from fairseq_lite.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq_lite.training.checkpoint import inference
from fairseq_lite.training.evaluation import as_trained

# The command's name, as fairseq's lines have its command's: results are found by it.
logger = logging.getLogger("fairseq_lite_cli.eval_lm")

# fairseq's limit where a command line sets none.
DEFAULT_MAX_TOKENS = 36000


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of a split.

    Attributes:
        subset: the split.
        tokens: how many were scored, a start symbol of each block included.
        loss: in base 2.
        perplexity: 2 to the power of it.
        words: of the text before it was segmented, where that is known.
        word_perplexity: see `generation.perplexity`.
        bytes: of that text.
        bits_per_byte: see `generation.perplexity`.
    """

    subset: str
    tokens: int
    loss: float
    perplexity: float
    words: int | None = None
    word_perplexity: float | None = None
    bytes: int | None = None
    bits_per_byte: float | None = None

    def lines(self) -> Iterator[str]:
        """The results, fairseq's line last."""
        if self.words and self.word_perplexity is not None:
            # Text without spaces has few and long words: no line of a hundred digits for it.
            digits = ".2f" if self.word_perplexity < 1e9 else ".3e"
            yield (
                f"Word-level perplexity: {self.word_perplexity:{digits}} ({self.words:,} words), "
                f"bits per byte: {self.bits_per_byte:.4f} ({self.bytes:,} bytes)"
            )
        yield f"Loss (base 2): {self.loss:.4f}, Perplexity: {self.perplexity:.2f}"

    def to_json(self) -> str:
        """For machines; only what is known."""
        known = {key: value for key, value in vars(self).items() if value is not None}
        return json.dumps(known, ensure_ascii=False)


def evaluate(run: RunConfig, world: World, registries: Mapping[str, Registry]) -> Report | None:
    """Score --gen-subset with the models of --path, and log what comes out.

    Args:
        run: the configuration of `flite-eval-lm`.
        world: the processes that share the split.
        registries: section -> registry.

    Returns:
        What comes out, on rank 0.

    Raises:
        ConfigError: no model, or blocks that are longer than it takes.
        FliteError: the checkpoint or the data cannot be read, or do not fit each other.
    """
    logger.info("%s", json.dumps(to_plain(run), ensure_ascii=False))
    if not isinstance(run.task.config, LanguageModelingConfig):
        raise ConfigError(
            f"--task {run.task.name}: flite-eval-lm measures language models; use flite-validate"
        )
    run = as_trained(run, registries)
    longest = block_length(run)
    task = build_task(shortened(run))
    assert isinstance(task, LanguageModelingTask)
    logger.info("loading model(s) from %s", run.common_eval.path)
    loaded = inference.load_for(run, registries, task, world)
    run = inference.with_segmentation(run, loaded.trained)
    place(loaded.models, run.common, GenerationConfig(), world.device)
    logger.info("num. model params: %s", f"{number_of_parameters(loaded.models[0], world):,}")
    subset = run.dataset.gen_subset
    task.load_dataset(subset)
    dataset: BlockDataset = task.dataset(subset)
    logger.info("%s examples in %s", f"{len(dataset):,}", subset)
    limit = min(model.max_positions() for model in loaded.models)
    size = task.block_size + dataset.extra
    if run.eval_lm.context_window:
        dataset = ContextWindow(dataset, run.eval_lm.context_window, longest)
        size = max(size, longest)
    check_size(run, longest, size, limit)
    scorer = TargetScorer(
        loaded.models,
        task.target_dictionary.pad(),
        softmax_batch=run.eval_lm.softmax_batch,
    )
    scoring = Scoring(run, task, scorer, world)
    if not world.is_main:
        for _ in scoring.batches(dataset, limit):
            pass
        scoring.speed()
        return None
    measuring = Measuring(run, task)
    with results_file(run) as out:
        show = reporter(out)
        for batch in scoring.batches(dataset, limit):
            for line in measuring.batch(batch):
                show(line)
        speed, tokens = scoring.speed()
        report = measuring.report(subset, tokens)
        logger.info("%s", speed)
        for line in (*measuring.stats(), *report.lines()):
            show(line)
    if run.common.log_format == "json":
        logger.info("%s", report.to_json())
    return report


def number_of_parameters(model: Model, world: World) -> int:
    """Of all ranks; an expert that several have counts once."""
    shared = sum(p.numel() for p in shared_parameters(model))
    experts = sum(
        p.numel() for p, shard in expert_parameters(model) if shard.layout.replica(world.rank) == 0
    )
    return shared + round(world.sum({"experts": experts})["experts"])


def block_length(run: RunConfig) -> int:
    """The most tokens of a block with its context.

    Raises:
        ConfigError: the context leaves no room for anything else.
    """
    length: int = run.task.config.tokens_per_sample
    if run.eval_lm.context_window >= length:
        raise ConfigError(
            f"--context-window {run.eval_lm.context_window} leaves no room for anything else:"
            f" --tokens-per-sample is {length}, context included"
        )
    return length


def shortened(run: RunConfig) -> RunConfig:
    """The run with blocks that leave room for their context."""
    config = run.task.config
    length = config.tokens_per_sample - run.eval_lm.context_window
    config = dataclasses.replace(config, tokens_per_sample=length)
    return dataclasses.replace(run, task=dataclasses.replace(run.task, config=config))


def check_size(run: RunConfig, typed: int, size: int, limit: int) -> None:
    """Refuse blocks that no model takes: all would be left out.

    Args:
        run: the flags.
        typed: --tokens-per-sample.
        size: tokens in a block, with its context and start symbol.
        limit: the longest input of the models.

    Raises:
        ConfigError: they are longer.
    """
    if run.task.config.sample_break_mode != "eos" and size > limit:
        raise ConfigError(
            f"--tokens-per-sample {typed}: the model takes {limit} tokens, start symbol and context"
            f" included; type --tokens-per-sample {typed - (size - limit)} or less"
        )


class Scoring:
    """The log-probabilities of a split, by all ranks, on rank 0 in the order of one process.

    Args:
        run: the flags.
        task: its dictionaries.
        scorer: the models.
        world: the ranks that share the split.
    """

    def __init__(
        self, run: RunConfig, task: LanguageModelingTask, scorer: TargetScorer, world: World
    ) -> None:
        self.run = run
        self.scorer = scorer
        self.world = world
        self.pad = task.target_dictionary.pad()
        # A start symbol is predicted from itself; fairseq does not score it either.
        self.skip = int(run.task.config.add_bos_token)
        self.tokens = 0
        self.seconds = 0.0

    def batches(self, dataset: BlockDataset, limit: int) -> Iterator[list[Scored]]:
        """Score this rank's batches; on rank 0 the examples of every rank's, as they come.

        Examples that no model takes are left out, with a warning.

        Args:
            dataset: the blocks.
            limit: the longest input of the models.

        Raises:
            DataError: there is nothing to score.
        """
        total, mine = self._shares(dataset, limit)
        tqdm.set_lock(threading.RLock())  # its own is one between processes: a failing rank's stays
        bar = tqdm(total=total, unit="batch", disable=not (self.world.is_main and _bar(self.run)))
        scored: Ordered[list[Scored]] = Ordered(self.world, total)
        with bar:
            with unchanging(self.scorer.models), free_running(self.scorer.models, self.world):
                for sample in mine:
                    scored.put(self._score(to_device(sample, self.world.device)))
                    for batch in scored.ready():
                        bar.update()
                        yield batch
            for batch in scored.rest():
                bar.update()
                yield batch

    def _shares(self, dataset: BlockDataset, limit: int) -> tuple[int, Iterator[dict[str, Any]]]:
        """How many batches this shard has, and those of this rank."""
        cfg = self.run.dataset
        found = dataset.batches(
            max_tokens=cfg.max_tokens or DEFAULT_MAX_TOKENS,
            max_sentences=cfg.batch_size,
            required_multiple=cfg.required_batch_size_multiple,
            max_positions=limit,
            skip_invalid=True,
            name=cfg.gen_subset,
        )
        if not len(found):
            raise DataError(f"the split {cfg.gen_subset!r} has nothing that could be scored")
        numbers = range(cfg.shard_id, len(found), cfg.num_shards)[: cfg.max_valid_steps]
        steps = EpochBatchIterator(
            dataset,
            [found[number] for number in numbers],
            world_size=self.world.size,
            rank=self.world.rank,
            num_workers=cfg.num_workers,
        ).next_epoch_itr(shuffle=False)
        return len(numbers), (sample for sample in steps if sample)

    def _score(self, sample: dict[str, Any]) -> list[Scored]:
        start = time.perf_counter()
        scores = self.scorer.score(sample["net_input"], sample["target"]).cpu().numpy()
        self.seconds += time.perf_counter() - start
        self.tokens += sample["ntokens"]
        return list(scored_examples(sample, scores, self.pad, self.skip))

    def speed(self) -> tuple[str, int]:
        """Tokens and seconds of the models alone, as a line, and the tokens; of all ranks."""
        work = worked(self.world, {"tokens": self.tokens}, self.seconds)
        tokens = work.counts["tokens"]
        return (
            f"Evaluated {tokens:,} tokens in {work.seconds:.1f}s "
            f"({work.speeds['tokens']:.2f} tokens/s)"
        ), tokens


class Measuring:
    """Everything that is counted as batches come, on one rank.

    Args:
        run: the flags.
        task: its dictionaries.
    """

    def __init__(self, run: RunConfig, task: LanguageModelingTask) -> None:
        self.dictionary = dictionary = task.target_dictionary
        self.cfg = run.eval_lm
        symbol = run.common_eval.post_process
        join = None if symbol in (None, "none") else joining(dictionary, str(symbol))
        self.sums = Perplexity(join)
        self.joining = join if join is not None else _subword_joining(run, dictionary)
        self.size = TextSize(dictionary, _decoder(run)) if _segmented(run) else None
        self.words = WordStats()

    def batch(self, examples: Sequence[Scored]) -> Iterator[str]:
        """Count a batch; the lines of --output-word-probs."""
        for one in examples:
            self.sums.add(one)
            if self.size is not None:
                self.size.add(one)
            yield from self._words(one)

    def _words(self, one: Scored) -> Iterator[str]:
        if not (self.cfg.output_word_probs or self.cfg.output_word_stats):
            return
        words = words_of(one.tokens, one.log_probs, self.dictionary, self.joining)
        if self.cfg.output_word_stats:
            self.words.add(words)
        if self.cfg.output_word_probs:
            yield word_line(one.id, words)

    def stats(self) -> Iterator[str]:
        """The lines of --output-word-stats."""
        return self.words.lines()

    def report(self, subset: str, tokens: int) -> Report:
        """The results.

        Args:
            subset: the split.
            tokens: how many were scored.
        """
        sums = self.sums
        report = Report(subset, tokens, sums.loss, sums.perplexity)
        if self.size is None:
            return report
        words, size = self.size.count()
        if not words:
            return report
        return dataclasses.replace(
            report,
            words=words,
            word_perplexity=perplexity(sums.bits / words),
            bytes=size,
            bits_per_byte=sums.bits / size,
        )


def _segmented(run: RunConfig) -> bool:
    """Whether it is known how the text was segmented."""
    chosen = (run.bpe.name, run.tokenizer.name, run.common_eval.post_process)
    return any(name is not None for name in chosen)


def _subword_joining(run: RunConfig, dictionary: Dictionary) -> Joining | None:
    subword = build_bpe(run.bpe)
    return None if subword is None else joining_of(dictionary, subword)


def _decoder(run: RunConfig) -> Callable[[str], str]:
    _, decode = build_codecs(run.tokenizer, run.bpe)
    if run.bpe.name is not None:
        return decode  # it joins pieces by itself: joined twice, words would be joined as well
    return lambda line: decode(post_process(line, run.common_eval.post_process))


def reporter(out: TextIO | None) -> Callable[[str], None]:
    """Where results go: the log, and the file of --results-path."""

    def show(line: str) -> None:
        logger.info("%s", line)
        if out is not None:
            print(line, file=out)

    return show


@contextlib.contextmanager
def results_file(run: RunConfig) -> Iterator[TextIO | None]:
    """`eval_lm-{subset}.txt` in the --results-path folder, where one is given.

    Raises:
        ConfigError: it cannot be written.
    """
    if run.common_eval.results_path is None:
        yield None
        return
    folder = Path(run.common_eval.results_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"eval_lm-{run.dataset.gen_subset}.txt").open("w", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--results-path {folder}: cannot be written ({e.strerror})") from None
    with file:
        yield file


def _bar(run: RunConfig) -> bool:
    common = run.common
    return (
        sys.stderr.isatty() and not common.no_progress_bar and common.log_format in (None, "tqdm")
    )
