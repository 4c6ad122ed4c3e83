"""What `--ddp-backend deepspeed_moe` takes and what not, said in one line before any process."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite.parallel.api import Machine
from fairseq_lite.parallel.deepspeed_moe import comm
from fairseq_lite.parallel.deepspeed_moe.settings import ZeroSettings, settings
from tests.helpers.commands import flite
from tests.helpers.toy import ADAM, TINY_MODEL

CPU, GPUS = Machine(), Machine(cuda_devices=2)
INSTALLED = importlib.util.find_spec("deepspeed") is not None
MOE = ["--moe-freq", "1", "--criterion", "moe_cross_entropy", "--moe-expert-count"]


def run(*flags: str) -> RunConfig:
    words = ["data", *TINY_MODEL, *ADAM, "--ddp-backend", "deepspeed_moe", *flags]
    return parse("flite-train", words, load_builtins())


def reasons(machine: Machine, *flags: str) -> list[str]:
    backend: Any = load_builtins()["ddp_backend"].get("deepspeed_moe").factory
    with patch("importlib.util.find_spec", return_value=object()):
        found: list[str] = backend.reasons(run(*flags), machine)
    return found


def written(folder: Path, content: Any) -> str:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--zero-stage 2 --bf16 --update-freq 2",
        "--zero-stage 1 --fp16 --fp16-init-scale 4 --store-ema",
        "--zero-stage 0 --optimizer adafactor",
        "--zero-stage 0 --fp16-adam-stats",
        "--zero-stage 2 --optimizer nag",
    ],
)
@pytest.mark.parametrize("machine", [CPU, GPUS], ids=["cpu", "gpus"])
def test_what_can_be_done(machine: Machine, flags: str) -> None:
    assert reasons(machine, *flags.split(), "--distributed-world-size", "2") == []


@pytest.mark.parametrize(
    ("flags", "start", "end"),
    [
        ("--zero-stage 1 --optimizer adafactor", "--optimizer adafactor looks at whole", "stage 0"),
        ("--zero-stage 2 --optimizer lamb", "--optimizer lamb looks at whole", "--zero-stage 0"),
        ("--zero-stage 1 --fp16-adam-stats", "--fp16-adam-stats looks at whole", "stage 0"),
        ("--zero-stage 3", "--zero-stage 3: DeepSpeed does not split", "fully_sharded"),
        ("--zero-stage 4", "--zero-stage 4: expected 0, 1 or 2", ""),
        ("--deepspeed-config nowhere.json", "--deepspeed-config nowhere.json: No such file", ""),
    ],
)
def test_what_cannot(flags: str, start: str, end: str) -> None:
    (reason,) = reasons(CPU, *flags.split(), "--distributed-world-size", "2")
    assert reason.startswith(start) and reason.endswith(end)


@pytest.mark.parametrize("flags", ["--optimizer adafactor", "--fp16-adam-stats"])
def test_one_process_has_whole_parameters(flags: str) -> None:
    assert reasons(CPU, *flags.split(), "--zero-stage", "2") == []


def test_experts_that_do_not_divide() -> None:
    assert reasons(CPU, *MOE, "4", "--distributed-world-size", "2") == []
    assert reasons(CPU, *MOE, "2", "--distributed-world-size", "4") == []
    (reason,) = reasons(CPU, *MOE, "5", "--distributed-world-size", "2")
    assert "5 do not divide by 2" in reason and reason.endswith("--ddp-backend legacy_ddp")


def test_gpus_need_nccl() -> None:
    (reason,) = reasons(GPUS, "--distributed-backend", "gloo")
    assert reason.endswith("leave out --distributed-backend gloo")


def test_the_package_is_missing() -> None:
    backend: Any = load_builtins()["ddp_backend"].get("deepspeed_moe").factory
    with patch("importlib.util.find_spec", return_value=None):
        (reason,) = backend.reasons(run(), CPU)
    assert reason.startswith("--ddp-backend deepspeed_moe needs DeepSpeed: ")
    assert reason.endswith(comm.INSTALL)
    with (
        patch.dict(sys.modules, {"deepspeed": None}),
        pytest.raises(MissingDependency, match="pip install .*fairseq-lite.deepspeed"),
    ):
        comm.load("cpu")
    assert not logging.getLogger("DeepSpeed").disabled


# -- the file ---------------------------------------------------------------------------------


def test_a_file(tmp_path: Path) -> None:
    section = {
        "stage": 1,
        "reduce_bucket_size": 5e8,
        "round_robin_gradients": True,
        "use_multi_rank_bucket_allreduce": False,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
    }
    file = written(tmp_path, {"zero_optimization": section})
    assert settings(None, file) == ZeroSettings(1, 500_000_000, False, True)
    assert settings(1, file).stage == 1
    assert settings(2, None) == ZeroSettings(stage=2)
    assert settings(None, None) == ZeroSettings(stage=0)
    with pytest.raises(ConfigError, match="--zero-stage 2, but .* says zero_optimization.stage 1"):
        settings(2, file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train_batch_size": 8}, "train_batch_size is not taken: use --batch-size or --max-tok"),
        ({"train_micro_batch_size_per_gpu": 8}, "use --batch-size"),
        ({"gradient_accumulation_steps": 2}, "is not taken: use --update-freq"),
        ({"optimizer": {"type": "Adam"}}, "is not taken: use --optimizer"),
        ({"scheduler": {}}, "is not taken: use --lr-scheduler"),
        ({"fp16": {"enabled": True}}, "fp16 is not taken: use --bf16 or --fp16"),
        ({"bf16": {"enabled": True}}, "bf16 is not taken: use --bf16 or --fp16"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is not taken: use --clip-norm"),
        ({"flops_profiler": {}}, "flops_profiler would change nothing here: leave it out"),
        ({"zero_optimization": True}, "zero_optimization: expected an object"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage 3: DeepSpeed does not"),
        ({"zero_optimization": {"stage": "auto"}}, "stage 'auto': expected 0, 1 or 2"),
        ({"zero_optimization": {"stage": True}}, "stage True: expected 0, 1 or 2"),
        ({"zero_optimization": {"offload_optimizer": {}}}, "use --ddp-backend fully_sharded --cpu"),
        ({"zero_optimization": {"overlap_comm": True}}, "overlap_comm can only be false"),
        ({"zero_optimization": {"contiguous_gradients": False}}, "can only be true"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "expected a number of gradients"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "'5e8': expected a number"),
        ({"zero_optimization": {"reduce_bucket_size": math.inf}}, "inf: expected a number"),
        ({"zero_optimization": {"reduce_bucket_size": math.nan}}, "nan: expected a number"),
        ({"zero_optimization": {"round_robin_gradients": 1}}, "1: expected true or false"),
        ({"zero_optimization": {"stage3_max_live_parameters": 1}}, "would change nothing here"),
        ("[]", "expected an object"),
        ("{", "this is not JSON"),
    ],
)
def test_keys_that_are_not_taken(tmp_path: Path, content: Any, said: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        settings(None, file)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert file in str(error.value)


def test_a_package_that_does_not_start_is_told_in_one_line() -> None:
    broken = RuntimeError("this torch\nis too new")
    with (
        patch("importlib.import_module", side_effect=broken),
        pytest.raises(MissingDependency, match=r"imported \(this torch is too new\): pip install"),
    ):
        comm.load("cpu")


def test_a_package_that_does_not_start_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "deepspeed"
    broken.mkdir()
    (broken / "__init__.py").write_text("import torch\ntorch.gone\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    words = ["nowhere", *TINY_MODEL, *ADAM, "--batch-size", "4", "--cpu"]
    words += ["--ddp-backend", "deepspeed_moe", "--distributed-world-size", "2"]
    assert flite("train", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "flite-train: error: DeepSpeed cannot be imported (module 'torch' has no attribute 'gone'):"
        f" {comm.INSTALL}"
    )


# -- a guest's manners ------------------------------------------------------------------------


@pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed")
def test_the_import_is_quiet_and_changes_nothing() -> None:
    code = (
        "import logging, os, torch;"
        "from fairseq_lite.parallel.deepspeed_moe import comm;"
        "before = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads();"
        "import sys; assert 'deepspeed' not in sys.modules;"
        "comm.load('cpu');"
        "after = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads();"
        "assert before == after, set(after[0]) ^ set(before[0]);"
        "log = logging.getLogger('DeepSpeed');"
        "assert log.propagate and not log.handlers and not log.disabled;"
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam;"
        "assert 'torch._dynamo' not in sys.modules"  # two seconds of every start
    )
    environ = {k: v for k, v in os.environ.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env=environ,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_flags_need_no_deepspeed() -> None:
    code = (
        "import sys; from fairseq_lite.builtins import load_builtins; load_builtins();"
        "sys.exit('deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
