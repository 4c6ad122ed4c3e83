"""docs/TASKS.md: its list of tasks, and its example of a new one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from examples.few_shot import gpt3_eval
from examples.few_shot.results import read_rows
from examples.few_shot.task_page import PAGE, renewed
from examples.few_shot.tasks.api import TASKS
from examples.few_shot.templates.api import TEMPLATES
from tests.helpers.few_shot_tasks import write_text


def test_the_page_lists_the_tasks_as_they_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == renewed(page), "to renew it: python -m examples.few_shot.task_page"
    assert "`blimp__NAME` (67)" in page


def test_the_example_of_a_new_task_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    assert blocks["python"].count("\n") <= 36
    write_text(tmp_path / "my_tasks/opposites.py", blocks["python"])
    for name in ("train", "val"):
        write_text(tmp_path / f"data/opposites/{name}.jsonl", blocks["jsonl"])
    # What the example registers goes with the test.
    for registry in (TASKS, TEMPLATES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.chdir(tmp_path)
    words = shlex.split(blocks["sh"].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "examples.few_shot.gpt3_eval"]
    values = gpt3_eval.parse([*words[3:], "--add-prompt-to-meta", "--seed", "0"])
    assert values.pop("model_name") == "checkpoints/checkpoint_best.pt"
    values.pop("list_tasks")
    none, one = gpt3_eval.run_evaluations_from_model_name("dummy", **values)
    assert (none["nb_few_shot_samples"], one["nb_few_shot_samples"]) == (0, 1)
    assert none["preferred_metric"] == "accuracy" and none["questions_cnt"] == 3
    folder = tmp_path / "few_shot_dummy_results"
    prompts = {
        row["candidates"][1][1]["meta"]["prompt"]
        for name in one["predictions"]
        for row in read_rows(folder / name)
    }
    assert blocks["text"].rstrip("\n") in prompts
