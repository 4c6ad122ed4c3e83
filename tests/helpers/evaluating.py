"""The evaluation commands on any number of ranks: what rank 0 prints, case by case."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.parallel.world import World
from tests.helpers.commands import _loggers_as_they_were, flite
from tests.helpers.languages import write_corpus
from tests.helpers.text import random_items
from tests.helpers.toy import LETTERS, preprocess_args

# Command -> the module of its function of (run, world), and its name.
_COMMANDS = {
    "generate": ("fairseq_lite_cli.generate", "translate_split"),
    "eval_lm": ("fairseq_lite_cli.eval_lm", "measure"),
    "validate": ("fairseq_lite_cli.validate", "validate"),
}

Case = tuple[str, list[str]]

SIZES = [
    f"--{side}-{name}={size}"
    for side in ("encoder", "decoder")
    for name, size in (
        ("embed-dim", 32), ("ffn-embed-dim", 32), ("layers", 2), ("attention-heads", 2),
    )
]  # fmt: skip
_PAIR_MODEL = ["--arch", "transformer_tiny", *SIZES]
_LANGUAGE_MODEL = [
    *("--task", "language_modeling", "--arch", "transformer_lm", *SIZES[4:]),
    *("--decoder-input-dim", "32", "--decoder-output-dim", "32"),
]


def outputs(world: World, cases: Mapping[str, Case]) -> dict[str, str]:
    """What each command prints on this rank to standard output.

    Args:
        world: the ranks.
        cases: name -> command and arguments.
    """
    torch.set_num_threads(1)  # another number of threads may add up in another order
    found = {}
    for name, (command, words) in cases.items():
        module, function = _COMMANDS[command]
        run = parse(f"flite-{command.replace('_', '-')}", words, load_builtins())
        out = io.StringIO()
        with _loggers_as_they_were(), contextlib.redirect_stdout(out):
            getattr(importlib.import_module(module), function)(run, world)
        found[name] = _without_clocks(out.getvalue())
    return found


def _without_clocks(text: str) -> str:
    """The lines without times of day and speeds, nor the one that repeats all flags."""
    lines = [line.split(" | ", 1)[-1] for line in text.splitlines()]
    kept = [line for line in lines if "Evaluated" not in line and '{"command"' not in line]
    return re.sub(r"\| wps [\d.e+]+ ", "", "\n".join(kept))


def pairs(folder: Path, test: Sequence[int], seed: int = 3) -> Path:
    """A data folder of letters and their reversals.

    Args:
        folder: to write to.
        test: lengths of the sentences of the test split.
        seed: of the letters.
    """
    generator = torch.Generator().manual_seed(seed)
    text = folder / "text"
    text.mkdir(parents=True)
    sizes = {"train": [*range(2, 12)] * 16, "valid": [*range(1, 20)] * 2, "test": test}
    for split, lengths in sizes.items():
        lines = [
            [LETTERS[i] for i in torch.randint(len(LETTERS), (n,), generator=generator).tolist()]
            for n in lengths
        ]
        for side, order in (("src", 1), ("tgt", -1)):
            words = "".join(" ".join(line[::order]) + "\n" for line in lines)
            (text / f"{split}.{side}").write_text(words, encoding="utf-8")
    assert flite("preprocess", *preprocess_args(text, folder / "data")) == 0
    return folder / "data"


def translation_model(data: Path, folder: Path, *flags: object) -> Path:
    """A checkpoint of a translation model that gives varied outputs."""
    return _trained(data, folder, *_PAIR_MODEL, "--batch-size", 8, *flags)


def language_model(folder: Path, *flags: object) -> tuple[Path, Path]:
    """A corpus, and a checkpoint of a language model of it."""
    data = write_corpus(folder / "lm-data", {"train": 100, "valid": 20, "test": 50})
    sizes = ("--tokens-per-sample", 24, "--batch-size", 4)
    return data, _trained(data, folder / "lm", *_LANGUAGE_MODEL, *sizes, *flags)


def _trained(data: Path, folder: Path, *flags: object) -> Path:
    """A model that has learnt enough for outputs to differ: a new one repeats a word for ever."""
    updates = ("--max-update", 80, "--disable-validation", "--cpu", "--no-epoch-checkpoints")
    adam = ("--optimizer", "adam", "--lr", 0.01)
    assert flite("train", data, *adam, *updates, "--save-dir", folder, *flags) == 0
    return folder / "checkpoint_last.pt"


def random_lengths(count: int, seed: int) -> list[int]:
    """Lengths of sentences, a few of them long."""
    return [len(item) for item in random_items(count, 12, seed)] + [60, 1, 45]
