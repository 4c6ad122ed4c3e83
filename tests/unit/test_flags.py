"""Every flag: the golden list, and fairseq's own list row by row."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.commands import COMMANDS
from fairseq_lite.config.fairseq_flags import (
    COMING,
    FAIRSEQ_FLAGS,
    FORMER,
    IDLE,
    NO_EFFECT,
    REFUSED,
)
from fairseq_lite.config.flags import converter
from fairseq_lite.config.parse import describe_flags, owned_flags, parse
from fairseq_lite.errors import ConfigError
from tests.helpers.shared import shared_dir

GOLDEN = Path(__file__).parent / "golden" / "flags.txt"
REGENERATE = "python scripts/write_flag_pages.py"


def test_the_golden_list_of_flags():
    registries = load_builtins()
    lines = [line for name in COMMANDS for line in describe_flags(name, registries)]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text("utf-8"), f"to renew it: {REGENERATE}"


def _rows() -> list[dict[str, str]]:
    with open(shared_dir("reference", "fairseq-flags.tsv"), newline="") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize(
    "command",
    [
        *("preprocess", "generate", "interactive", "validate", "eval_lm"),
        *("train:translation", "train:lm", "train:multilingual_lm"),
    ],
)
def test_every_flag_of_fairseqs_works_or_is_refused_by_name(command):
    """`works`: owned by the command, or by an entry, or refused as coming, or idle in fairseq."""
    name = f"flite-{command.split(':')[0].replace('_', '-')}"
    owned = owned_flags(name, load_builtins())
    silent = []
    for row in _rows():
        kinds = row["commands"].split()
        entry = any(k.startswith(("optimizer:", "lr_scheduler:")) for k in kinds)
        if command not in kinds and not (entry and name == "flite-train"):
            continue
        flag = row["flag"]
        if row["here"] == "works":
            idle = IDLE.get(command.split(":")[0], frozenset())
            # Sections of ours may take what fairseq's command ignored, but never both.
            if not (flag in owned or flag in COMING or flag in idle):
                silent.append(flag)
        elif row["here"] == "refused":
            assert flag in REFUSED and flag not in owned, flag
        else:
            assert flag in NO_EFFECT and flag not in owned, flag
    assert silent == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--raw-text", "--raw-text: in .*older recipes: .* --dataset-impl raw now"),
        ("--lazy-load", "--lazy-load: .*leave it out"),
        ("--min-lr 1e-9", "belongs to --lr-scheduler cosine .*you chose .*; .*--stop-min-lr now"),
    ],
)
def test_flags_of_older_recipes(words, line):
    argv = ["data", "--arch", "transformer_tiny", "--optimizer", "adam", *words.split()]
    with pytest.raises(ConfigError, match=line):
        parse("flite-train", argv, load_builtins())
    assert all(flag not in FAIRSEQ_FLAGS or flag == "--min-lr" for flag in FORMER)


@pytest.mark.parametrize("command", ["flite-generate", "flite-eval-lm"])
def test_one_split_at_a_time(command):
    with pytest.raises(ConfigError, match="train,valid: expected one .* --gen-subset train; run"):
        parse(command, ["data", "--path", "m.pt", "--gen-subset", "train,valid"], load_builtins())


def test_compatibility_page_lists_what_is_coming():
    page = (Path(__file__).parents[2] / "docs" / "fairseq-compatibility.md").read_text("utf-8")
    for flag in COMING:
        assert f"`{flag}`" in page, flag


@pytest.mark.parametrize("text", ["x", "1.5", "inf", "-inf", "nan", "1e999"])
def test_a_whole_number_is_expected(text):
    assert converter(int)("1e6") == 1_000_000
    with pytest.raises(ValueError, match="^expected a whole number$"):
        converter(int)(text)
