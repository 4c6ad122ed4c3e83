"""The same training as fairseq: its initial weights, its first updates, to the printed digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairseq_lite.config.core import RunConfig
from fairseq_lite.parallel.world import World
from fairseq_lite.training import trainer as trainer_module
from fairseq_lite.training.run import train
from tests.helpers.reference import (
    assert_equals_reference,
    differ,
    reference_log,
    train_here,
    train_inner,
)
from tests.helpers.shared import shared_dir

DIMENSIONS = (
    "--encoder-embed-dim 128 --decoder-embed-dim 128 --encoder-ffn-embed-dim 256 "
    "--decoder-ffn-embed-dim 256 --encoder-layers 2 --decoder-layers 2 "
    "--encoder-attention-heads 4 --decoder-attention-heads 4 --share-all-embeddings"
)
SMOOTHED = "--max-tokens 2000 --criterion label_smoothed_cross_entropy --label-smoothing 0.1"
VARIANTS = {
    "uf1": SMOOTHED,
    "uf2": f"{SMOOTHED} --update-freq 2",
    "sentavg": SMOOTHED.replace("0.1", "0.0") + " --sentence-avg",
    "ce_bs48": "--max-tokens 2000 --criterion cross_entropy --batch-size 48",
    "np2": f"{SMOOTHED} --distributed-world-size 2",
}


def command_line(variant: str, log: Path, updates: int) -> list[str]:
    """The reference's command, with our log file."""
    reference = shared_dir("reference", "mt")
    return [
        str(reference / "data-bin"),
        *"-s en -t de --arch transformer --optimizer adam --adam-betas (0.9,0.98)".split(),
        *DIMENSIONS.split(),
        *f"--restore-file {reference / 'init.pt'} --reset-optimizer --reset-lr-scheduler".split(),
        *"--reset-meters --reset-dataloader --seed 7 --lr-scheduler inverse_sqrt".split(),
        *"--warmup-updates 100 --weight-decay 0.0001 --clip-norm 1.0 --dropout 0 --lr 1e-3".split(),
        *f"--max-update {updates} --log-format json --log-interval 1".split(),
        *f"--disable-validation --no-save --cpu --log-file {log}".split(),
        *VARIANTS[variant].split(),
    ]


def our_log(variant: str, folder: Path, updates: int, fn: Any = train) -> list[dict[str, Any]]:
    log = folder / "log.txt"
    train_here(command_line(variant, log, updates), fn)
    return train_inner(log)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_twenty_updates_equal_the_reference(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equals_reference("mt", variant, command_line, tmp_path, monkeypatch)


# A comparison that has never failed proves nothing: two bugs that have happened, put in on purpose.


def train_with_local_sample_size(run: RunConfig, world: World) -> None:
    """Train, but divide the gradient by this rank's sample size instead of all ranks'."""
    own_sum = world.sum

    def local_sample_size(values: Any) -> dict[str, float]:
        total = own_sum(values)
        if "sample_size" in values:
            total["sample_size"] = float(values["sample_size"]) * world.size
        return total

    world.sum = local_sample_size  # type: ignore[method-assign]
    train(run, world)


@pytest.mark.timeout(120)
def test_dividing_by_the_local_sample_size_is_noticed(tmp_path: Path) -> None:
    ours = our_log("np2", tmp_path, updates=3, fn=train_with_local_sample_size)
    assert differ(ours, reference_log("mt", "np2", 3), "gnorm")


@pytest.mark.timeout(120)
def test_dropping_the_gradient_of_a_micro_batch_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(self: trainer_module.Trainer, batches: Any) -> dict[str, Any]:
        totals: dict[str, Any] = {}
        for batch in batches:
            self.optimizer.zero_grad()  # the bug: only the last micro-batch is left
            loss, sums = self._forward(batch)
            self.backend.backward(self.model, loss)
            trainer_module.add_sums(totals, sums)
        return totals

    monkeypatch.setattr(trainer_module.Trainer, "_accumulate", forget)
    ours, theirs = our_log("uf2", tmp_path, updates=3), reference_log("mt", "uf2", 3)
    assert ours[0]["loss"] == theirs[0]["loss"], "the sums themselves are right"
    assert differ(ours, theirs, "gnorm")
