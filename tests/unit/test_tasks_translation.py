"""The translation task: languages, splits, limits, and BLEU while validating."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import Choice, DatasetConfig, GenerationConfig, RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedWriter, best_dtype
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.tasks.api import (
    TASKS,
    BatchLimits,
    Task,
    build_task,
    resolve_max_positions,
    to_device,
)
from fairseq_lite.tasks.translation import TranslationConfig, TranslationTask, infer_languages

WORDS = ("a", "b", "c")


def write_split(
    folder: Path, name: str, lines: dict[str, list[str]], dictionary: Dictionary
) -> None:
    for lang, texts in lines.items():
        writer = IndexedWriter(folder / f"{name}.en-de.{lang}", best_dtype(len(dictionary)))
        for text in texts:
            writer.add(dictionary.encode_line(text))
        writer.finalize()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    dictionary = Dictionary()
    for word in WORDS:
        dictionary.add_symbol(word)
    for lang in ("en", "de"):
        dictionary.save(tmp_path / f"dict.{lang}.txt")
    both = {"en": ["a b", "c", "a b c a b c"], "de": ["b a", "c", "c b a"]}
    for name in ("train", "train1", "valid", "valid1"):
        write_split(tmp_path, name, both, dictionary)
    write_split(tmp_path, "test", {"en": ["a", "b"]}, dictionary)
    return tmp_path


def make(data: Path, dataset: DatasetConfig | None = None, **values: Any) -> TranslationTask:
    cfg = TranslationConfig(data=str(data), **values)
    run = RunConfig(
        command="flite-train",
        task=Choice("translation", cfg),
        dataset=dataset or DatasetConfig(),
    )
    task = build_task(run)
    assert isinstance(task, TranslationTask)
    return task


def test_languages_come_from_the_file_names(data: Path) -> None:
    task = make(data)
    assert (task.source_lang, task.target_lang) == ("en", "de")
    assert make(data, source_lang="de").target_lang == "en", "the same folder serves both ways"
    assert make(data, target_lang="en").source_lang == "de"
    assert len(task.source_dictionary) == 4 + len(WORDS)


def test_languages_that_cannot_be_told(data: Path, tmp_path: Path) -> None:
    (data / "train.en-fr.fr.idx").touch()
    with pytest.raises(ConfigError, match=r"pairs found: en-de, en-fr.*--source-lang"):
        make(data)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="pairs found: none"):
        infer_languages(TranslationConfig(data=str(empty)), empty)
    (empty / "dict.txt").touch()
    with pytest.raises(ConfigError, match="type --task language_modeling"):
        infer_languages(TranslationConfig(data=str(empty)), empty)


def test_missing_things_are_named(data: Path) -> None:
    with pytest.raises(ConfigError, match="no data"):
        TASKS.get("translation").factory.setup(TranslationConfig(), RunConfig(command=""))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no such data folder"):
        make(data / "nowhere")
    task = make(data)
    with pytest.raises(DataError, match=r"no split 'dev' from en to de \(expected dev\.en-de\.en"):
        task.load_dataset("dev")
    with pytest.raises(DataError, match="'valid' has not been loaded"):
        task.dataset("valid")


def test_parts_of_a_split_are_one_with_combine(data: Path) -> None:
    task = make(data, upsample_primary=3)
    task.load_dataset("train", combine=True)
    assert len(task.dataset("train")) == 3 * 3 + 3
    task.load_dataset("train")
    assert len(task.dataset("train")) == 3


def test_a_split_without_target_can_be_translated(data: Path) -> None:
    task = make(data)
    task.load_dataset("test")
    sample = task.dataset("test").collate([0, 1])
    assert sample["target"] is None and sample["ntokens"] == 4


def test_unused_valid_subsets_are_found(data: Path) -> None:
    task = make(data)
    assert task.unused_valid_subsets(["valid"]) == ["valid1"]
    assert task.unused_valid_subsets(["valid", "valid1"]) == []
    assert task.has_split("test") and not task.has_split("dev")


def test_long_sources_are_cut_or_left_out(data: Path) -> None:
    task = make(data, truncate_source=True, max_source_positions=3)
    task.load_dataset("train")
    assert task.dataset("train").collate([2])["net_input"]["src_tokens"].shape == (1, 3)
    strict = make(data, max_source_positions=3)
    strict.load_dataset("train")
    limits = BatchLimits(max_sentences=8, max_positions=strict.max_positions())
    with pytest.raises(DataError, match="train: 1 examples are too long"):
        strict.batch_iterator("train", limits, seed=1)
    skipping = dataclasses.replace(limits, skip_invalid=True)
    kept = np.concatenate(strict.batch_iterator("train", skipping, seed=1).batches)
    assert sorted(kept.tolist()) == [0, 1]


def test_several_data_folders_are_taken_in_turn(data: Path, tmp_path_factory: Any) -> None:
    second = tmp_path_factory.mktemp("second")
    dictionary = make(data).source_dictionary
    write_split(second, "train", {"en": ["a"], "de": ["b"]}, dictionary)
    task = make(Path(f"{data}:{second}"))
    sizes = []
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch)
        sizes.append(len(task.dataset("train")))
    assert sizes == [3, 1, 3]
    task.load_dataset("valid", epoch=2)
    assert len(task.dataset("valid")) == 3, "validation is always on the first"


def test_the_dictionaries_travel_with_the_model(data: Path) -> None:
    assert make(data).files() == {
        "dict.en.txt": data / "dict.en.txt",
        "dict.de.txt": data / "dict.de.txt",
    }


def test_bleu_settings_are_checked_at_the_start(data: Path) -> None:
    with pytest.raises(ConfigError, match="--eval-bleu-args: unknown field 'bean'"):
        make(data, eval_bleu=True, eval_bleu_args={"bean": 4})
    with pytest.raises(ConfigError, match="--eval-bleu-detok-args"):
        make(data, eval_bleu=True, eval_bleu_detok="moses", eval_bleu_detok_args={"lang": "de"})
    with pytest.raises(ConfigError, match="--eval-bleu-detok mosess"):
        make(data, eval_bleu=True, eval_bleu_detok="mosess")


def test_the_generator_follows_the_flags(data: Path) -> None:
    task = make(data)
    scorer = task.build_generator([], GenerationConfig(score_reference=True))
    assert type(scorer).__name__ == "ReferenceScorer"


def test_flags_of_the_task() -> None:
    words = "data-bin -s en -t de --arch transformer --optimizer adam --left-pad-source False "
    words += "--eval-bleu --eval-bleu-remove-bpe --eval-bleu-args {'beam':4} --upsample-primary 2"
    cfg = parse("flite-train", words.split(), load_builtins()).task.config
    assert cfg == TranslationConfig(
        data="data-bin",
        source_lang="en",
        target_lang="de",
        left_pad_source=False,
        eval_bleu=True,
        eval_bleu_remove_bpe="@@ ",
        eval_bleu_args={"beam": 4},
        upsample_primary=2,
    )
    with pytest.raises(ConfigError, match="are the same"):
        TranslationConfig(source_lang="en", target_lang="en")


def test_the_tightest_limit_counts() -> None:
    assert resolve_max_positions(None, None) is None
    assert resolve_max_positions((1024, None), (512, 256), 2000) == (512, 256)
    assert resolve_max_positions(100, (512, 50)) == (100, 50)
    assert resolve_max_positions(3, None, 2) == 2
    with pytest.raises(ConfigError, match="2 and 3 parts"):
        resolve_max_positions((1, 2), (1, 2, 3))


def test_a_task_that_does_not_generate_says_so() -> None:
    class Silent(Task):
        def load_dataset(self, split: str, epoch: int = 1, combine: bool = False) -> None:
            self.datasets[split] = []

    silent = Silent(None, RunConfig(command="", task=Choice("silent")))
    with pytest.raises(ConfigError, match="--task silent: this task does not generate"):
        silent.build_generator([], GenerationConfig())
    with pytest.raises(ConfigError, match="no architecture"):
        silent.build_model(Choice())
    assert silent.files() == {} and silent.state_dict() == {}
    moved = to_device({"a": np.int64(1), "b": [1, (2,)], "c": "x"}, "cpu")  # type: ignore[arg-type]
    assert moved == {"a": 1, "b": [1, (2,)], "c": "x"}
