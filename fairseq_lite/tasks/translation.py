"""Translation: pairs of sentences, two dictionaries, validation by loss and by BLEU."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq_lite.config.core import Choice, GenerationConfig, RunConfig
from fairseq_lite.config.flags import flag
from fairseq_lite.config.serial import section_from_plain
from fairseq_lite.criteria.api import Criterion
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.folders import data_folders, part_names
from fairseq_lite.data.indexed import (
    ConcatDataset,
    MemoryDataset,
    TokenDataset,
    TruncatedDataset,
    dataset_exists,
    open_dataset,
)
from fairseq_lite.data.iterators import EpochBatchIterator
from fairseq_lite.data.pairs import PairDataset
from fairseq_lite.data.text.api import TOKENIZERS, TextCodec, build_codecs
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.generation.evaluate import PieceWatch, Texts, hypotheses_and_references
from fairseq_lite.generation.generator import SequenceGenerator
from fairseq_lite.generation.reference import ReferenceScorer
from fairseq_lite.models.api import Model
from fairseq_lite.parallel.world import World
from fairseq_lite.scoring.standard import bleu_of_sums, bleu_sums
from fairseq_lite.tasks.api import TASKS, Sample, StepOutput, Task

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TranslationConfig:
    """Flags of the translation task."""

    data: str | None = flag(
        None,
        "folder made by flite-preprocess; several with colons are taken in turn, one an epoch",
        positional=True,
    )
    source_lang: str | None = flag(None, "source language", aliases=("-s",))
    target_lang: str | None = flag(None, "target language", aliases=("-t",))
    left_pad_source: bool = flag(True, "pad the source on the left")
    left_pad_target: bool = flag(False, "pad the target on the left")
    max_source_positions: int = flag(1024, "longest source, in tokens")
    max_target_positions: int = flag(1024, "longest target, in tokens")
    upsample_primary: int = flag(-1, "read the first of several training parts N times an epoch")
    truncate_source: bool = flag(False, "cut sources that are too long instead of leaving them out")
    num_batch_buckets: int = flag(0, "pad batches to at most N different shapes")
    eval_bleu: bool = flag(False, "translate in validation and report BLEU")
    eval_bleu_args: dict[str, Any] = flag(
        {}, 'JSON of generation settings for --eval-bleu, e.g. {"beam": 4}'
    )
    eval_bleu_detok: str = flag(
        "space", "detokenizer before BLEU: space leaves the text, moses undoes the Moses tokenizer"
    )
    eval_bleu_detok_args: dict[str, Any] = flag({}, "JSON of settings of that detokenizer")
    eval_tokenized_bleu: bool = flag(False, "compute BLEU on tokens, not on detokenised text")
    eval_bleu_remove_bpe: str | None = flag(None, "undo subwords before BLEU", const="@@ ")
    eval_bleu_print_samples: bool = flag(False, "log one translation of each validation batch")

    def __post_init__(self) -> None:
        for name in ("max_source_positions", "max_target_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected 1 or more")
        if self.source_lang is not None and self.source_lang == self.target_lang:
            raise ConfigError("--source-lang and --target-lang are the same")


@TASKS.register("translation", config=TranslationConfig)
class TranslationTask(Task):
    """Translate from one language into another.

    Args:
        cfg: the task's config, its languages known.
        run: the whole run.
        source_dictionary: symbols of the source.
        target_dictionary: symbols of the target.
    """

    cfg: TranslationConfig

    def __init__(
        self,
        cfg: TranslationConfig,
        run: RunConfig,
        source_dictionary: Dictionary,
        target_dictionary: Dictionary,
    ) -> None:
        super().__init__(cfg, run)
        self._source, self._target = source_dictionary, target_dictionary
        self.source_lang, self.target_lang = str(cfg.source_lang), str(cfg.target_lang)
        self._bleu = BleuInValidation(self) if cfg.eval_bleu else None

    @classmethod
    def setup(cls, cfg: TranslationConfig, run: RunConfig) -> TranslationTask:
        """Find the languages and read the dictionaries.

        Raises:
            ConfigError: no data folder given, or the languages cannot be inferred.
            DataError: the folder or a dictionary is missing.
        """
        first = Path(data_folders(cfg.data)[0])
        cfg = infer_languages(cfg, first)
        dictionaries = []
        for lang in (cfg.source_lang, cfg.target_lang):
            dictionary = Dictionary.load(first / f"dict.{lang}.txt")
            logger.info("[%s] dictionary: %d types", lang, len(dictionary))
            dictionaries.append(dictionary)
        return cls(cfg, run, *dictionaries)

    @property
    def source_dictionary(self) -> Dictionary:
        """Symbols of the source."""
        return self._source

    @property
    def target_dictionary(self) -> Dictionary:
        """Symbols of the target."""
        return self._target

    def max_positions(self) -> tuple[int, int]:
        """Longest source and target in tokens."""
        return self.cfg.max_source_positions, self.cfg.max_target_positions

    def data_paths(self, epoch: int = 1) -> list[str]:
        """The data folders given."""
        return data_folders(self.cfg.data)

    # -- data -----------------------------------------------------------------------------------

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False) -> None:
        """Open a split; without a target side where the folder has none (raw input).

        Raises:
            DataError: the split is missing or damaged, or its sides have unequal lengths.
        """
        folders = data_folders(self.cfg.data)
        # Only training data may change from epoch to epoch: validations must be comparable.
        train = split == self.run.dataset.train_subset
        folder = Path(folders[(epoch - 1) % len(folders)] if train else folders[0])
        impl = self.run.dataset.dataset_impl
        sources: list[TokenDataset] = []
        targets: list[TokenDataset] = []
        for name in part_names(split) if combine else (split,):
            prefix = self._prefix(folder, name)
            if prefix is None:
                if sources:
                    break
                raise DataError(
                    f"{folder}: no split {name!r} from {self.source_lang} to {self.target_lang} "
                    f"(expected {name}.{self.source_lang}-{self.target_lang}.{self.source_lang}"
                    ".idx); have flite-preprocess make it, or check the languages"
                )
            sources.append(self._open(prefix + self.source_lang, impl, self._source))
            if dataset_exists(prefix + self.target_lang, impl):
                targets.append(self._open(prefix + self.target_lang, impl, self._target))
        if targets and len(targets) != len(sources):
            raise DataError(f"{folder}: some parts of {split!r} have no target side")
        self.datasets[split] = self._pairs(sources, targets, shuffle=split != "test")

    def _prefix(self, folder: Path, split: str) -> str | None:
        for first, second in (
            (self.source_lang, self.target_lang),
            (self.target_lang, self.source_lang),
        ):
            prefix = f"{folder / split}.{first}-{second}."
            if dataset_exists(prefix + self.source_lang, self.run.dataset.dataset_impl):
                return prefix
        return None

    def _open(self, path: str, impl: str | None, dictionary: Dictionary) -> TokenDataset:
        dataset = open_dataset(path, impl, dictionary)
        logger.info("loaded %s examples from: %s", f"{len(dataset):,}", path)
        return dataset

    def _pairs(
        self, sources: list[TokenDataset], targets: list[TokenDataset], shuffle: bool
    ) -> PairDataset:
        cfg = self.cfg
        if cfg.truncate_source:
            eos = self._source.eos()
            sources = [TruncatedDataset(s, cfg.max_source_positions, eos) for s in sources]
        if len(sources) > 1:
            primary = cfg.upsample_primary if cfg.upsample_primary > 0 else 1
            repeats = [primary] + [1] * (len(sources) - 1)
            sources = [ConcatDataset(sources, repeats)]
            targets = [ConcatDataset(targets, repeats)] if targets else []
        return PairDataset(
            sources[0],
            targets[0] if targets else None,
            self._source,
            self._target,
            left_pad_source=cfg.left_pad_source,
            left_pad_target=cfg.left_pad_target,
            shuffle=shuffle,
            num_buckets=cfg.num_batch_buckets,
            pad_to_multiple=self.run.dataset.required_seq_len_multiple,
        )

    def batch_iterator(self, split: str, *args: Any, **kwargs: Any) -> EpochBatchIterator:
        """See the base class; losses need a target side.

        Raises:
            DataError: there is none, or an example is too long.
        """
        dataset = self.dataset(split)
        if dataset.tgt is None:
            raise DataError(
                f"the split {split!r} has no target side ({self.target_lang}), which training and "
                "validation need; have flite-preprocess make it"
            )
        return super().batch_iterator(split, *args, **kwargs)

    def has_split(self, split: str) -> bool:
        """Whether the first data folder has this split."""
        return self._prefix(Path(data_folders(self.cfg.data)[0]), split) is not None

    # -- translating ----------------------------------------------------------------------------

    def build_generator(
        self, models: Sequence[Model], generation: GenerationConfig
    ) -> SequenceGenerator | ReferenceScorer:
        """Beam search or another strategy; with --score-reference, what scores references."""
        if generation.score_reference:
            return ReferenceScorer(models, self._target)
        return SequenceGenerator(models, self._target, generation, seed=self.run.common.seed)

    def build_dataset_for_inference(self, lines: Sequence[npt.NDArray[np.int64]]) -> PairDataset:
        """Sources without targets."""
        return PairDataset(
            MemoryDataset.of(lines),
            None,
            self._source,
            self._target,
            left_pad_source=self.cfg.left_pad_source,
        )

    @property
    def generates_in_validation(self) -> bool:
        """With --eval-bleu."""
        return self._bleu is not None

    def begin_validation(self, split: str, model: Model) -> None:
        """Make the generator of --eval-bleu."""
        if self._bleu is not None:
            self._bleu.begin(model)

    def valid_step(self, sample: Sample, model: Model, criterion: Criterion) -> StepOutput:
        """The loss, and with --eval-bleu the counts of BLEU."""
        loss, size, sums = super().valid_step(sample, model, criterion)
        if self._bleu is not None:
            sums = {**sums, **self._bleu.sums(sample)}
        return loss, size, sums

    def end_validation(self, split: str, world: World) -> None:
        """The samples of --eval-bleu-print-samples."""
        if self._bleu is not None:
            self._bleu.show_samples(world)

    def extra_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """BLEU, where there are counts of it."""
        if "_bleu_sys_len" not in sums:
            return {}
        return {"bleu": bleu_of_sums(sums)}

    def files(self) -> Mapping[str, Path]:
        """The two dictionaries."""
        first = Path(data_folders(self.cfg.data)[0])
        names = [f"dict.{lang}.txt" for lang in (self.source_lang, self.target_lang)]
        return {name: first / name for name in names}


class BleuInValidation:
    """`--eval-bleu`: translates validation batches by the path of flite-generate.

    Raises:
        ConfigError: settings of the generator or detokenizer that do not exist.
    """

    def __init__(self, task: TranslationTask) -> None:
        cfg = task.cfg
        self._task = task
        self._settings: GenerationConfig = section_from_plain(
            GenerationConfig, cfg.eval_bleu_args, "--eval-bleu-args"
        )
        if cfg.eval_bleu_detok not in TOKENIZERS:
            known = ", ".join(TOKENIZERS.names())
            raise ConfigError(f"--eval-bleu-detok {cfg.eval_bleu_detok}: expected one of {known}")
        entry = TOKENIZERS.get(cfg.eval_bleu_detok)
        detokenizer = entry.factory(
            section_from_plain(entry.config, cfg.eval_bleu_detok_args, "--eval-bleu-detok-args"),
            cfg.source_lang or "en",
            cfg.target_lang or "en",
        )
        self._texts = _texts(task, detokenizer)
        self._tokenize = "none" if cfg.eval_tokenized_bleu else "13a"
        self._watch = PieceWatch("--eval-bleu-remove-bpe", also="")
        self._generator: SequenceGenerator | ReferenceScorer | None = None
        self._samples: list[tuple[str, str]] = []

    def begin(self, model: Model) -> None:
        """Translate with `model` from now on."""
        self._samples.clear()
        self._generator = self._task.build_generator([model], self._settings)

    def sums(self, sample: Sample) -> dict[str, float]:
        """The counts of BLEU of one batch."""
        if self._generator is None:
            raise RuntimeError("begin() comes before the first batch")
        hypotheses, references = hypotheses_and_references(self._generator, sample, self._texts)
        for reference, hypothesis in zip(references, hypotheses, strict=True):
            self._watch.look(reference, hypothesis)
        if self._task.cfg.eval_bleu_print_samples and hypotheses:
            self._samples.append((hypotheses[0], references[0]))
        return bleu_sums(hypotheses, references, tokenize=self._tokenize)

    def show_samples(self, world: World) -> None:
        """Log one translation of each batch, those of all ranks in the order of the batches."""
        if not self._task.cfg.eval_bleu_print_samples:
            return
        for each in itertools.zip_longest(*world.gather_objects(self._samples)):
            for pair in each:
                if pair is not None:
                    logger.info("example hypothesis: %s", pair[0])
                    logger.info("example reference: %s", pair[1])


def _texts(task: TranslationTask, detokenizer: TextCodec) -> Texts:
    """How validation's ids become text: as in flite-generate, where no flag says otherwise."""
    cfg, run = task.cfg, task.run
    joined = cfg.eval_bleu_remove_bpe is not None
    _, decode = build_codecs(
        run.tokenizer if cfg.eval_bleu_detok == "space" else Choice(),
        Choice() if joined else run.bpe,
        cfg.source_lang,
        cfg.target_lang,
    )
    return Texts(
        task.target_dictionary,
        post_process=cfg.eval_bleu_remove_bpe,
        decode=lambda text: detokenizer.decode(decode(text)),
        decode_symbols=run.bpe.name is not None and not joined,
    )


