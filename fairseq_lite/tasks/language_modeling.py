"""Language modelling: one text, one dictionary, every token predicted from those before it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fairseq_lite.config.core import GenerationConfig, RunConfig
from fairseq_lite.config.flags import flag
from fairseq_lite.data.blocks import BreakMode, TokenBlocks
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.folders import data_folders, part_names
from fairseq_lite.data.indexed import ConcatDataset, TokenDataset, dataset_exists, open_dataset
from fairseq_lite.data.monolingual import Layout, MonolingualDataset
from fairseq_lite.data.prompts import PromptDataset, without_end
from fairseq_lite.data.shorten import ShortenMethod, shorten
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.generation.continuation import ContinuationGenerator
from fairseq_lite.generation.reference import ReferenceScorer
from fairseq_lite.models.api import Model
from fairseq_lite.tasks.api import TASKS, Task

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LanguageModelingConfig:
    """Flags of the language modelling task."""

    data: str | None = flag(
        None,
        "folder made by flite-preprocess --only-source; several with colons are taken in turn, one "
        "an epoch",
        positional=True,
    )
    sample_break_mode: BreakMode = flag(
        "none",
        "where a block ends: none fills it to the last token, complete ends it with a sentence, "
        "complete_doc also with a document (at an empty line), eos makes each sentence a block",
    )
    tokens_per_sample: int = flag(1024, "tokens in a block, at most")
    output_dictionary_size: int = flag(
        -1, "predict only the first N symbols of the dictionary; the others become unknown"
    )
    max_target_positions: int | None = flag(
        None, "longest input of the model, in tokens (default: --tokens-per-sample)"
    )
    add_bos_token: bool = flag(False, "begin each block with <s>")
    pad_to_fixed_length: bool = flag(False, "pad every batch to --tokens-per-sample")
    pad_to_fixed_bsz: bool = flag(False, "pad every batch to --batch-size rows")
    shorten_method: ShortenMethod = flag(
        "none",
        "cut sentences longer than --tokens-per-sample before blocks are made: truncate keeps "
        "their beginning, random_crop a part that changes with the epoch",
    )
    shorten_data_split_list: str = flag(
        "", "comma-separated splits that --shorten-method applies to (default: all)"
    )

    def __post_init__(self) -> None:
        for name in ("tokens_per_sample", "max_target_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        special = Dictionary().nspecial
        if -1 < self.output_dictionary_size <= special or self.output_dictionary_size < -1:
            raise ConfigError(
                f"--output-dictionary-size {self.output_dictionary_size}: expected -1 (all) or "
                f"more than the {special} special symbols"
            )

    def longest_input(self) -> int:
        """The tokens that a model is built for; a start symbol is one."""
        return self.max_target_positions or self.tokens_per_sample + int(self.add_bos_token)


# Commands that make blocks by what was typed.
_SHORTENING = {"flite-train", "flite-generate", "flite-eval-lm"}


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


@TASKS.register("language_modeling", config=LanguageModelingConfig)
class LanguageModelingTask(Task):
    """Predict each token of a text from those before it.

    Args:
        cfg: the task's config.
        run: the whole run.
        dictionary: symbols of the text.
    """

    cfg: LanguageModelingConfig

    def __init__(self, cfg: LanguageModelingConfig, run: RunConfig, dictionary: Dictionary) -> None:
        super().__init__(cfg, run)
        size = cfg.output_dictionary_size
        self._source = dictionary
        self._target = dictionary if size in (-1, len(dictionary)) else dictionary.truncated(size)

    @classmethod
    def setup(cls, cfg: LanguageModelingConfig, run: RunConfig) -> LanguageModelingTask:
        """Read the dictionary.

        Raises:
            ConfigError: no data folder given, or flags that do not go together.
            DataError: the folder or its dictionary is missing.
        """
        dataset = run.dataset
        if cfg.pad_to_fixed_bsz and dataset.batch_size is None and run.command == "flite-train":
            raise ConfigError("--pad-to-fixed-bsz needs --batch-size")
        task = cls(cfg, run, cls.read_dictionary(cfg))
        task.check_shortened_splits()
        return task

    @classmethod
    def read_dictionary(cls, cfg: LanguageModelingConfig) -> Dictionary:
        """The `dict.txt` of the first data folder."""
        folder = Path(data_folders(cfg.data)[0])
        if not (folder / "dict.txt").is_file() and any(folder.glob("dict.*.txt")):
            raise DataError(
                f"{folder}: holds pairs of sentences, not text of one language; for a translation "
                "model type --task translation, and flite-validate in place of flite-eval-lm"
            )
        dictionary = Dictionary.load(folder / "dict.txt")
        logger.info("dictionary: %d types", len(dictionary))
        return dictionary

    @property
    def source_dictionary(self) -> Dictionary:
        """Symbols of the text."""
        return self._source

    @property
    def target_dictionary(self) -> Dictionary:
        """Symbols that can be predicted."""
        return self._target

    @property
    def first_token(self) -> int:
        """What a text begins with when a model goes on from nothing: eos, or bos."""
        return self._source.bos() if self.cfg.add_bos_token else self._source.eos()

    @property
    def block_size(self) -> int:
        """Tokens in a block, at most; the bos of --add-bos-token comes on top."""
        return self.cfg.tokens_per_sample

    def max_positions(self) -> int:
        """The longest input, which is also the longest that a model is built for."""
        return self.cfg.longest_input()

    def data_paths(self, epoch: int = 1) -> list[str]:
        """The data folders given."""
        return data_folders(self.cfg.data)

    def files(self) -> Mapping[str, Path]:
        """The dictionary."""
        return {"dict.txt": Path(self.data_paths()[0], "dict.txt")}

    # -- data -----------------------------------------------------------------------------------

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False) -> None:
        """Open a split and cut it into blocks.

        Raises:
            DataError: the split is missing or damaged.
        """
        self.datasets[split] = self.open_blocks(self.folder_of(split, epoch), split, combine)

    def folder_of(self, split: str, epoch: int) -> Path:
        """The data folder of a split in an epoch."""
        folders = self.data_paths()
        # Only training data may change from epoch to epoch: validations must be comparable.
        train = split == self.run.dataset.train_subset
        return Path(folders[(epoch - 1) % len(folders)] if train else folders[0])

    def open_blocks(
        self, folder: Path, split: str, combine: bool, bos: tuple[int, int] | None = None
    ) -> MonolingualDataset:
        """The blocks of a split.

        Args:
            folder: where it lies.
            split: its name.
            combine: read `split`, `split1`, `split2`, … as one.
            bos: what source and target begin with, if --add-bos-token and not `<s>`.

        Raises:
            DataError: the split is missing or damaged.
        """
        cfg = self.cfg
        text = self._open_text(folder, split, combine)
        listed = _listed(cfg.shorten_data_split_list)
        if not listed or split in listed:
            text = shorten(text, cfg.shorten_method, self.block_size, self.run.common.seed)
        blocks = TokenBlocks(text, cfg.sample_break_mode, self.block_size)
        if cfg.add_bos_token and bos is None:
            bos = self._source.bos(), self._target.bos()
        return MonolingualDataset(blocks, self._source, self._target, self._layout(split), bos)

    def check_shortened_splits(self) -> None:
        """Look for the splits of --shorten-data-split-list: one that is none would shorten nothing.

        Raises:
            ConfigError: one does not exist, on a command line; a model's own list may name splits
                of its training data.
        """
        if self.run.command not in _SHORTENING:
            return
        cfg, dataset = self.cfg, self.run.dataset
        named = {dataset.train_subset, dataset.gen_subset, *_listed(dataset.valid_subset)}
        for name in _listed(cfg.shorten_data_split_list):
            if name not in {"train", "valid", "test", *named} and not self._is_split(name):
                raise ConfigError(
                    f"--shorten-data-split-list {cfg.shorten_data_split_list}: no split {name!r} "
                    f"in {self.data_paths()[0]}; splits are called like its files, as in train,"
                    "valid"
                )

    def _is_split(self, name: str) -> bool:
        return self.has_split(name)

    def _open_text(self, folder: Path, split: str, combine: bool) -> TokenDataset:
        impl = self.run.dataset.dataset_impl
        parts: list[TokenDataset] = []
        for name in part_names(split) if combine else (split,):
            if not dataset_exists(folder / name, impl):
                break
            parts.append(open_dataset(folder / name, impl, self._source))
            logger.info("loaded %s examples from: %s", f"{len(parts[-1]):,}", folder / name)
        if not parts:
            raise DataError(
                f"{folder}: no split {split!r} (expected {split}.idx and {split}.bin); have "
                "flite-preprocess --only-source make it"
            )
        return parts[0] if len(parts) == 1 else ConcatDataset(parts)

    def has_split(self, split: str) -> bool:
        """Whether the first data folder has this split."""
        return dataset_exists(Path(self.data_paths()[0], split), self.run.dataset.dataset_impl)

    def _layout(self, split: str) -> Layout:
        cfg, dataset = self.cfg, self.run.dataset
        rows = (dataset.batch_size_valid if "valid" in split else None) or dataset.batch_size
        return Layout(
            pad=self._source.pad(),
            columns=cfg.tokens_per_sample if cfg.pad_to_fixed_length else 0,
            rows=rows or 0 if cfg.pad_to_fixed_bsz else 0,
            multiple=dataset.required_seq_len_multiple,
        )

    # -- going on from text ---------------------------------------------------------------------

    def build_generator(
        self, models: Sequence[Model], generation: GenerationConfig
    ) -> ContinuationGenerator | ReferenceScorer:
        """What goes on from prefixes; with --score-reference, what scores whole texts."""
        if generation.score_reference:
            return ReferenceScorer(models, self._target)
        return ContinuationGenerator(
            models, self._target, generation, start=self.first_token, seed=self.run.common.seed
        )

    def build_dataset_for_inference(self, lines: Sequence[npt.NDArray[np.int64]]) -> PromptDataset:
        """Lines as prefixes, behind the symbol that every text begins with."""
        pad = self._source.pad()
        prompts = without_end(lines, self._source.eos())
        return PromptDataset(prompts, start=self.first_token, end=pad, pad=pad)
