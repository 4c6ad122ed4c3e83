"""Few-shot evaluation of tiny models, dense and with experts: on the CPU, and on CUDA too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.few_shot import results
from tests.helpers.few_shot import (
    EXPERTS,
    evaluate,
    train_language_model,
    write_copa,
    write_language_data,
)

GPUS = torch.cuda.device_count()
no_gpu = pytest.mark.skipif(not GPUS, reason="no GPU: torch.cuda.device_count() is 0")

LANGUAGES = ["--task", "multilingual_language_modeling", "--langs", "de,en"]
CAPACITY = ["--cap", "1."]

# Name -> data folder, flags of training, flags of evaluation.
MODELS: dict[str, tuple[str, list[str], list[str]]] = {
    "tiny": ("one", [], []),
    "tiny_moe": ("one", EXPERTS, []),
    "tiny_moe_cap": ("one", EXPERTS, CAPACITY),
    "tiny_multi": ("several", LANGUAGES, []),
    "tiny_multi_moe": ("several", [*LANGUAGES, *EXPERTS], CAPACITY),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("few-shot")
    write_copa(found / "tasks", val=8)
    one = write_language_data(found / "text")
    data = {"one": one, "several": in_languages(one, found / "several")}
    for name, (kind, training, _) in MODELS.items():
        train_language_model(data[kind], found / name, *training)
    return found


def in_languages(data: Path, folder: Path) -> Path:
    """A data folder as of several languages, whose texts are one."""
    shutil.copytree(data, folder)
    for language in ("de", "en"):
        shutil.copytree(data, folder / language)
    return folder


def run(folder: Path, name: str, out: Path, *words: object) -> tuple[dict[str, Any], list[float]]:
    (found,) = evaluate(
        folder / name / "checkpoint_last.pt", "--tasks", "copa", "--nb-few-shot-samples-values", 0,
        "--max-tokens", 2048, "--data-dir", folder / "tasks", "--results-dir", out,
        *MODELS[name][2], *words,
    )  # fmt: skip
    lines = results.read_rows(out / found["predictions"][0])
    return found, [said["score"] for line in lines for _, said in line["candidates"]]


@pytest.mark.parametrize("name", MODELS)
def test_copa_on_the_cpu(name: str, folder: Path, tmp_path: Path) -> None:
    found, scores = run(folder, name, tmp_path, "--cpu")
    assert found["eval_examples_cnt"] == 8
    assert found["accuracy"]["mean"] in {100 * n / 8 for n in range(9)}
    assert len(scores) == 16 and all(score < 0 for score in scores)


@no_gpu
@pytest.mark.parametrize("name", MODELS)
def test_copa_on_cuda_is_copa_on_the_cpu(name: str, folder: Path, tmp_path: Path) -> None:
    here, expected = run(folder, name, tmp_path / "cpu", "--cpu")
    there, scores = run(folder, name, tmp_path / "cuda")
    assert scores == pytest.approx(expected, abs=1e-2)
    assert there["accuracy"]["mean"] == pytest.approx(here["accuracy"]["mean"], abs=12.5)


@no_gpu
@pytest.mark.parametrize("precision", ["--fp16", "--bf16"])
def test_half_precision_is_near(precision: str, folder: Path, tmp_path: Path) -> None:
    _, expected = run(folder, "tiny_moe", tmp_path / "cpu", "--cpu")
    _, scores = run(folder, "tiny_moe", tmp_path / "half", precision)
    assert scores == pytest.approx(expected, rel=5e-2)


@pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, there are {GPUS}")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MODELS)
def test_two_gpus_say_what_one_says(name: str, folder: Path, tmp_path: Path) -> None:
    _, one = run(folder, name, tmp_path / "one")
    _, two = run(folder, name, tmp_path / "two", "--distributed-world-size", 2)
    assert two == pytest.approx(one, abs=1e-3)
