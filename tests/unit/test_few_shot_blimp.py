"""BLiMP."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.few_shot.tasks.api import GROUPS, TASKS, task_names
from examples.few_shot.tasks.blimp import PARADIGMS
from tests.helpers.few_shot_tasks import (
    check_real_set,
    full_prompt,
    make_task,
    make_template,
    reason,
    write_jsonl,
)
from tests.helpers.shared import shared_dir

ROW = {"sentence_good": "Who left?", "sentence_bad": "Who left who?", "UID": "wh_island"}


def test_a_minimal_pair(tmp_path: Path) -> None:
    other = {"sentence_good": "He sleeps.", "sentence_bad": "He sleep."}
    write_jsonl(tmp_path / "blimp/wh_island.jsonl", ROW, other)
    task = make_task("blimp__wh_island", tmp_path)
    assert (task.train_set, task.eval_set) == ("wh_island", "wh_island")
    first, second = task.samples("wh_island")
    assert first.candidates == ("sentence_good", "sentence_bad")
    assert first.correct == ("sentence_good",)
    template = make_template("blimp", sep=" ")
    assert template.encode(first) == "<mask>"
    assert full_prompt(template, first) == ["Who left?", "Who left who?"]
    assert full_prompt(template, second, first) == ["Who left? He sleeps.", "Who left? He sleep."]


def test_all_paradigms_are_a_group() -> None:
    assert len(PARADIGMS) == len(GROUPS["blimp"]) == 67
    assert task_names(["blimp"]) == [f"blimp__{name}" for name in PARADIGMS]
    assert all(name in TASKS for name in GROUPS["blimp"])


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    task = make_task("blimp__transitive", tmp_path)
    assert "blimp/transitive.jsonl is missing" in reason(task, "transitive")
    write_jsonl(tmp_path / "blimp/transitive.jsonl", ROW, {"sentence_good": "x"})
    assert "transitive.jsonl:2: is no row of blimp__transitive" in reason(task, "transitive")


@pytest.mark.parametrize("name", PARADIGMS)
def test_real_files(name: str) -> None:
    task = make_task(f"blimp__{name}", shared_dir("data", "fewshot"))
    check_real_set(task, name, ["blimp"], 1000)
