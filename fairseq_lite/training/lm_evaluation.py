"""`flite-eval-lm` from its configuration on: load language models, score a split, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
from fairseq_lite.generation.session import place
from fairseq_lite.generation.words import (
    Joining,
    WordStats,
    joining,
    joining_of,
    word_line,
    words_of,
)
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


def evaluate(run: RunConfig, registries: Mapping[str, Registry]) -> Report:
    """Score --gen-subset with the models of --path, and log what comes out.

    Args:
        run: the configuration of `flite-eval-lm`.
        registries: section -> registry.

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
    loaded = inference.load_for(run, registries, task)
    run = inference.with_segmentation(run, loaded)
    device = place(loaded.models, run.common, GenerationConfig())
    count = sum(p.numel() for p in loaded.models[0].parameters())
    logger.info("num. model params: %s", f"{count:,}")
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
    measuring = Measuring(run, task)
    scorer = TargetScorer(
        loaded.models, measuring.dictionary.pad(), softmax_batch=run.eval_lm.softmax_batch
    )
    with results_file(run) as out:
        show = reporter(out)
        for sample in tqdm(batches(run, dataset, limit), unit="batch", disable=not _bar(run)):
            for line in measuring.batch(scorer, to_device(sample, device)):
                show(line)
        report = measuring.report(subset)
        logger.info("%s", measuring.speed())
        for line in (*measuring.stats(), *report.lines()):
            show(line)
    if run.common.log_format == "json":
        logger.info("%s", report.to_json())
    return report


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


def batches(run: RunConfig, dataset: BlockDataset, limit: int) -> Iterator[dict[str, Any]]:
    """This shard's batches; examples that no model takes are left out, with a warning.

    Raises:
        DataError: there is none.
    """
    cfg = run.dataset
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
    steps = EpochBatchIterator(
        dataset,
        found,
        world_size=cfg.num_shards,
        rank=cfg.shard_id,
        num_workers=cfg.num_workers,
    ).next_epoch_itr(shuffle=False)
    if cfg.max_valid_steps is not None:
        steps.take(cfg.max_valid_steps)
    return (sample for sample in steps if sample)


class Measuring:
    """Everything that is counted while batches are scored.

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
        # A start symbol is predicted from itself; fairseq does not score it either.
        self.skip = int(run.task.config.add_bos_token)
        self.tokens = 0
        self.seconds = 0.0

    def batch(self, scorer: TargetScorer, sample: dict[str, Any]) -> Iterator[str]:
        """Score a batch; the lines of --output-word-probs."""
        start = time.perf_counter()
        scores = scorer.score(sample["net_input"], sample["target"]).cpu().numpy()
        self.seconds += time.perf_counter() - start
        self.tokens += sample["ntokens"]
        for one in scored_examples(sample, scores, self.dictionary.pad(), self.skip):
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

    def speed(self) -> str:
        """Tokens and seconds of the models alone."""
        rate = self.tokens / max(self.seconds, 1e-9)
        return f"Evaluated {self.tokens:,} tokens in {self.seconds:.1f}s ({rate:.2f} tokens/s)"

    def report(self, subset: str) -> Report:
        """The results."""
        sums = self.sums
        report = Report(subset, self.tokens, sums.loss, sums.perplexity)
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
