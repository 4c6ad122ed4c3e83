"""Data of language models for tests that drive the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.commands import flite
from tests.helpers.text import dictionary_of, random_items, write_items

VOCABULARY = 24

# A model that trains in milliseconds.
TINY_LM = [
    *("--arch", "transformer_lm", "--share-decoder-input-output-embed", "--dropout", "0.1"),
    *("--decoder-embed-dim", "16", "--decoder-input-dim", "16", "--decoder-output-dim", "16"),
    *("--decoder-ffn-embed-dim", "32", "--decoder-layers", "1", "--decoder-attention-heads", "2"),
]


def write_corpus(folder: Path, sizes: Mapping[str, int], seed: int = 1) -> Path:
    """A data folder of random sentences: split -> how many."""
    folder.mkdir(parents=True, exist_ok=True)
    dictionary_of(VOCABULARY).save(folder / "dict.txt")
    for number, (split, size) in enumerate(sizes.items()):
        write_items(folder / split, random_items(size, 9, 100 * seed + number), VOCABULARY)
    return folder


def write_languages(folder: Path, sizes: Mapping[str, int], valid: int = 12) -> Path:
    """A data folder of several languages: language -> sentences to train on."""
    for number, (language, size) in enumerate(sizes.items()):
        write_corpus(folder / language, {"train": size, "valid": valid}, seed=number)
    dictionary_of(VOCABULARY).save(folder / "dict.txt")
    return folder


def binarize_languages(texts: Mapping[str, Sequence[str]], folder: Path, held_out: int) -> Path:
    """Lines of each language -> a data folder, made by flite-preprocess; the first lines are valid.

    Args:
        texts: language -> lines.
        folder: to write to.
        held_out: lines of each language to validate on.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True)
    everything = "".join(f"{line}\n" for lines in texts.values() for line in lines)
    (raw / "all").write_text(everything, encoding="utf-8")
    data = folder / "data-bin"
    only = ("--only-source", "--workers", 1)
    assert flite("preprocess", *only, "--trainpref", raw / "all", "--destdir", data,
                 "--dict-only") == 0  # fmt: skip
    for language, lines in texts.items():
        for split, part in (("train", lines[held_out:]), ("valid", lines[:held_out])):
            (raw / f"{split}.{language}").write_text("\n".join([*part, ""]), encoding="utf-8")
        done = flite(
            "preprocess", *only, "--srcdict", data / "dict.txt", "--destdir", data / language,
            "--trainpref", raw / f"train.{language}", "--validpref", raw / f"valid.{language}",
        )  # fmt: skip
        assert done == 0
    return data
