"""Tiny language models and tiny tasks for tests of few-shot evaluation."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from examples.few_shot import gpt3_eval
from tests.helpers.commands import flite

WORDS = "the old man went down to sea and saw a ship with white sails far out on water".split()
_SIZES = {"embed-dim": 32, "input-dim": 32, "output-dim": 32, "ffn-embed-dim": 32, "layers": 2,
          "attention-heads": 2}  # fmt: skip
EXPERTS = ["--moe-freq", "2", "--moe-expert-count", "2", "--criterion", "moe_cross_entropy"]


def write_language_data(folder: Path) -> Path:
    """A data folder of plain text with a subword model of single letters and a few more."""
    generator = random.Random(1)
    lines = [" ".join(generator.choices(WORDS, k=generator.randrange(4, 20))) for _ in range(300)]
    letters = [chr(code) for code in range(33, 127)]  # every prompt can be spelt
    folder.mkdir(parents=True)
    text = folder / "train.txt"
    text.write_text("\n".join([*lines, " ".join(letters)]) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sp"), vocab_size=160, model_type="bpe",
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    done = flite(
        "preprocess", "--only-source", "--trainpref", text, "--destdir", folder / "data-bin",
        "--bpe", "sentencepiece", "--sentencepiece-model", folder / "sp.model",
    )  # fmt: skip
    assert done == 0
    return folder / "data-bin"


def train_language_model(data: Path, save_dir: Path, *more: object, updates: int = 8) -> Path:
    """A language model that has seen a few updates; returns its checkpoint."""
    sizes = [word for name, value in _SIZES.items() for word in (f"--decoder-{name}", value)]
    done = flite(
        "train", data, "--task", "language_modeling", "--arch", "transformer_lm", *sizes, "--cpu",
        "--tokens-per-sample", 512, "--sample-break-mode", "eos", "--max-tokens", 600,
        "--optimizer", "adam", "--lr", "1e-2", "--max-update", updates, "--disable-validation",
        "--save-dir", save_dir, *more,
    )  # fmt: skip
    assert done == 0
    return save_dir / "checkpoint_last.pt"


def copa_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    generator = random.Random(first)
    rows = []
    for i in range(first, first + count):
        one, two, three = (" ".join(generator.choices(WORDS, k=4)) for _ in range(3))
        rows.append(
            {"premise": f"The {one}.", "choice1": f"The {two}.", "choice2": f"I {three}.",
             "question": ("cause", "effect")[i % 2], "label": generator.randrange(2), "idx": i}
        )  # fmt: skip
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def write_copa(folder: Path, train: int = 12, val: int = 9) -> Path:
    """A data folder of tasks with COPA in it."""
    write_rows(folder / "COPA" / "train.jsonl", copa_rows(train, first=100))
    write_rows(folder / "COPA" / "val.jsonl", copa_rows(val))
    return folder


def evaluate(model: object, *words: object) -> list[dict[str, Any]]:
    """What `gpt3_eval` finds, in this process."""
    values = gpt3_eval.parse(["--model-name", str(model), *(str(word) for word in words)])
    values.pop("list_tasks")
    return gpt3_eval.run_evaluations_from_model_name(values.pop("model_name"), **values)


def without_times(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "times"}
