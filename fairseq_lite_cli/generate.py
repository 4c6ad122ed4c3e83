"""flite-generate: translate a split of a data folder, or go on from its beginnings; score it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import Choice, CommonConfig, GenerationConfig, RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.config.serial import to_plain
from fairseq_lite.data.text.api import build_codecs
from fairseq_lite.data.text.recorded import adopt
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.generation.continuation import ContinuationGenerator
from fairseq_lite.generation.evaluate import Generator, PieceWatch, Texts, Translated, add_to
from fairseq_lite.generation.generator import SequenceGenerator
from fairseq_lite.generation.output import lines
from fairseq_lite.generation.session import DEFAULT_MAX_TOKENS, Session, place, unchanging
from fairseq_lite.models.api import Model
from fairseq_lite.parallel.experts import has_experts
from fairseq_lite.parallel.free import free_running
from fairseq_lite.parallel.launch import launch
from fairseq_lite.parallel.stream import Ordered
from fairseq_lite.parallel.world import World
from fairseq_lite.registry import Registry
from fairseq_lite.scoring import SCORERS, Scorer
from fairseq_lite.scoring.standard import SacrebleuConfig
from fairseq_lite.tasks.api import Task, build_task, resolve_max_positions
from fairseq_lite.tasks.language_modeling import LanguageModelingTask
from fairseq_lite.training.checkpoint.inference import (
    Trained,
    load_for,
    load_models,
    with_its_files,
)
from fairseq_lite.training.evaluation import as_trained
from fairseq_lite_cli.entry import output_errors_told, prepare_rank, run_command

logger = logging.getLogger("fairseq_lite_cli.generate")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, translate, score."""
    registries = load_builtins()
    run = parse("flite-generate", sys.argv[1:] if argv is None else argv, registries)
    launch(translate_split, run, setup=prepare_rank, if_asked=True)


def translate_split(run: RunConfig, world: World) -> None:
    """Translate and score, as one process of `world`."""
    registries = load_builtins()
    log_to_stderr(run.common, is_main=world.is_main)
    run = as_trained(adopt(run, registries), registries)
    logger.info("%s", json.dumps(to_plain(run), ensure_ascii=False))
    torch.manual_seed(run.common.seed)
    np.random.seed(run.common.seed)
    task = build_task(run)
    scorer = make_scorer(run)
    task.load_dataset(run.dataset.gen_subset)
    loaded = load_for(run, registries, task, world)
    run = with_its_files(run, loaded.trained)
    hint_at_segmentation(run, loaded.trained)
    device = place(loaded.models, run.common, run.generation, world.device)
    sources = raw_sources(run, task)
    generator, models = make_generator(run, task, loaded.models, registries, world)
    check_dropout(run, models, world)
    session = Session(
        generator,
        loaded.models,
        make_texts(run, task),
        run.generation,
        device=device,
        source_line=(lambda n: None) if sources is None else sources.__getitem__,
    )
    limits = resolve_max_positions(
        task.max_positions(), *(model.max_positions() for model in loaded.models)
    )
    with output_errors_told(), output_file(run, is_main=world.is_main) as out:
        work = Work(run, task, session, scorer, out)
        work.translate(limits, models, world)
        work.report(world)


def make_generator(
    run: RunConfig,
    task: Task,
    models: Sequence[Model],
    registries: Mapping[str, Registry],
    world: World | None = None,
) -> tuple[Generator, list[Model]]:
    """The task's generator, with the language model of --lm-path where there is one.

    Args:
        run: the flags.
        task: what the models were built for.
        models: those that translate.
        registries: section -> registry.
        world: the ranks that translate together; None: this process alone.

    Returns:
        The generator and all models that it calls.

    Raises:
        ConfigError: the task's generator cannot add one.
        CheckpointError: the language model has another dictionary.
    """
    cfg = run.generation
    alone = dataclasses.replace(cfg, lm_path=None)
    generator: Generator = task.build_generator(models, alone)
    if cfg.lm_path is None:
        return generator, list(models)
    if not isinstance(generator, SequenceGenerator) or isinstance(generator, ContinuationGenerator):
        raise ConfigError("--lm-path: a language model is added to translations only")
    added = load_models([cfg.lm_path], registries, world=world)
    if not isinstance(added.task, LanguageModelingTask):
        raise ConfigError(f"--lm-path {cfg.lm_path}: this is no language model")
    if added.task.target_dictionary != task.target_dictionary:
        raise CheckpointError(
            f"--lm-path {cfg.lm_path}: its dictionary is not the target dictionary: train it on"
            " data made with flite-preprocess --only-source --srcdict dict.TARGET.txt"
        )
    device = None if world is None else world.device
    place(added.models, run.common, GenerationConfig(), device)
    generator.fuse(added.models[0], cfg.lm_weight)
    return generator, [*models, added.models[0]]


