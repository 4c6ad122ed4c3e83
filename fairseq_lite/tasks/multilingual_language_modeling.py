"""Language modelling over several languages, one data folder each, one dictionary for all.

A data folder holds `dict.txt` and a folder for each language, with the splits that flite-preprocess
--only-source --srcdict dict.txt made there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.flags import flag
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.folders import data_folders
from fairseq_lite.data.indexed import dataset_exists
from fairseq_lite.data.monolingual import MonolingualDataset
from fairseq_lite.data.sampling import (
    Floats,
    LanguageMixture,
    draw_blocks,
    sampling_probabilities,
    size_ratios,
)
from fairseq_lite.data.text import recorded
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.tasks.api import TASKS
from fairseq_lite.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MultilingualLanguageModelingConfig(LanguageModelingConfig):
    """Flags of the multilingual language modelling task."""

    add_bos_token: bool = flag(
        False, "begin each block with a symbol of its language, <de>, counted in its length"
    )
    max_source_positions: int | None = flag(
        None, "as --max-target-positions; the smaller of the two counts"
    )
    langs: str = flag("", "comma-separated languages (default: every folder in the data folder)")
    multilang_sampling_alpha: float = flag(
        1.0,
        "exponent of the languages' shares in the training data: 1 leaves them as they are, less "
        "favours small languages, 0 makes all equal",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_source_positions is not None and self.max_source_positions < 1:
            raise ConfigError(
                f"--max-source-positions {self.max_source_positions}: expected 1 or more"
            )
        if self.multilang_sampling_alpha < 0:
            raise ConfigError(
                f"--multilang-sampling-alpha {self.multilang_sampling_alpha}: expected 0 or more"
            )
        if self.add_bos_token and self.tokens_per_sample < 2:
            raise ConfigError("--tokens-per-sample 1: --add-bos-token leaves no room for text")

    def longest_input(self) -> int:
        """The tokens that a model is built for; a block's symbol is one of it."""
        given = [n for n in (self.max_source_positions, self.max_target_positions) if n is not None]
        return min(given, default=self.tokens_per_sample)