def infer_languages(cfg: TranslationConfig, folder: Path) -> TranslationConfig:
    """Fill in the languages from file names such as `train.en-de.en.idx`.

    Raises:
        ConfigError: no such file, or several language pairs.
    """
    if cfg.source_lang is not None and cfg.target_lang is not None:
        return cfg
    pairs = set()
    for path in folder.iterdir():
        parts = path.name.split(".")
        if len(parts) >= 3 and parts[1].count("-") == 1:
            pairs.add(tuple(parts[1].split("-")))
    given = (cfg.source_lang, cfg.target_lang)
    # A folder made from en to de also serves de to en: a language that was given decides.
    fitting = {
        pair
        for source, target in pairs
        for pair in (
            ((source, target),) if given == (None, None) else ((source, target), (target, source))
        )
        if all(g is None or g == p for g, p in zip(given, pair, strict=True))
    }
    if len(fitting) != 1:
        if not pairs and (folder / "dict.txt").is_file():
            raise ConfigError(
                f"{folder}: holds text of no language pair; for a language model type "
                "--task language_modeling"
            )
        found = ", ".join(sorted("-".join(p) for p in pairs)) or "none"
        raise ConfigError(
            f"{folder}: cannot tell the languages from the file names (pairs found: {found}): "
            "give --source-lang and --target-lang"
        )
    source, target = fitting.pop()
    return dataclasses.replace(cfg, source_lang=source, target_lang=target)