def check_dropout(run: RunConfig, models: Sequence[Model], world: World) -> None:
    """Refuse dropout that would be drawn wherever an expert happens to be.

    Raises:
        ConfigError: it would.
    """
    if run.generation.retain_dropout and world.size > 1 and any(map(has_experts, models)):
        raise ConfigError(
            "--retain-dropout with experts on several processes: each would draw its own random"
            " numbers, and outputs depend on their number; leave out --distributed-world-size"
        )


class Work:
    """The split that is translated, and what comes of it.

    Args:
        run: the flags.
        task: gives the split.
        session: this rank's.
        scorer: gets every sentence, on rank 0.
        out: where results go, on rank 0; None elsewhere.
    """

    def __init__(
        self, run: RunConfig, task: Task, session: Session, scorer: Scorer, out: TextIO | None
    ) -> None:
        self.run = run
        self.dataset = task.dataset(run.dataset.gen_subset)
        self.session = session
        self.scorer = scorer
        self.out = out
        self.watch = piece_watch(session.texts, scorer)
        self.too_long = 0

    def translate(self, limits: Any, models: Sequence[Model], world: World) -> None:
        """Translate this rank's batches; rank 0 prints all of them, in their order.

        Args:
            limits: the longest source and target.
            models: all that the generator calls.
            world: the ranks that share the split.
        """
        batches, skipped = plan(self.run, self.dataset, limits)
        results: Ordered[list[Translated]] = Ordered(world, len(batches))
        tqdm.set_lock(threading.RLock())  # its own is one between processes: a failing rank's stays
        progress = tqdm(
            total=len(batches),
            unit="batch",
            disable=not (world.is_main and progress_wanted(self.run.common)),
        )
        with progress:
            with unchanging(models), free_running(models, world):
                for number in range(world.rank, len(batches), world.size):
                    self._seed_dropout(number)
                    sample = self.dataset.collate(batches[number])
                    results.put(self.session.translate(sample))
                    self._show(results.ready(), progress)
            self._show(results.rest(), progress)
        for index in skipped if world.is_main else ():
            for one in self.session.untranslated(self.dataset.collate([index])):
                add_to(self.scorer, one, self.session.texts)
                self._write(one)
        self.too_long = len(skipped)

    def _seed_dropout(self, number: int) -> None:
        """Have dropout that is kept on drop the same, whichever rank has the batch."""
        cfg = self.run.dataset
        if self.run.generation.retain_dropout:
            torch.manual_seed(self.run.common.seed + cfg.shard_id + number * cfg.num_shards)

    def _show(self, batches: Iterable[list[Translated]], progress: tqdm[Any]) -> None:
        for batch in batches:
            for one in batch:
                add_to(self.scorer, one, self.session.texts, self.watch)
                self._write(one)
            progress.update()

    def _write(self, one: Translated) -> None:
        """Print the lines of a sentence, unless --quiet."""
        if not self.run.common_eval.quiet:
            for line in lines(one):
                print(line, file=self.out)

    def report(self, world: World) -> None:
        """Say how fast it went, and the score."""
        if self.too_long:
            logger.warning(
                "%d sentences were too long and have an empty output, which is scored",
                self.too_long,
            )
        logger.info("NOTE: hypothesis and token scores are output in base 2")
        logger.info("%s", self.session.summary(world))
        if len(self.scorer):
            if self.scorer.signature is not None:
                logger.info("signature: %s", self.scorer.signature)
            subset, beam = self.run.dataset.gen_subset, self.run.generation.beam
            result = self.scorer.result_string()
            print(f"Generate {subset} with beam={beam}: {result}", file=self.out)


def piece_watch(texts: Texts, scorer: Scorer) -> PieceWatch | None:
    """Who looks out for pieces in what is scored; None where that is known beforehand."""
    if scorer.detokenised or texts.post_process is not None or not texts.decode_symbols:
        return PieceWatch()
    logger.warning(
        "BLEU is computed on the pieces of --bpe, not on words, and cannot be compared: type "
        "--scoring sacrebleu"
    )
    return None