@TASKS.register("multilingual_language_modeling", config=MultilingualLanguageModelingConfig)
class MultilingualLanguageModelingTask(LanguageModelingTask):
    """Predict each token of texts in several languages.

    Training data is sampled anew in each epoch, small languages more often with
    --multilang-sampling-alpha below 1. Validation is reported for a split as a whole and for each
    language: `valid`, `valid_de`, `valid_en`, …
    """

    cfg: MultilingualLanguageModelingConfig

    def __init__(
        self, cfg: MultilingualLanguageModelingConfig, run: RunConfig, dictionary: Dictionary
    ) -> None:
        super().__init__(cfg, run, dictionary)
        self._texts: dict[tuple[Path, str, bool], MonolingualDataset] = {}
        self._reported: dict[str, int] = {}

    @classmethod
    def setup(cls, cfg: LanguageModelingConfig, run: RunConfig) -> MultilingualLanguageModelingTask:
        """Read the dictionary and, where they have symbols in it, find the languages.

        Raises:
            ConfigError: no data folder given, or flags that do not go together.
            DataError: the folder, its dictionary or a language is missing.
        """
        assert isinstance(cfg, MultilingualLanguageModelingConfig)
        if cfg.add_bos_token and not cfg.langs:
            # Kept with the model: its symbols must be the same without the data.
            found = find_languages(Path(data_folders(cfg.data)[0]), "")
            cfg = dataclasses.replace(cfg, langs=",".join(found))
        task = super().setup(cfg, run)
        assert isinstance(task, MultilingualLanguageModelingTask)
        return task

    @classmethod
    def read_dictionary(cls, cfg: LanguageModelingConfig) -> Dictionary:
        """The `dict.txt` of the first data folder; --add-bos-token adds `<de>`, `<en>` …."""
        assert isinstance(cfg, MultilingualLanguageModelingConfig)
        dictionary = super().read_dictionary(cfg)
        if cfg.add_bos_token:
            for language in listed(cfg.langs):
                dictionary.add_symbol(language_symbol(language))
            logger.info("dictionary with the symbols of languages: %d types", len(dictionary))
        return dictionary

    @property
    def block_size(self) -> int:
        """Tokens in a block, at most, without the symbol of its language."""
        return self.cfg.tokens_per_sample - int(self.cfg.add_bos_token)

    def changes_with_epoch(self) -> bool:
        """Always: the blocks of each language are drawn anew."""
        return True

    @property
    def first_token(self) -> int:
        """What a text begins with when a model goes on from nothing.

        Raises:
            ConfigError: the symbol of its language, and there are several.
        """
        languages = listed(self.cfg.langs)
        if not self.cfg.add_bos_token:
            return self._source.eos()
        if len(languages) != 1:
            raise ConfigError(
                "this model begins a text with the symbol of its language and knows "
                f"{len(languages)} of them: say which from Python, as in "
                f"start={language_symbol(languages[0])!r}; flite-eval-lm scores the texts of all"
            )
        return self._source.index(language_symbol(languages[0]))

    # -- data -----------------------------------------------------------------------------------

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False) -> None:
        """Open a split in every language; `valid_de` is the split `valid` in `de`.

        Raises:
            DataError: a language lacks the split, or it is damaged or empty.
        """
        folder = self.folder_of(split, epoch)
        languages = find_languages(folder, self.cfg.langs)
        single = self._single(folder, split, languages)
        if single is not None:
            self.datasets[split] = self._texts_of(folder, single[0], [single[1]], combine)[0]
            return
        train = split == self.run.dataset.train_subset
        logger.info(
            "%s on %d languages: %s",
            "training" if train else "evaluating",
            len(languages),
            ", ".join(languages),
        )
        texts = self._texts_of(folder, split, languages, combine)
        if train:
            self.datasets[split] = self._sampled(dict(zip(languages, texts, strict=True)), epoch)
            return
        self.datasets[split] = LanguageMixture(texts)
        for language, text in zip(languages, texts, strict=True):
            self.datasets[f"{split}_{language}"] = text

    def _single(self, folder: Path, split: str, languages: Sequence[str]) -> tuple[str, str] | None:
        """The split and the language that `valid_de` names, if it is not a split of its own."""
        if any(self._exists(folder, split, language) for language in languages):
            return None
        for language in sorted(languages, key=len, reverse=True):
            base = split.removesuffix(f"_{language}")
            if base != split and self._exists(folder, base, language):
                return base, language
        return None

    def _exists(self, folder: Path, split: str, language: str) -> bool:
        return dataset_exists(folder / language / split, self.run.dataset.dataset_impl)

    def _texts_of(
        self, folder: Path, split: str, languages: Sequence[str], combine: bool
    ) -> list[MonolingualDataset]:
        """A split in each language; it is opened once, not anew in every epoch."""
        texts = []
        for language in languages:
            key = (folder / language, split, combine)
            if key not in self._texts:
                _check_dictionary(folder / language, self.data_paths()[0])
                self._texts[key] = self.open_blocks(
                    folder / language, split, combine, bos=self._symbols(language)
                )
            texts.append(self._texts[key])
        return texts

    def _symbols(self, language: str) -> tuple[int, int] | None:
        if not self.cfg.add_bos_token:
            return None
        symbol = language_symbol(language)
        return self._source.index(symbol), self._target.index(symbol)

    def _sampled(self, texts: Mapping[str, MonolingualDataset], epoch: int) -> LanguageMixture:
        """What is learned from in an epoch: each language in its new size."""
        counts = {language: len(text) for language, text in texts.items()}
        for language, count in counts.items():
            if not count:
                raise DataError(
                    f"the training data of the language {language!r} is empty: leave it out with "
                    "--langs"
                )
        ratios = size_ratios(list(counts.values()), self.cfg.multilang_sampling_alpha)
        seed = self.run.common.seed
        chosen = [
            draw_blocks(count, ratio, seed, epoch)
            for count, ratio in zip(counts.values(), ratios.tolist(), strict=True)
        ]
        if counts != self._reported:  # not in every epoch
            self._report(counts, ratios, [len(blocks) for blocks in chosen])
            self._reported = counts
        return LanguageMixture(list(texts.values()), chosen, epoch=epoch)

    def _report(self, counts: Mapping[str, int], ratios: Floats, resampled: Sequence[int]) -> None:
        blocks = list(counts.values())
        logger.info("loaded total %s blocks for all languages", f"{sum(blocks):,}")
        shares = sampling_probabilities(blocks, self.cfg.multilang_sampling_alpha)
        for what, values in (
            ("sample probability", shares.round(4)),
            ("up/down sampling ratio", ratios.round(2)),
            ("blocks", blocks),
            ("resampled blocks", resampled),
        ):
            shown = ", ".join(f"{lang} {value}" for lang, value in zip(counts, values, strict=True))
            logger.info("%s by language: %s", what, shown)

    def has_split(self, split: str) -> bool:
        """Whether the first data folder has this split, in every language or in one it names."""
        folder = Path(self.data_paths()[0])
        languages = find_languages(folder, self.cfg.langs)
        everywhere = all(self._exists(folder, split, language) for language in languages)
        return everywhere or self._single(folder, split, languages) is not None

    def _is_split(self, name: str) -> bool:
        folder = Path(self.data_paths()[0])
        # Not `valid_de`: a split is shortened in all languages alike.
        return any(self._exists(folder, name, lang) for lang in find_languages(folder, ""))

    def validated_splits(self, subsets: Sequence[str]) -> list[str]:
        """Each split as a whole, and in each language."""
        folder = Path(self.data_paths()[0])
        names = []
        for subset in subsets:
            names.append(subset)
            for language in find_languages(folder, self.cfg.langs):
                if f"{subset}_{language}" in self.datasets:
                    names.append(f"{subset}_{language}")
        return list(dict.fromkeys(names))


def language_symbol(language: str) -> str:
    """What a block of a language begins with."""
    return f"<{language}>"


def listed(langs: str) -> list[str]:
    """The languages of --langs, in alphabetical order."""
    return sorted({name.strip() for name in langs.split(",") if name.strip()})


def find_languages(folder: Path, langs: str) -> list[str]:
    """The languages to use of a data folder, in alphabetical order.

    Args:
        folder: has a folder for each language.
        langs: which of them to use; empty: all.

    Raises:
        DataError: there is none, or one is missing.
    """
    found = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and path.name[0] != "." and path.name != recorded.FOLDER
    )
    wanted = listed(langs)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(
            f"{folder}: no folder of the language {missing[0]!r} (there are: "
            f"{', '.join(found) or 'none'}); --langs names the folders to use"
        )
    if not found:
        raise DataError(
            f"{folder}: no folder of a language; make one for each with flite-preprocess "
            f"--only-source --srcdict {folder / 'dict.txt'} --destdir {folder / 'LANGUAGE'}"
        )
    return wanted or found


def _check_dictionary(language: Path, root: str) -> None:
    """Refuse a language that was made with another dictionary: its ids would mean other words."""
    own, shared = language / "dict.txt", Path(root, "dict.txt")
    if own.is_file() and not shared.read_bytes().startswith(own.read_bytes()):
        raise DataError(
            f"{own} is not the dictionary of all languages, {shared}: make the data of this "
            f"language with flite-preprocess --srcdict {shared}"
        )
