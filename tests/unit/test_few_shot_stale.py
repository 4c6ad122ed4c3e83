"""Results that are made anew: those of other settings, another checkpoint, other data."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from examples.few_shot import results, stale
from examples.few_shot.models import loading
from examples.few_shot.settings import PlannedEvaluation, plan
from tests.helpers.few_shot import write_copa


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Of an evaluation with shots, which needs a model."""
    write_copa(tmp_path / "data", train=6, val=4)
    return {
        "tasks": "copa", "nb_few_shot_samples_values": [2], "num_trials": 1,
        "data_dir": str(tmp_path / "data"), "results_dir": str(tmp_path / "out"),
    }  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose digest is that of its bytes."""

    def digest(name: str, options: object) -> str | None:
        path = Path(name)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    monkeypatch.setattr(loading, "digest_of_files", digest)
    path = tmp_path / "models" / "model.pt"
    path.parent.mkdir()
    path.write_text("first")
    return path


def planned(model: Path, values: dict[str, Any], **changed: Any) -> PlannedEvaluation:
    (found,) = plan(str(model), **{**values, **changed})
    return found


def finish(one: PlannedEvaluation, model: Path) -> None:
    """Write results of the checkpoint and the data that are there."""
    results.write_results(
        one.results_file,
        {
            "format": results.FORMAT,
            "complete": True,
            "settings": dict(one.settings),
            "model": {"sha256": hashlib.sha256(model.read_bytes()).hexdigest()},
            "data": stale.data_digests(one),
        },
    )


def test_a_checkpoint_that_is_trained_again_is_evaluated_again_each_time(
    model: Path, values: dict[str, Any]
) -> None:
    one = planned(model, values)
    assert not stale.is_done(one)
    finish(one, model)
    assert stale.is_done(one)
    for text in ("second", "first"):  # each time in the same process
        model.write_text(text)
        assert not stale.is_done(one)
        finish(one, model)
        assert stale.is_done(one)


def test_a_checkpoint_that_was_put_there_with_its_old_date_is_another_one(
    model: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "older.pt"
    other.write_text("older")
    os.utime(other, (1e9, 1e9))
    one = planned(model, values)
    finish(one, model)
    shutil.copy2(other, model)
    assert model.stat().st_mtime == 1e9
    assert not stale.is_done(one)


def test_a_checkpoint_that_was_only_touched_or_is_gone_leaves_its_results(
    model: Path, values: dict[str, Any]
) -> None:
    one = planned(model, values)
    finish(one, model)
    os.utime(model)
    assert stale.is_done(one)
    model.unlink()
    assert stale.is_done(one)
    model.with_name("model_last.pt").write_text("its neighbour")
    assert stale.is_done(one)


@pytest.mark.parametrize("name", ["val", "train"])
def test_data_that_have_changed_are_evaluated_again(
    name: str, model: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    one = planned(model, values)
    finish(one, model)
    path = tmp_path / "data" / "COPA" / f"{name}.jsonl"
    text = path.read_text()
    path.write_text(text)
    assert stale.is_done(one)
    path.write_text(text.replace("The ", "A "))
    assert not stale.is_done(one)
    path.unlink()
    assert stale.is_done(one)


def test_shots_that_are_not_asked_for_do_not_count(
    model: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    one = planned(model, values, nb_few_shot_samples_values=[0])
    finish(one, model)
    (tmp_path / "data" / "COPA" / "train.jsonl").write_text("{}\n")
    assert stale.is_done(one)


@pytest.mark.parametrize(
    "changed",
    [
        {"scoring": "mean"}, {"num_trials": 2}, {"seed": 1}, {"n_eval_samples": 3},
        {"nb_few_shot_samples_values": [1]}, {"train_sep": "\n"}, {"bf16": True},
        {"copa_template": "xcopa_mt"}, {"copa_eval_set": "train"}, {"cause_conj": " as "},
        {"uniform_sampling": True}, {"allow_test_shots": True}, {"skip_context_scores": True},
    ],
)  # fmt: skip
def test_other_settings_are_another_evaluation(
    changed: dict[str, Any], model: Path, values: dict[str, Any]
) -> None:
    one, other = planned(model, values), planned(model, values, **changed)
    finish(one, model)
    assert not stale.is_done(other)
    # Not by its name alone: what stands in another's file counts by what it says.
    one.results_file.rename(other.results_file)
    assert not stale.is_done(other)