def plan(run: RunConfig, dataset: Any, limits: Any) -> tuple[list[Any], list[int]]:
    """This shard's batches, and its sentences that are too long to translate."""
    cfg = run.dataset
    max_tokens = cfg.max_tokens
    if max_tokens is None and cfg.batch_size is None:
        max_tokens = DEFAULT_MAX_TOKENS
    batches = dataset.batches(
        max_tokens=max_tokens,
        max_sentences=cfg.batch_size,
        required_multiple=cfg.required_batch_size_multiple,
        max_positions=limits,
        skip_invalid=cfg.skip_invalid_size_inputs_valid_test,
        seed=run.common.seed,
        name=cfg.gen_subset,
    )
    fitting = np.concatenate(batches) if batches else np.array([], dtype=np.int64)
    skipped = np.setdiff1d(np.arange(len(dataset)), fitting).tolist()
    return batches[cfg.shard_id :: cfg.num_shards], skipped[cfg.shard_id :: cfg.num_shards]


def hint_at_segmentation(run: RunConfig, trained: Trained) -> None:
    """Say what to type for text, where the model knows how to make it and nothing else says so.

    The text of a folder without a record was segmented by somebody else, and as in fairseq their
    lines are printed and scored as they are.
    """
    cfg = run.common_eval
    found = trained.segmentation
    if found and not (run.bpe.name or run.tokenizer.name or cfg.post_process):
        logger.info(
            "%s was trained with %s, which the data folder does not record: lines stay as they are"
            " there; type %s for text",
            trained.config.path,
            found,
            found,
        )


def make_texts(run: RunConfig, task: Task) -> Texts:
    """How ids become text: --post-process, then --bpe's decoder, then --tokenizer's."""
    target = task.target_dictionary
    if target is None:
        raise ConfigError(f"--task {run.task.name}: this task has no target dictionary to print")
    return Texts(
        target,
        task.source_dictionary,
        run.common_eval.post_process,
        codecs(run, task)[1],
        decode_symbols=run.bpe.name is not None,
    )


def codecs(run: RunConfig, task: Task) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Raw text to the text of the data folder, and back."""
    languages = [
        getattr(task.cfg, name) if hasattr(task.cfg, name) else None
        for name in ("source_lang", "target_lang")
    ]
    return build_codecs(run.tokenizer, run.bpe, *languages)


def make_scorer(run: RunConfig) -> Scorer:
    """The scorer chosen; --sacrebleu is an old way to choose one."""
    choice = run.scoring
    if run.generation.sacrebleu and choice.name != "sacrebleu":
        logger.warning("--sacrebleu is deprecated: type --scoring sacrebleu")
        choice = Choice("sacrebleu", SacrebleuConfig())
    scorer: Scorer = SCORERS.get(choice.name or "bleu").factory(choice.config)
    return scorer


def raw_sources(run: RunConfig, task: Task) -> list[str] | None:
    """The source lines as they were, where --replace-unk needs them and the folder has them."""
    if run.generation.replace_unk is None:
        return None
    path = Path(str(getattr(task.dataset(run.dataset.gen_subset), "src", "")))
    if run.dataset.dataset_impl == "raw" and path.is_file():
        with path.open(encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    logger.warning(
        "--replace-unk: a source word the dictionary does not know is copied as <unk>, since only"
        " data preprocessed with --dataset-impl raw keeps it"
    )
    return None


def progress_wanted(common: CommonConfig) -> bool:
    """Whether a progress bar is drawn: on a terminal, unless switched off."""
    return (
        sys.stderr.isatty() and not common.no_progress_bar and common.log_format in (None, "tqdm")
    )


def log_to_stderr(common: CommonConfig, *, is_main: bool = True) -> None:
    """Log lines go to standard error: standard output holds nothing but the results.

    Other ranks only warn.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if common.log_file is not None and is_main:
        try:
            handlers.append(logging.FileHandler(common.log_file, encoding="utf-8"))
        except OSError as e:
            raise ConfigError(f"--log-file {common.log_file}: {e.strerror}") from None
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.INFO if is_main else logging.WARNING,
        handlers=handlers,
        force=True,
    )


@contextlib.contextmanager
def output_file(run: RunConfig, *, is_main: bool = True) -> Iterator[TextIO | None]:
    """Standard output, or `generate-{subset}.txt` in the --results-path folder; None elsewhere.

    Raises:
        ConfigError: the folder or the file cannot be written.
    """
    if not is_main:
        yield None
        return
    if run.common_eval.results_path is None:
        yield sys.stdout
        return
    folder = Path(run.common_eval.results_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"generate-{run.dataset.gen_subset}.txt").open("w", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--results-path {folder}: cannot be written ({e.strerror})") from None
    with file:
        yield file


if __name__ == "__main__":
    sys.exit(run_command("flite-generate", main))
