"""The table of what the smoke tier runs, and why it leaves out the rest.

A row is one way to train: a backend on so many processes in some precision, with some feature. The
cross of backends, world sizes, precisions and update frequencies is run plain; features are crossed
with backends and world sizes. `left_out` says what cannot run, `spared` what would show nothing new
for the seconds that processes take to start. A new backend appears by itself, as it registers; a
new feature is one line in `FEATURES`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import Machine
from fairseq_lite.registry import Registry
from tests.helpers.toy import ADAM, TINY_MODEL

WORLD_SIZES = (1, 2)
UPDATE_FREQS = (1, 2)
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("--bf16",),
    "amp": ("--amp",),
    "fp16": ("--fp16",),
}
# What is added to the command line of training. "plain" adds nothing.
FEATURES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "smoothing": (
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
        *("--report-accuracy", "--sentence-avg", "--clip-norm", "0.5"),
    ),
    "bleu": (
        *("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}'),
        *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
    ),
    "adafactor": (
        *("--optimizer", "adafactor", "--lr-scheduler", "polynomial_decay"),
        *("--total-num-update", "10"),
    ),
    "experts": (
        *("--moe-freq", "1", "--moe-expert-count", "4", "--use-moe-pad-mask"),
        *("--moe-batch-prioritized-routing", "--checkpoint-activations"),
        *("--criterion", "moe_label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    ),
    "small-memory": ("--checkpoint-activations", "--encoder-layerdrop", "0.2"),
    # Of fully_sharded; other backends do not know the flags.
    "offload": (
        *("--cpu-offload", "--optimizer", "cpu_adam", "--store-ema"),
        *("--offload-activations", "--min-params-to-wrap", "0"),
    ),
    "shards": (
        *("--use-sharded-state", "--no-reshard-after-forward", "--fp32-reduce-scatter"),
        *("--min-params-to-wrap", "0"),
    ),
    # Of deepspeed_moe.
    "zero": ("--zero-stage", "2", "--bf16", "--store-ema", "--clip-norm", "0.5"),
    "fairscale": (
        *("--fsdp-engine", "fairscale", "--cpu-offload", "--bf16", "--fp32-reduce-scatter"),
        *("--checkpoint-activations", "--eval-bleu", "--store-ema"),
    ),
}


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        backend: a name of `--ddp-backend`.
        world_size: number of processes.
        precision: a key of `PRECISIONS`.
        update_freq: batches in an update.
        feature: a key of `FEATURES`.
        device: "cpu" or "cuda".
    """

    backend: str
    world_size: int
    precision: str = "fp32"
    update_freq: int = 1
    feature: str = "plain"
    device: str = "cpu"

    def __str__(self) -> str:
        freq = f"uf{self.update_freq}"
        return f"{self.backend}-{self.world_size}x-{self.precision}-{freq}-{self.feature}"

    def train_args(self) -> list[str]:
        """The flags that make this row, without data, model and length of the training."""
        common = ["--ddp-backend", self.backend, "--distributed-world-size", str(self.world_size)]
        frequency = ["--update-freq", str(self.update_freq)]
        cpu = ["--cpu"] if self.device == "cpu" else []
        return [*common, *frequency, *cpu, *PRECISIONS[self.precision], *FEATURES[self.feature]]


@functools.cache
def _registries() -> Mapping[str, Registry]:
    return load_builtins()


def backends() -> tuple[str, ...]:
    """The distributed backends, without their other names."""
    registry = _registries()["ddp_backend"]
    return tuple(name for name in registry.names() if registry.get(name).of is None)


def rows(device: str) -> list[Row]:
    """The whole table for a kind of device, what cannot run included."""
    plain = itertools.product(backends(), WORLD_SIZES, PRECISIONS, UPDATE_FREQS)
    featured = itertools.product(backends(), WORLD_SIZES, (f for f in FEATURES if f != "plain"))
    return [
        *(Row(b, n, p, u, device=device) for b, n, p, u in plain),
        *(Row(b, n, feature=f, device=device) for b, n, f in featured),
    ]


def parsed(row: Row) -> RunConfig:
    """The row's command line, read as flite-train reads it."""
    args = ["data-bin", *TINY_MODEL, *ADAM, "--batch-size", "8", *row.train_args()]
    return parse("flite-train", args, _registries())


def left_out(row: Row, machine: Machine) -> str | None:
    """Why the row is not run on `machine`; None if it is.

    The reason is the line the user would see: that of the parser, or of the backend's check.
    """
    try:
        run = parsed(row)
    except ConfigError as e:
        return str(e)
    reasons = _registries()["ddp_backend"].get(row.backend).factory.reasons(run, machine)
    return reasons[0] if reasons else None


def spared(row: Row) -> str | None:
    """Why a row that could be run is not worth its seconds; None if it is."""
    if row.update_freq > 1 and row.precision in ("amp", "fp16"):
        return "accumulation is seen in fp32 and bf16"
    if row.backend == "legacy_ddp" or row.world_size == 1:
        return None
    plain = row.feature == "plain"
    if plain and (row.precision, row.update_freq) not in (("fp32", 1), ("bf16", 2), ("fp16", 1)):
        return "each precision and each update frequency is seen once"
    if row.feature == "smoothing":
        return "the criterion does not know the backend"
    return None
