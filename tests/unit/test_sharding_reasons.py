"""What sharding cannot do is said in one line, before any process starts."""

from __future__ import annotations

from typing import Any

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import Machine
from tests.helpers.toy import ADAM, TINY_MODEL

CPU, GPUS = Machine(), Machine(cuda_devices=2)


def run(*flags: str, backend: str = "fully_sharded") -> RunConfig:
    words = ["data", *TINY_MODEL, *ADAM, "--ddp-backend", backend, *flags]
    return parse("flite-train", words, load_builtins())


def chosen() -> Any:
    return load_builtins()["ddp_backend"].get("fully_sharded").factory


def reasons(machine: Machine, *flags: str) -> list[str]:
    found: list[str] = chosen().reasons(run(*flags), machine)
    return found


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--cpu-offload --no-reshard-after-forward --fp32-reduce-scatter --use-sharded-state",
        "--fp16 --fp16-init-scale 4",
        "--memory-efficient-fp16",
        "--bf16 --checkpoint-activations --offload-activations --min-params-to-wrap 0",
        "--optimizer cpu_adam --cpu-offload",
        "--optimizer adamax",
    ],
)
@pytest.mark.parametrize("machine", [CPU, GPUS], ids=["cpu", "gpus"])
def test_what_can_be_done(machine: Machine, flags: str) -> None:
    assert reasons(machine, *flags.split(), "--distributed-world-size", "2") == []


@pytest.mark.parametrize(
    ("flags", "start", "end"),
    [
        ("--optimizer adafactor", "--optimizer adafactor looks at whole", "legacy_ddp"),
        ("--optimizer lamb", "--optimizer lamb looks at whole parameters", "legacy_ddp"),
        ("--fp16-adam-stats", "--fp16-adam-stats scales whole tensors", "legacy_ddp"),
    ],
)
def test_rules_for_whole_parameters(flags: str, start: str, end: str) -> None:
    words = flags.split()
    (reason,) = reasons(CPU, *words, "--distributed-world-size", "2")
    assert reason.startswith(start) and reason.endswith(end)
    assert reasons(CPU, *words) == [], "one process has whole parameters"
    with pytest.raises(ConfigError, match=start):
        chosen().check(run(*words, "--distributed-world-size", "2"), CPU)


def test_on_gpus() -> None:
    (reason,) = reasons(GPUS, "--distributed-backend", "gloo")
    assert "needs NCCL" in reason
    (reason,) = reasons(GPUS, "--optimizer", "cpu_adam")
    assert "add --cpu-offload" in reason
    assert reasons(CPU, "--optimizer", "cpu_adam") == []


def test_flags_of_sharding_belong_to_it() -> None:
    with pytest.raises(ConfigError, match="--cpu-offload belongs to --ddp-backend fully_sharded"):
        run("--cpu-offload", backend="legacy_ddp")
    with pytest.raises(ConfigError, match="--fsdp-engine"):
        run("--fsdp-engine", "deepspeed")
