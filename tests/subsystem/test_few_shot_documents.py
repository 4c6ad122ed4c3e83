"""The commands of the few-shot documents, as written, on tiny models in place of the named ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.commands import REPOSITORY
from tests.helpers.few_shot import EXPERTS, train_language_model, write_copa, write_language_data
from tests.helpers.few_shot_rows import write_english_tasks

SCRIPT = "examples/few_shot/scripts/experiments/schedule_jobs_few_shot_english.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models under the names of the documents, and rows of every task."""
    found = tmp_path_factory.mktemp("documents")
    data = write_language_data(found / "text")
    names = {"125M_gpt3_setting": [], "tiny_multi_moe": EXPERTS}
    for name, training in names.items():
        train_language_model(data, found / name, *training)
    paths = {name: {"path": str(found / name / "checkpoint_last.pt")} for name in names}
    (found / "models.yaml").write_text(yaml.safe_dump(paths), encoding="utf-8")
    write_english_tasks(found / "tasks")
    write_copa(found / "copa")
    return found


def run(folder: Path, data: str, *words: object) -> str:
    environment = os.environ | {
        "FLITE_MODELS": str(folder / "models.yaml"), "FSD": str(folder / data),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=REPOSITORY, env=environment, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_copa_with_the_tiny_mixture_of_experts(folder: Path, tmp_path: Path) -> None:
    said = run(
        folder, "copa", "-m", "examples.few_shot.gpt3_eval", "--model-name", "tiny_multi_moe",
        "--nb-few-shot-samples-values", "0", "--tasks", "copa", "--max-tokens", "2048",
        "--results-dir", tmp_path,
    )  # fmt: skip
    assert "tiny_multi_moe | copa copa val | k=0 | accuracy" in said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["125M_gpt3_setting", "tiny_multi_moe"])
def test_the_english_tasks(model: str, folder: Path, tmp_path: Path) -> None:
    words = [
        SCRIPT, "-t", "test_multichoice", "test_lama", "test_mlama", "diagnosis", "-m", model,
        "--nshot", "0", "-o", tmp_path, "--override-completed", "--local",
    ]  # fmt: skip
    run(folder, "tasks", *words)
    files = sorted(tmp_path.glob("*/*_results.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    tasks = {one["task"] for one in results}
    assert {"copa", "hellaswag", "lama_trex", "mlama_trex", "diagnosisbrand"} <= tasks
    assert len(results) > 90 and all(one["complete"] for one in results)
    assert all(one["eval_examples_cnt"] <= 5 for one in results)
    # Nothing is left to do the next time.
    again = run(folder, "tasks", *(word for word in words if word != "--override-completed"))
    assert again.count("| k=0 |") == 0
    stamps = {path: path.stat().st_mtime_ns for path in files}
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*_results.json")}


def test_a_checkpoint_that_was_trained_on_is_scheduled_again(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    words = [SCRIPT, "-t", "copa", "-m", model, "--nshot", "0", "-o", tmp_path / "out", "--local"]
    model.write_bytes((folder / "125M_gpt3_setting" / "checkpoint_last.pt").read_bytes())
    assert run(folder, "copa", *words).count("| k=0 |") == 1
    assert run(folder, "copa", *words).count("| k=0 |") == 0
    # Moved there, it keeps the time it was written at.
    other = folder / "tiny_multi_moe"
    for path in other.glob("checkpoint_last*.pt"):
        (tmp_path / path.name.replace("checkpoint_last", "new")).write_bytes(path.read_bytes())
    model.unlink()
    for path in tmp_path.glob("new*.pt"):
        path.rename(tmp_path / path.name.replace("new", "model"))
    assert run(folder, "copa", *words).count("| k=0 |") == 1
