"""Language models train as in fairseq: its initial weights, its first updates, its digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq_lite.data import blocks, monolingual
from tests.helpers.reference import (
    assert_equals_reference,
    differ,
    reference_log,
    train_here,
    train_inner,
)
from tests.helpers.shared import shared_dir

MODES = ("none", "complete", "eos")


def command_line(mode: str, log: Path, updates: int) -> list[str]:
    """The reference's command, with our log file."""
    reference = shared_dir("reference", "lm")
    return [
        str(reference / "data-bin"),
        *"--task language_modeling --arch transformer_lm_gpt2_tiny".split(),
        *"--share-decoder-input-output-embed --criterion cross_entropy --optimizer adam".split(),
        *"--adam-betas (0.9,0.98) --weight-decay 0.01 --seed 7 --dropout 0".split(),
        *"--attention-dropout 0 --tokens-per-sample 128 --max-tokens 1024".split(),
        *f"--sample-break-mode {mode} --lr 1e-3 --lr-scheduler polynomial_decay".split(),
        *"--warmup-updates 5 --total-num-update 40 --clip-norm 0.5".split(),
        *f"--restore-file {reference / 'init.pt'} --reset-optimizer --reset-lr-scheduler".split(),
        *f"--reset-meters --reset-dataloader --max-update {updates} --log-format json".split(),
        *f"--log-interval 1 --disable-validation --no-save --cpu --log-file {log}".split(),
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_twenty_updates_equal_the_reference(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equals_reference("lm", mode, command_line, tmp_path, monkeypatch)


# A comparison that has never failed proves nothing: mistakes in the data, put in on purpose.


def our_log(mode: str, folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.txt"
    train_here(command_line(mode, log, updates=20))
    return train_inner(log)


def forget_the_token_before(patch: pytest.MonkeyPatch) -> None:
    """Every block follows eos, also one in the middle of a sentence."""
    patch.setattr(blocks.TokenBlocks, "before", lambda self, i, eos: np.full(len(i), eos))


def order_as_permuted(patch: pytest.MonkeyPatch) -> None:
    """Blocks of equal length as a permutation lists them, not by the number they drew."""
    patch.setattr(
        monolingual, "draw", lambda count, seed: np.random.RandomState(seed).permutation(count)
    )


def leave_room_in_blocks(patch: pytest.MonkeyPatch) -> None:
    """Blocks that may not be quite full."""
    following = blocks._next_block
    patch.setattr(blocks, "_next_block", lambda e, lengths, size: following(e, lengths, size - 1))


def keep_the_last_token(patch: pytest.MonkeyPatch) -> None:
    """The source is the target: a model would see what it is to predict."""
    patch.setattr(monolingual, "shift_right", lambda tokens, sizes, first: tokens)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("mode", "bug", "key"),
    [
        ("none", forget_the_token_before, "loss"),
        ("none", order_as_permuted, "loss"),
        ("eos", order_as_permuted, "loss"),
        ("complete", leave_room_in_blocks, "wpb"),
        ("eos", keep_the_last_token, "loss"),
    ],
)
def test_a_bug_is_noticed(
    mode: str, bug: Any, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    assert differ(our_log(mode, tmp_path), reference_log("lm", mode, updates=20), key)
