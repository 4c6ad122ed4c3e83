"""The tasks of language models: flags, dictionaries, splits, languages, what changes by epoch."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import Choice, CommonConfig, DatasetConfig, RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.tasks.api import BatchLimits, build_task
from fairseq_lite.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq_lite.tasks.multilingual_language_modeling import (
    MultilingualLanguageModelingConfig,
    MultilingualLanguageModelingTask,
    find_languages,
)
from tests.helpers.text import EOS, dictionary_of, random_items, write_items

VOCABULARY = 24
BOS, PAD, UNK = 0, 1, 3
LIMITS = BatchLimits(max_tokens=64, max_positions=16, skip_invalid=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    dictionary_of(VOCABULARY).save(tmp_path / "dict.txt")
    for seed, (name, count) in enumerate({"train": 60, "train1": 30, "valid": 20}.items()):
        write_items(tmp_path / name, random_items(count, 9, seed))
    return tmp_path


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    dictionary_of(VOCABULARY).save(tmp_path / "dict.txt")
    for seed, (name, count) in enumerate({"de": 300, "en": 60, "fi": 10}.items()):
        write_items(tmp_path / name / "train", random_items(count, 9, seed))
        write_items(tmp_path / name / "valid", random_items(20, 9, seed + 10))
        (tmp_path / name / "dict.txt").write_bytes((tmp_path / "dict.txt").read_bytes())
    return tmp_path


def make(
    data: Path | str,
    dataset: DatasetConfig | None = None,
    seed: int = 1,
    command: str = "flite-train",
    **values: Any,
) -> LanguageModelingTask:
    values = {"tokens_per_sample": 16, **values}
    cfg = LanguageModelingConfig(data=str(data), **values)
    return build(Choice("language_modeling", cfg), dataset, seed, command)


def multilingual(
    data: Path | str, dataset: DatasetConfig | None = None, seed: int = 1, **values: Any
) -> MultilingualLanguageModelingTask:
    values = {"tokens_per_sample": 16, **values}
    cfg = MultilingualLanguageModelingConfig(data=str(data), **values)
    task = build(Choice("multilingual_language_modeling", cfg), dataset, seed)
    assert isinstance(task, MultilingualLanguageModelingTask)
    return task


def build(
    choice: Choice, dataset: DatasetConfig | None, seed: int, command: str = "flite-train"
) -> LanguageModelingTask:
    run = RunConfig(
        command=command,
        common=CommonConfig(seed=seed),
        task=choice,
        dataset=dataset or DatasetConfig(),
    )
    task = build_task(run)
    assert isinstance(task, LanguageModelingTask)
    return task


def batches(task: LanguageModelingTask, split: str = "train", epoch: int = 1) -> list[list[int]]:
    task.load_dataset(split, epoch=epoch)
    return [b.tolist() for b in task.batch_iterator(split, LIMITS, seed=1, epoch=epoch).batches]


# -- language_modeling ---------------------------------------------------------------------------


def test_flags_of_the_task() -> None:
    words = (
        "data-bin --task language_modeling --arch transformer_lm --optimizer adam "
        "--sample-break-mode complete_doc --tokens-per-sample 512 --add-bos-token "
        "--output-dictionary-size 100 --max-target-positions 1024 --shorten-method random_crop "
        "--shorten-data-split-list train,valid --pad-to-fixed-length --pad-to-fixed-bsz"
    )
    cfg = parse("flite-train", words.split(), load_builtins()).task.config
    assert cfg == LanguageModelingConfig(
        data="data-bin",
        sample_break_mode="complete_doc",
        tokens_per_sample=512,
        output_dictionary_size=100,
        max_target_positions=1024,
        add_bos_token=True,
        pad_to_fixed_length=True,
        pad_to_fixed_bsz=True,
        shorten_method="random_crop",
        shorten_data_split_list="train,valid",
    )


@pytest.mark.parametrize("flag", ["--self-target", "--future-target", "--past-target"])
def test_other_targets_than_the_next_token_are_refused(flag: str) -> None:
    words = f"data --task language_modeling --arch transformer_lm --optimizer adam {flag}"
    with pytest.raises(ConfigError, match=f"{flag}: .*leave it out"):
        parse("flite-train", words.split(), load_builtins())


def test_flags_out_of_range() -> None:
    with pytest.raises(ConfigError, match="--tokens-per-sample 0: expected 1"):
        LanguageModelingConfig(tokens_per_sample=0)
    with pytest.raises(ConfigError, match="--max-target-positions 0: expected 1"):
        LanguageModelingConfig(max_target_positions=0)
    for size in (-2, 0, 4):
        with pytest.raises(ConfigError, match=f"--output-dictionary-size {size}: expected -1"):
            LanguageModelingConfig(output_dictionary_size=size)


def test_the_dictionary_and_its_truncation(data: Path) -> None:
    task = make(data)
    assert task.source_dictionary is task.target_dictionary
    assert len(task.source_dictionary) == VOCABULARY
    assert task.files() == {"dict.txt": data / "dict.txt"}
    small = make(data, output_dictionary_size=10)
    assert (len(small.source_dictionary), len(small.target_dictionary)) == (VOCABULARY, 10)
    small.load_dataset("train")
    target = small.dataset("train").collate(np.arange(8))["target"]
    assert target.max() == 9 and (target == UNK).any()
    assert len(make(data, output_dictionary_size=100).target_dictionary) == VOCABULARY


def test_a_folder_of_translations_is_called_so(data: Path) -> None:
    (data / "dict.txt").rename(data / "dict.en.txt")
    with pytest.raises(DataError, match="holds pairs of sentences.* type --task translation"):
        make(data)


def test_how_long_inputs_may_be(data: Path) -> None:
    assert make(data).max_positions() == 16
    assert make(data, max_target_positions=64).max_positions() == 64
    assert make(data, add_bos_token=True).max_positions() == 17, "a bos on top of a full block"
    assert make(data, add_bos_token=True, max_target_positions=64).max_positions() == 64


def test_splits(data: Path) -> None:
    task = make(data, sample_break_mode="eos")
    task.load_dataset("train")
    assert len(task.dataset("train")) == 60
    task.load_dataset("train", combine=True)
    assert len(task.dataset("train")) == 90
    with pytest.raises(DataError, match=r"no split 'test' \(expected test.idx"):
        task.load_dataset("test")
    assert task.has_split("valid") and not task.has_split("test")
    write_items(data / "valid1", random_items(3, 4))
    assert task.unused_valid_subsets(["valid"]) == ["valid1"]
    assert task.validated_splits(["valid"]) == ["valid"]
    with pytest.raises(DataError, match="no such data folder"):
        make(data / "nowhere")
    (data / "empty").mkdir()
    with pytest.raises(DataError, match="no dictionary"):
        make(data / "empty")


def test_several_data_folders_are_taken_in_turn(data: Path, tmp_path_factory: Any) -> None:
    second = tmp_path_factory.mktemp("second")
    write_items(second / "train", random_items(7, 5))
    task = make(f"{data}:{second}", sample_break_mode="eos")
    assert task.changes_with_epoch() and not make(data).changes_with_epoch()
    sizes = []
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch)
        sizes.append(len(task.dataset("train")))
    assert sizes == [60, 7, 60]
    task.load_dataset("valid", epoch=2)
    assert len(task.dataset("valid")) == 20, "validation is always on the first"


def test_raw_text(data: Path) -> None:
    (data / "raw").write_text("w1 w2\nw3\n")
    task = make(data, DatasetConfig(dataset_impl="raw"))
    task.load_dataset("raw")
    assert task.dataset("raw").collate([0])["target"].tolist() == [[5, 6, EOS, 7, EOS]]


def test_shapes_that_do_not_change(data: Path) -> None:
    dataset = DatasetConfig(batch_size=6, batch_size_valid=3, required_seq_len_multiple=5)
    task = make(data, dataset, pad_to_fixed_length=True, pad_to_fixed_bsz=True)
    for split, rows in (("train", 6), ("valid", 3)):
        task.load_dataset(split)
        assert task.dataset(split).collate([0])["target"].shape == (rows, 20)
    plain = make(data, DatasetConfig(batch_size=6))
    plain.load_dataset("train")
    assert plain.dataset("train").collate([0])["target"].shape == (1, 16)


def test_a_fixed_batch_size_needs_a_batch_size(data: Path) -> None:
    with pytest.raises(ConfigError, match="--pad-to-fixed-bsz needs --batch-size"):
        make(data, pad_to_fixed_bsz=True)
    evaluating = make(data, pad_to_fixed_bsz=True, command="flite-validate")
    evaluating.load_dataset("valid")
    assert evaluating.dataset("valid").collate([0])["target"].shape == (1, 16)


def test_long_sentences_are_shortened_where_asked(data: Path) -> None:
    shorter = {"sample_break_mode": "eos", "tokens_per_sample": 4}
    for listed, cut in (("", True), ("train", True), ("valid", False), ("test,train", True)):
        task = make(data, shorten_method="truncate", shorten_data_split_list=listed, **shorter)
        task.load_dataset("train")
        assert (int(task.dataset("train").sizes.max()) == 4) is cut
    crops = [make(data, shorten_method="random_crop", seed=s, **shorter) for s in (1, 1, 2)]
    read = []
    for task in crops:
        task.load_dataset("train")
        read.append(task.dataset("train").collate(np.arange(60))["target"].tolist())
    assert read[0] == read[1] != read[2]


def test_splits_to_shorten_exist(data: Path, languages: Path) -> None:
    cut = {"shorten_method": "truncate", "tokens_per_sample": 4}
    for listed in ("train, train1", "valid,test", "other"):
        make(data, DatasetConfig(gen_subset="other"), shorten_data_split_list=listed, **cut)
    with pytest.raises(ConfigError, match=r"list trian,valid: no split 'trian' in .*train,valid$"):
        make(data, shorten_data_split_list="trian,valid", **cut)
    # A model's own list, on another folder.
    make(data, command="flite-validate", shorten_data_split_list="valid_ted", **cut)
    # Languages are shortened alike, so a split in one of them would be no split.
    with pytest.raises(ConfigError, match="no split 'valid_de'"):
        multilingual(languages, shorten_data_split_list="train,valid_de", **cut)


def test_training_blocks_are_the_same_in_every_epoch_and_crops_are_not(data: Path) -> None:
    task = make(data, sample_break_mode="eos", tokens_per_sample=4, shorten_method="random_crop")
    task.load_dataset("train")
    epochs = task.batch_iterator("train", LIMITS, seed=1)
    read = []
    for _ in range(2):
        samples = sorted(epochs.next_epoch_itr(), key=lambda s: int(s["id"][0]))
        read.append([s["target"].tolist() for s in samples])
    assert read[0] != read[1]
    assert [len(batch) for batch in read[0]] == [len(batch) for batch in read[1]]


def test_what_a_text_begins_with(data: Path) -> None:
    assert make(data).first_token == EOS
    task = make(data, add_bos_token=True)
    assert task.first_token == BOS
    task.load_dataset("train")
    sample = task.dataset("train").collate([0, 1])
    assert sample["net_input"]["src_tokens"][:, 0].eq(BOS).all()
    assert sample["target"].shape == (2, 17)


# -- multilingual_language_modeling --------------------------------------------------------------


def test_languages_of_a_folder(languages: Path) -> None:
    (languages / ".cache").mkdir()
    (languages / "segmentation").mkdir(exist_ok=True)  # what flite-preprocess --bpe leaves there
    assert find_languages(languages, "") == ["de", "en", "fi"]
    assert find_languages(languages, "fi, de") == ["de", "fi"]
    with pytest.raises(DataError, match=r"no folder of the language 'sv' \(there are: de, en, fi"):
        find_languages(languages, "sv")
    with pytest.raises(DataError, match="no folder of a language; make one for each"):
        find_languages(languages / "de", "")


def test_a_language_made_with_another_dictionary_is_refused(languages: Path) -> None:
    dictionary_of(VOCABULARY - 1).save(languages / "fi" / "dict.txt")
    multilingual(languages).load_dataset("train")  # the beginning of the whole one
    (languages / "fi" / "dict.txt").write_text("other 3\n")
    with pytest.raises(DataError, match=r"fi/dict.txt is not the dictionary of all languages"):
        multilingual(languages).load_dataset("train")
    multilingual(languages, langs="de,en").load_dataset("train")


def test_all_of_every_language_once_an_epoch(languages: Path) -> None:
    task = multilingual(languages, sample_break_mode="eos")
    sizes = {}
    for epoch in (1, 2):
        task.load_dataset("train", epoch=epoch)
        data = task.dataset("train")
        sizes[epoch] = sorted(data.read(np.arange(len(data))).target.tolist())
        assert len(data) == 370
    assert sizes[1] == sizes[2]


def test_small_languages_are_seen_more_often(
    languages: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = multilingual(languages, sample_break_mode="eos", multilang_sampling_alpha=0.5)
    with caplog.at_level(logging.INFO):
        task.load_dataset("train")
    roots = np.sqrt([300, 60, 10])
    expected = np.ceil(roots / roots.sum() * 370).astype(int)
    assert len(task.dataset("train")) == expected.sum()
    shown = ", ".join(f"{lang} {n}" for lang, n in zip(("de", "en", "fi"), expected, strict=True))
    assert f"resampled blocks by language: {shown}" in caplog.text
    assert "blocks by language: de 300, en 60, fi 10" in caplog.text


def test_what_is_drawn_depends_on_seed_and_epoch_alone(languages: Path) -> None:
    def read(epoch: int, seed: int = 1, before: int | None = None) -> list[list[int]]:
        task = multilingual(languages, seed=seed, multilang_sampling_alpha=0.3)
        if before is not None:
            batches(task, epoch=before)
        return [
            task.dataset("train").read(np.array(b)).target.tolist()
            for b in batches(task, epoch=epoch)
        ]

    assert read(2) == read(2, before=1) == read(2, before=5)
    assert read(2) != read(1) and read(2) != read(2, seed=2)
    assert multilingual(languages).changes_with_epoch()


def test_languages_are_validated_together_and_one_by_one(languages: Path) -> None:
    task = multilingual(languages, sample_break_mode="eos")
    task.load_dataset("valid")
    assert task.validated_splits(["valid"]) == ["valid", "valid_de", "valid_en", "valid_fi"]
    assert [len(task.dataset(name)) for name in task.validated_splits(["valid"])] == [
        60,
        20,
        20,
        20,
    ]
    assert batches(task, "valid"), "batches of the whole"
    single = multilingual(languages, sample_break_mode="eos")
    single.load_dataset("valid_en")
    assert single.validated_splits(["valid_en"]) == ["valid_en"]
    assert single.has_split("valid_en") and not single.has_split("valid_sv")
    one, other = (t.dataset("valid_en").collate([0])["target"].tolist() for t in (single, task))
    assert one == other
    assert task.validated_splits(["valid", "valid_de"]).count("valid_de") == 1


def test_the_language_of_a_split_is_the_longest_name(languages: Path) -> None:
    write_items(languages / "fi_x" / "valid", random_items(3, 5))
    write_items(languages / "x" / "valid_fi", random_items(4, 5))
    task = multilingual(languages, sample_break_mode="eos")
    task.load_dataset("valid_fi_x")
    assert len(task.dataset("valid_fi_x")) == 3


def test_missing_and_empty_splits_name_their_language(languages: Path) -> None:
    (languages / "en" / "valid.idx").unlink()
    with pytest.raises(DataError, match=r"en: no split 'valid'"):
        multilingual(languages).load_dataset("valid")
    assert not multilingual(languages).has_split("valid")
    write_items(languages / "fi" / "train", [])
    with pytest.raises(DataError, match="language 'fi' is empty: leave it out with --langs"):
        multilingual(languages).load_dataset("train")


def test_symbols_of_languages(languages: Path) -> None:
    task = multilingual(languages, add_bos_token=True, langs="fi,de")
    dictionary = task.source_dictionary
    assert [dictionary[i] for i in range(VOCABULARY, len(dictionary))] == ["<de>", "<fi>"]
    assert task.block_size == 15 and task.max_positions() == 16, "counted in the length"
    task.load_dataset("valid")
    sample = task.dataset("valid").collate([0, len(task.dataset("valid")) - 1])
    first = [dictionary.index("<de>"), dictionary.index("<fi>")]
    assert sample["net_input"]["src_tokens"][:, 0].tolist() == first
    assert sample["target"][:, 0].tolist() == first and sample["target"].shape[1] <= 16
    with pytest.raises(ConfigError, match="knows 2 of them: say which from Python"):
        _ = task.first_token
    alone = multilingual(languages, add_bos_token=True, langs="fi")
    assert alone.first_token == alone.source_dictionary.index("<fi>")
    assert multilingual(languages).first_token == EOS


def test_symbols_of_languages_are_kept_with_the_model(languages: Path, tmp_path: Path) -> None:
    task = multilingual(languages, add_bos_token=True)
    assert task.cfg.langs == "de,en,fi"
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "dict.txt").write_bytes((languages / "dict.txt").read_bytes())
    moved = dataclasses.replace(task.cfg, data=str(beside))
    again = build(Choice("multilingual_language_modeling", moved), None, seed=1)
    assert again.source_dictionary.symbols == task.source_dictionary.symbols


def test_multilingual_flags() -> None:
    words = (
        "data --task multilingual_language_modeling --arch transformer_lm --optimizer adam "
        "--langs de,en --multilang-sampling-alpha 0.7 --max-source-positions 100 --add-bos-token "
        "--max-target-positions 200"
    )
    cfg = parse("flite-train", words.split(), load_builtins()).task.config
    assert cfg == MultilingualLanguageModelingConfig(
        data="data",
        langs="de,en",
        multilang_sampling_alpha=0.7,
        max_source_positions=100,
        max_target_positions=200,
        add_bos_token=True,
    )
    for wrong, says in (
        ({"multilang_sampling_alpha": -1.0}, "alpha -1.0: expected 0 or more"),
        ({"max_source_positions": 0}, "--max-source-positions 0: expected 1"),
        ({"tokens_per_sample": 1, "add_bos_token": True}, "leaves no room for text"),
    ):
        with pytest.raises(ConfigError, match=says):
            MultilingualLanguageModelingConfig(**wrong)
    for flag, value in (("--lang-to-offline-shard-ratio", "x"), ("--baseline-model", "x")):
        with pytest.raises(ConfigError, match=f"{flag}: "):
            parse("flite-train", [*words.split(), flag, value], load_builtins())


def test_the_smaller_limit_of_source_and_target_counts(languages: Path) -> None:
    longest = multilingual(languages, max_source_positions=100, max_target_positions=200)
    assert longest.max_positions() == 100
