"""What `--fsdp-engine fairscale` cannot do is said in one line, with what to type instead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import BACKENDS, Machine
from tests.helpers.commands import flite
from tests.helpers.toy import ADAM, TINY_MODEL

GPUS = Machine(cuda_devices=2)
FAIRSCALE = ["--ddp-backend", "fully_sharded", "--fsdp-engine", "fairscale"]
NEEDS_GPU = "--fsdp-engine fairscale needs a GPU, and this run has none: use --fsdp-engine torch"


def run(*flags: str) -> RunConfig:
    words = ["data", *TINY_MODEL, *ADAM, *FAIRSCALE, *flags]
    return parse("flite-train", words, load_builtins())


def reasons(machine: Machine, *flags: str) -> list[str]:
    asked = run(*flags)
    found: list[str] = BACKENDS.get("fully_sharded").factory.reasons(asked, machine)
    return found


def test_without_the_package() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(
            sys.modules, "fairseq_lite.parallel.fully_sharded.fairscale_engine", raising=False
        )
        patch.delitem(
            sys.modules, "fairseq_lite.parallel.fully_sharded.fairscale_model", raising=False
        )
        patch.setitem(sys.modules, "fairscale", None)
        patch.setitem(sys.modules, "fairscale.nn.data_parallel", None)
        (reason,) = reasons(GPUS)
    assert "pip install 'fairseq-lite[fairscale]', or use --fsdp-engine torch" in reason


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("fairscale", reason="fairscale is not installed")

    def test_on_a_cpu(self) -> None:
        assert reasons(Machine())[0] == NEEDS_GPU
        assert reasons(GPUS, "--cpu")[0] == NEEDS_GPU

    @pytest.mark.parametrize(
        "flags",
        ["", "--cpu-offload --bf16", "--checkpoint-activations", "--use-sharded-state", "--fp16"],
    )
    def test_what_works_on_gpus(self, flags: str) -> None:
        assert reasons(GPUS, *flags.split()) == []
        assert reasons(Machine(cuda_devices=1), *flags.split()) == []

    @pytest.mark.parametrize(
        ("flags", "start"),
        [
            ("--encoder-layerdrop 0.1", "--encoder-layerdrop leaves out layers"),
            ("--decoder-layerdrop 0.1", "--decoder-layerdrop leaves out layers"),
            ("--fp16-adam-stats", "--fp16-adam-stats looks at whole parameters"),
            ("--optimizer adafactor", "--optimizer adafactor looks at whole parameters"),
            ("--optimizer lamb", "--optimizer lamb looks at whole parameters"),
        ],
    )
    @pytest.mark.parametrize("gpus", [1, 2])
    def test_what_rows_cannot_hold(self, flags: str, start: str, gpus: int) -> None:
        found = reasons(Machine(cuda_devices=gpus), *flags.split())
        assert found[-1].startswith(start) and found[-1].endswith(": use --fsdp-engine torch")

    def test_the_command_says_so(
        self, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [*TINY_MODEL, *ADAM, *FAIRSCALE, "--cpu", "--batch-size", "4"]
        assert flite("train", toy_data, *words, "--save-dir", tmp_path) != 0
        assert capsys.readouterr().err.splitlines() == [f"flite-train: error: {NEEDS_GPU}"]

    def test_models_that_rows_cannot_hold(self) -> None:
        from fairseq_lite.parallel.fully_sharded.fairscale_model import check_rows

        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        check_rows(model, list(model))
        model[1].weight = model[0].weight
        with pytest.raises(ConfigError, match="cannot share 0.weight with 1.weight of another"):
            check_rows(model, list(model))
        check_rows(model, [])  # one row for all: nothing lies in two
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].bias.requires_grad_(False)
        with pytest.raises(ConfigError, match="1.weight and 1.bias differ: use --fsdp-engine"):
            check_rows(model, list(model))
        model[1].weight.requires_grad_(False)
        check_rows(model, list(model))  # a layer as a whole
