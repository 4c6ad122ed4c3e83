"""The diagnosis tasks."""

from __future__ import annotations

from pathlib import Path

from examples.few_shot.tasks.api import GROUPS, task_names
from tests.helpers.few_shot_tasks import (
    full_prompt,
    make_task,
    make_template,
    reason,
    scores_of,
    write_jsonl,
)


def test_diagnosis(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "diagnosis/city.test.jsonl",
        {"choices": ["apple", "Rome", "blue"], "label": 1},
        {"choices": ["Oslo", "pear"], "label": 0},
    )
    task = make_task("diagnosiscity", tmp_path)
    assert (task.train_set, task.eval_set) == ("train", "test")
    first, second = task.samples("test")
    assert first.candidates == ("0", "1", "2") and first.correct == ("1",)
    template = make_template("diagnosis")
    assert full_prompt(template, second, first) == [
        "apple, Rome, blue → Rome\nOslo, pear → Oslo",
        "apple, Rome, blue → Rome\nOslo, pear → pear",
    ]
    assert set(scores_of(task, template, [first, second])) == {"accuracy"}


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    task = make_task("diagnosispos1", tmp_path)
    assert "diagnosis/pos1.train.jsonl is missing" in reason(task, "train")
    write_jsonl(tmp_path / "diagnosis/pos1.train.jsonl", {"choices": ["a"], "label": 1})
    assert "pos1.train.jsonl:1: the answer is number 1 of 1" in reason(task, "train")


def test_the_group() -> None:
    assert (
        task_names(["diagnosis"])
        == list(GROUPS["diagnosis"])
        == [
            *("diagnosisbrand", "diagnosiscity", "diagnosiscountry", "diagnosisname"),
            *(f"diagnosispos{n}" for n in range(1, 5)),
        ]
    )
