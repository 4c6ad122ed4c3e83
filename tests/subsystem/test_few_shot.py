"""gpt3_eval on tiny language models, dense and with experts: from the command line to results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples.few_shot import results
from fairseq_lite import hub
from fairseq_lite.errors import ConfigError
from tests.helpers.commands import REPOSITORY
from tests.helpers.few_shot import (
    EXPERTS,
    evaluate,
    train_language_model,
    without_times,
    write_copa,
    write_language_data,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("few-shot-models")
    data = write_language_data(folder / "text")
    sharded = ["--ddp-backend", "fully_sharded", "--use-sharded-state", "--min-params-to-wrap", 0,
               "--distributed-world-size", 2]  # fmt: skip
    return {
        "dense": train_language_model(data, folder / "dense"),
        "moe": train_language_model(data, folder / "moe", *EXPERTS),
        "other": train_language_model(data, folder / "whole", updates=2),
        "sharded": train_language_model(data, folder / "sharded", *sharded, updates=3),
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_copa(tmp_path_factory.mktemp("few-shot-data"))


@pytest.mark.parametrize("kind", ["dense", "moe", "sharded"])
def test_a_command_evaluates_any_checkpoint(
    kind: str, models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    (found,) = evaluate(
        models[kind], "--nb-few-shot-samples-values", 0, "--tasks", "copa", "--max-tokens", 2048,
        "--data-dir", tasks, "--results-dir", tmp_path,
    )  # fmt: skip
    assert 0 <= found["accuracy"]["mean"] <= 100
    assert found["eval_examples_cnt"] == 9
    assert found["ppl_full_selected_candidate"]["mean"] > 1
    assert len(found["model"]["sha256"]) == 64


def test_scores_are_those_of_the_model_by_itself(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    (found,) = evaluate(
        models["dense"], "--nshot", 2, "--num-trials", 1, "--tasks", "copa", "--data-dir", tasks,
        "--results-dir", tmp_path, "--add-prompt-to-meta", "--add-positional-scores-to-meta",
    )  # fmt: skip
    lines = results.read_rows(tmp_path / found["predictions"][0])
    model = hub.load(models["dense"], device="cpu")
    assert isinstance(model, hub.LanguageModel)
    said = [candidate for line in lines for _, candidate in line["candidates"]]
    for candidate, one in zip(
        said, model.score([c["meta"]["prompt"] for c in said]), strict=True
    ):  # fmt: skip
        assert candidate["meta"]["positional_scores"] == pytest.approx(one.log_probs, abs=1e-4)
        assert candidate["score"] == pytest.approx(one.total, abs=1e-3)


def scores_of(found: dict[str, Any], folder: Path) -> list[float]:
    return [
        said["score"]
        for name in found["predictions"]
        for line in results.read_rows(folder / name)
        for _, said in line["candidates"]
    ]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_batches_change_no_score(
    kind: str, models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    seen = []
    for size in (1, 8, 64):
        out = tmp_path / str(size)
        (found,) = evaluate(
            models[kind], "--nshot", 4, "--num-trials", 1, "--tasks", "copa", "--data-dir", tasks,
            "--results-dir", out, "--batch-size", size, "--scoring", "mean",
        )  # fmt: skip
        seen.append(scores_of(found, out))
    assert seen[0] == pytest.approx(seen[1], abs=1e-5)
    assert seen[0] == pytest.approx(seen[2], abs=1e-5)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_several_processes_say_what_one_says(
    kind: str, models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    seen = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        (found,) = evaluate(
            models[kind], "--nshot", 2, "--num-trials", 2, "--tasks", "copa", "--data-dir", tasks,
            "--results-dir", out, "--distributed-world-size", processes, "--cpu",
        )  # fmt: skip
        seen.append((scores_of(found, out), found["accuracy"]["scores"]))
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-5)
    assert seen[0][1] == seen[1][1]


@pytest.mark.timeout(400)
def test_processes_of_a_launcher_share_the_work_and_one_writes(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    words = ["--tasks", "copa", "--nshot", "0", "2", "--num-trials", "1", "--data-dir", str(tasks),
             "--results-dir", str(tmp_path), "--cpu"]  # fmt: skip

    def launched(model: object, *more: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                   "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
                   "-m", "examples.few_shot.gpt3_eval", "--model-name", str(model)]  # fmt: skip
        done = subprocess.run(
            [*command, *words, *more], capture_output=True, text=True, timeout=150, cwd=REPOSITORY
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert launched(models["moe"]).count(" | accuracy ") == 2
    first, second = sorted(tmp_path.glob("*_results.json"))
    alone = evaluate(models["moe"], *words[:-3], "--results-dir", tmp_path / "one", "--cpu")
    for path, expected in zip((first, second), alone, strict=True):
        assert json.loads(path.read_text())["accuracy"] == expected["accuracy"]
    second.unlink()
    assert launched(models["moe"], "--skip-completed").count(" | accuracy ") == 1
    assert second.exists()


def test_one_process_of_a_launcher_answers_without_a_model(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--tasks", "copa", "--nshot", 0, "--data-dir", tasks, "--results-dir", tmp_path]
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("RANK", "1")
    assert evaluate("random", *words) == [] == list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    assert len(evaluate("random", *words)) == 1


def test_again_is_the_same_to_the_byte_but_for_the_times(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    words = ["--nshot", 1, "--num-trials", 2, "--tasks", "copa", "--data-dir", tasks]
    (one,) = evaluate(models["dense"], *words, "--results-dir", tmp_path / "one")
    (two,) = evaluate(models["dense"], *words, "--results-dir", tmp_path / "two")
    assert json.dumps(without_times(one)) == json.dumps(without_times(two))
    for name in one["predictions"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.timeout(300)
def test_a_kill_loses_no_finished_evaluation(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    words = ["--tasks", "copa", "--data-dir", tasks, "--num-trials", 3, "--cpu"]
    shots = ["--nshot", 0, 1, 2, 3, 4, 5]
    command = [sys.executable, "-m", "examples.few_shot.gpt3_eval", "--model-name", models["dense"],
               *words, *shots, "--results-dir", tmp_path / "out"]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command], cwd=REPOSITORY, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*fs1*_results.json")):
        assert process.poll() is None or process.returncode == 0
        assert time.monotonic() < deadline
        if process.returncode == 0:
            break
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*_results.json")}
    assert len(before) >= 2
    for content in before.values():
        assert json.loads(content)["complete"] is True
    found = evaluate(
        models["dense"], *words, *shots, "--results-dir", tmp_path / "out", "--skip-completed"
    )
    assert {path: path.read_bytes() for path in before} == before
    whole = evaluate(models["dense"], *words, *shots, "--results-dir", tmp_path / "whole")
    assert [without_times(each) for each in found] == [without_times(each) for each in whole]


def test_a_capacity_is_for_experts(
    models: dict[str, Path], tasks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--nshot", 0, "--tasks", "copa", "--data-dir", tasks, "--results-dir", tmp_path]
    with pytest.raises(ConfigError, match=r"--moe-eval-capacity-token-fraction 0\.5: .*no experts"):
        evaluate(models["dense"], *words, "--cap", 0.5)
    assert not [text for text in caplog.messages if "drop tokens" in text]
    (found,) = evaluate(models["moe"], *words, "--cap", 0.5)
    assert found["settings"]["moe_eval_capacity_token_fraction"] == 0.5
    (said,) = [text for text in caplog.messages if "drop tokens" in text]
    assert "scores depend on what is computed together: --batch-size, --max-tokens" in said
    (other,) = evaluate(models["moe"], *words, "--cap", 0.5, "--max-tokens", 64)
    assert other["settings_hash"] != found["settings_hash"]


def test_a_checkpoint_that_is_not_there_is_one_line(tasks: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.few_shot.gpt3_eval", "--model-name", str(tmp_path / "no"),
         "--tasks", "copa", "--nshot", "0", "--data-dir", str(tasks),
         "--results-dir", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "no") in done.stderr.strip().splitlines()[-1]


def test_results_of_another_checkpoint_under_the_same_name_are_made_anew(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    words = ["--tasks", "copa", "--nshot", 0, "--data-dir", tasks, "--results-dir",
             tmp_path / "out", "--skip-completed"]  # fmt: skip
    path.write_bytes(models["dense"].read_bytes())
    (one,) = evaluate(path, *words)
    (same,) = evaluate(path, *words)
    assert same["times"] == one["times"]
    path.write_bytes(models["other"].read_bytes())
    (other,) = evaluate(path, *words)
    assert other["model"]["sha256"] != one["model"]["sha256"]
    path.unlink()
    (kept,) = evaluate(path, *words)
    assert kept == other
