"""A flag that changes nothing is accepted, and whoever types it is told."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config import idle
from fairseq_lite.config.commands import COMMANDS
from fairseq_lite.config.parse import parse

TRAIN = ["data", "--arch", "transformer_tiny", "--optimizer", "adam"]
SHARDED = ["--ddp-backend", "fully_sharded"]


def warnings_of(caplog, command, *argv):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        parse(command, list(argv), load_builtins())
    return [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize(
    "argv",
    [
        ["--train-subset", "x"],
        ["--max-valid-steps", "3"],
        ["--fp16-init-scale", "4"],
        ["--tensorboard-logdir", "tb"],
        ["--profile"],
        ["--eval-bleu"],
        ["--diverse-beam-strength", "0.9"],
        ["--retain-dropout-modules", "X"],
        ["--unnormalized", "--lenpen", "2"],
        ["--match-source-len", "--max-len-b", "2"],
    ],
)
def test_generate_warns(caplog, argv):
    (line,) = warnings_of(caplog, "flite-generate", "data", *argv)
    assert "has no effect" in line and any(word in line for word in argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--fp16", "--fp16-init-scale", "4"],
        [*SHARDED, "--fp32-reduce-scatter", "--memory-efficient-bf16"],
        ["--save-interval-updates", "2", "--keep-interval-updates", "3"],
        ["--store-ema", "--ema-decay", "0.9"],
        ["--eval-bleu", "--eval-bleu-remove-bpe"],
        ["--max-valid-steps", "3", "--profile", "--tensorboard-logdir", "tb"],
    ],
)
def test_train_uses_these(caplog, argv):
    assert warnings_of(caplog, "flite-train", *TRAIN, *argv) == []


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("flite-train", [*TRAIN, "--ema-decay", "0.9"]),
        ("flite-train", [*TRAIN, *SHARDED, "--fp32-reduce-scatter"]),
        ("flite-train", [*TRAIN, "--keep-interval-updates", "3"]),
        ("flite-train", [*TRAIN, "--gen-subset", "test"]),
        ("flite-eval-lm", ["data", "--shorten-data-split-list", "train"]),
        ("flite-eval-lm", ["data", "--shorten-data-split-list", "a", "--shorten-method", "none"]),
        ("flite-train", [*TRAIN, "--reset-optimizer", "--optimizer-overrides", '{"lr": 1}']),
        ("flite-train", [*TRAIN, "--disable-validation", "--validate-interval", "2"]),
        ("flite-train", [*TRAIN, "--combine-valid-subsets", "--valid-subset", "valid1"]),
        ("flite-train", [*TRAIN, "--no-save", "--keep-best-checkpoints", "2"]),
        ("flite-validate", ["data", "--quiet"]),
        ("flite-validate", ["data", "--results-path", "out"]),
        ("flite-interactive", ["data", "--quiet"]),
        ("flite-interactive", ["data", "--gen-subset", "valid"]),
        ("flite-preprocess", ["--only-source", "--trainpref", "x", "--bf16"]),
        ("flite-preprocess", ["--only-source", "--trainpref", "x", "--thresholdtgt", "3"]),
    ],
)
def test_others_warn(caplog, command, argv):
    (line,) = warnings_of(caplog, command, *argv)
    assert "has no effect" in line


def test_what_a_yaml_of_another_command_says_is_no_flag_typed(caplog, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("common: {profile: true}\ndataset: {max_valid_steps: 3}\n")
    assert warnings_of(caplog, "flite-generate", "data", "--config", str(path)) == []


def test_the_tables_name_fields_that_exist():
    registries = load_builtins()
    known = set()
    for command in COMMANDS.values():
        for config in command.sections.values():
            known |= {f.name for f in dataclasses.fields(config)}
    for task in ("translation", "language_modeling"):
        known |= {f.name for f in dataclasses.fields(registries["task"].get(task).config)}
    known |= {f.name for f in dataclasses.fields(registries["model"].get("transformer").config)}
    known |= {
        f.name for f in dataclasses.fields(registries["ddp_backend"].get("fully_sharded").config)
    }
    named = set(idle._NEEDS) | set(idle._OVERRULED)
    named |= {o for others in (*idle._NEEDS.values(), *idle._OVERRULED.values()) for o in others}
    for fields in idle._UNREAD.values():
        named |= fields
    assert named <= known
