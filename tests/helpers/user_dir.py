"""The plugin in `user_dir`, imported as a command imports it: by its path."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.plugins import import_user_dir
from tests.helpers.commands import REPOSITORY

USER_DIR = REPOSITORY / "user_dir"

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install --no-build-isolation 'fairseq-lite[deepspeed]'",
)

# Two layers a side, of which the second has experts.
TINY = [
    *("--arch", "transformer_ds_moe_tiny", "--share-all-embeddings", "--dropout", "0"),
    *("--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "24"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "24"),
]


def part(name: str) -> Any:
    """A module of the plugin: `layers`, `model`, …"""
    load_builtins()
    return importlib.import_module(f"{import_user_dir(USER_DIR).__name__}.{name}")


def train_config(*flags: object) -> Any:
    """The configuration of a flite-train with the plugin."""
    words = ["data-bin", "--user-dir", USER_DIR, "--optimizer", "adam", "--max-tokens", "9", *flags]
    return parse("flite-train", [str(word) for word in words], load_builtins())
