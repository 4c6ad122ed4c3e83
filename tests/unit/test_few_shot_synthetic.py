"""Arithmetic and scrambled words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.synthetic import ARITHMETIC, WORDS
from tests.helpers.few_shot_tasks import make_task, make_template, reason, scores_of, write_jsonl
from tests.helpers.shared import shared_dir


def test_sums(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "gpt3_arithmetic/two_digit_addition.jsonl",
        {"context": "\n\nQ: What is 98 plus 45?\n\nA:", "completion": " 143"},
        {"context": "\n\nQ: What is 5 plus 4?\n\nA:", "completion": " 9"},
    )
    task = make_task("addition2digit", tmp_path)
    assert task.train_set == task.eval_set == "two_digit_addition"
    first, second = task.samples("two_digit_addition")
    assert first.candidates == () and first.correct == ("143",)
    template = make_template("synthetic", sep="\n\n")
    assert template.encode(second) == "Q: What is 5 plus 4?\n\nA: <mask>"
    assert template.encode_correct_candidate(first) == "Q: What is 98 plus 45?\n\nA: 143"
    assert (task.kind, task.max_new_tokens) == ("generation", 10)
    assert scores_of(task, template, [first, second], k=1) == {"accuracy": 0}


def test_words_are_asked_for_behind_what_is_to_be_done(tmp_path: Path) -> None:
    path = tmp_path / "gpt-3/data/reversed_words.jsonl.gz"
    path.parent.mkdir(parents=True)
    row = {"context": "\ntaefed =", "completion": " defeat"}
    path.write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
    task = make_task("reversedwords", tmp_path)
    assert task.template == "unscrambling"
    (sample,) = task.samples("reversed_words")
    template = make_template(task.template)
    assert template.task_description.startswith("Please unscramble the letters into a word")
    assert template.encode_correct_candidate(sample) == "taefed = defeat"


@pytest.mark.parametrize(
    ("written", "answer"), [(" 143\n", "143"), (" 143 Q: What", "143"), ("", "")]
)
def test_the_answer_is_the_first_word(written: str, answer: str) -> None:
    sample = FewShotSample({"context": "c"}, (), ("a",))
    assert make_template("synthetic").postprocess(sample, written) == answer


def test_every_task_has_its_own_file() -> None:
    # In the original multiplication2digit read the file of singledigit3ops.
    files = [*ARITHMETIC.values(), *WORDS.values()]
    assert len(files) == len(set(files)) == 18
    assert ARITHMETIC["multiplication2digit"] == "two_digit_multiplication"


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    task = make_task("sumofdigits", tmp_path)
    assert "gpt3_arithmetic/sum_of_digits.jsonl is missing" in reason(task, "sum_of_digits")
    write_jsonl(tmp_path / "gpt3_arithmetic/sum_of_digits.jsonl", {"context": "Q:"})
    text = reason(task, "sum_of_digits")
    assert "sum_of_digits.jsonl:1: is no row of sumofdigits: has no field 'completion'" in text


@pytest.mark.parametrize("name", [*ARITHMETIC, *WORDS])
def test_real_files(name: str) -> None:
    task = make_task(name, shared_dir("data", "fewshot"))
    samples = task.samples(task.eval_set or "")
    template = make_template(task.template)
    assert len(samples) == (2000 if name in ARITHMETIC else 10000)
    for sample in samples:
        assert template.split(sample)[1] == "" and len(sample.correct[0].split()) == 1
    assert set(scores_of(task, template, samples[:3], k=1)) == {"accuracy"}
