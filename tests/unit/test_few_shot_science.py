"""ARC, OpenBookQA, CommonsenseQA, EXAMS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.few_shot.templates.science import WORDINGS
from tests.helpers.few_shot_tasks import (
    check_real_set,
    full_prompt,
    make_task,
    make_template,
    reason,
    scores_of,
    write_jsonl,
)
from tests.helpers.shared import shared_dir

GPT3 = ["arcchallenge_gpt3", *(f"openbookqa_gpt3_calib_{n}" for n in ("v1", "v2", "empty"))]


def row(
    stem: str, *texts: str, key: str = "A", labels: str = "ABCDE", **more: Any
) -> dict[str, Any]:
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)]
    return {"id": "1", "question": {"stem": stem, "choices": choices}, "answerKey": key, **more}


def samples(tmp_path: Path) -> list[Any]:
    write_jsonl(
        tmp_path / "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Dev.jsonl",
        row("What is wet?", "Water.", "Fire", key="A"),
        row("Plants make", "DNA", "Sugar", "Iron", key="2", labels="123"),
    )
    return list(make_task("arceasy", tmp_path).samples("dev"))


def test_arc(tmp_path: Path) -> None:
    first, second = samples(tmp_path)
    assert first.candidates == ("A", "B") and first.correct == ("A",)
    assert second.candidates == ("1", "2", "3") and second.correct == ("2",)
    assert full_prompt(make_template("arc_old"), second, first) == [
        "What is wet? It is water.\nPlants make dna.",
        "What is wet? It is water.\nPlants make sugar.",
        "What is wet? It is water.\nPlants make iron.",
    ]


@pytest.mark.parametrize(
    ("template", "question", "sentence", "alone"),
    [
        ("arc", "What is wet?|fire.", "Plants make sugar.", "fire."),
        ("arc_1", "What is wet?|It is fire.", "Plants make sugar.", "It is fire."),
        ("arc_old", "What is wet? It is fire.", "Plants make sugar.", "It is fire."),
        ("arc_no_choice_lowercase", "What is wet?|Fire.", "Plants make Sugar.", "Fire."),
        ("arc_capitalize_choice", "What is wet?|Fire.", "Plants make sugar.", "fire."),
        ("arc_struct_1", "Question: What is wet?|Answer: fire.", "Plants make sugar.", "fire."),
        ("arc_struct_2", "Q: What is wet?|A: fire.", "Plants make sugar.", "fire."),
        ("arc_descr_1", "Answer the question.|What is wet?|fire.",
         "Continue the sentence.|Plants make sugar.", "fire."),
        ("arc_choice_format_3", "What is wet?|The answer is fire.", "Plants make sugar.", "fire."),
        ("arc_calib_format_2", "What is wet?|fire.", "Plants make sugar.", "This is fire."),
        ("openbookqa", "What is wet? Fire.", "Plants make Sugar.", "Fire."),
        ("exams", "What is wet?|Fire.", "Plants make Sugar.", "Fire."),
        ("arcchallenge_gpt3", "Question: What is wet?|Answer: fire.",
         "Question: Plants make|Answer: sugar.", "Answer: fire."),
        ("openbookqa_gpt3_calib_v1", "What is wet? fire.", "Plants make sugar.", "Answer: fire."),
        ("openbookqa_gpt3_calib_v2", "What is wet? fire.", "Plants make sugar.", "A: fire."),
        ("openbookqa_gpt3_calib_empty", "What is wet? fire.", "Plants make sugar.", "fire."),
        ("arc_letters", "Question: What is wet?|A. Water.|B. Fire|Answer: B",
         "Question: Plants make|1. DNA|2. Sugar|3. Iron|Answer: 2", "A. Water.|B. Fire|Answer: B"),
    ],
)  # fmt: skip
def test_how_questions_are_put(
    tmp_path: Path, template: str, question: str, sentence: str, alone: str
) -> None:
    first, second = samples(tmp_path)
    words = make_template(template, sep="|")
    assert full_prompt(words, first)[1] == question
    assert full_prompt(words, second)[1] == sentence
    assert full_prompt(words, first.with_data(question=""))[1] == alone


def test_other_public_rows_become_the_same_samples(tmp_path: Path) -> None:
    flat = {"query": "Question: What is wet?", "choices": ["Water.", "Fire"], "gold": 0}
    write_jsonl(tmp_path / "llmfoundry/arc_easy.jsonl", flat)
    (sample,) = make_task("arceasy", tmp_path).samples("test")
    template = make_template("arc_old")
    assert full_prompt(template, sample) == full_prompt(template, samples(tmp_path)[0])
    assert full_prompt(make_template("query"), sample)[1] == "Question: What is wet? Fire"
    lettered = {
        "query": "Question: What is wet?\nChoices:\nA. water\nB. fire. A lot\nAnswer:",
        "choices": ["A", "B"],
        "gold": 1,
    }
    write_jsonl(tmp_path / "llmfoundry/commonsense_qa.jsonl", lettered)
    (sample,) = make_task("commonsenseqa", tmp_path).samples("dev")
    assert sample["texts"] == ["water", "fire. A lot"] and sample.correct == ("B",)
    assert (
        full_prompt(make_template("arc_letters"), sample)[1]
        == lettered["query"].replace("Choices:\n", "") + " B"
    )
    assert full_prompt(make_template("query"), sample)[1] == f"{lettered['query']} B"


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "openbookqa/dev.jsonl"
    task = make_task("openbookqa", tmp_path)
    assert "OpenBookQA-V1-Sep2018/Data/Main/dev.jsonl is missing" in reason(task, "dev")
    for damaged, said in [
        (row("Q?", "a", "b", key="C"), "the answer is 'C'; choices are A, B"),
        ({"question": {"stem": "Q?"}}, "has no field 'choices'"),
        ({"question": None}, "is no row of openbookqa"),
        ({"query": "Q\nChoices:\nA. a\nAnswer:", "choices": ["A", "B"], "gold": 0}, "1 choices in"),
        ({"query": "Q", "choices": ["a"], "gold": 1}, "is no row of openbookqa"),
    ]:
        write_jsonl(path, row("Q?", "a", "b"), damaged)
        text = reason(make_task("openbookqa", tmp_path), "dev")
        assert f"{path}:2: " in text and said in text


def test_answers_that_are_not_public(tmp_path: Path) -> None:
    hidden = row("Q?", "a", "b")
    del hidden["answerKey"]
    write_jsonl(tmp_path / "commonsenseqa/test_rand_split_no_answers.jsonl", hidden)
    assert make_task("commonsenseqa", tmp_path).samples("test")[0].correct == ()


def exam(language: str, **more: Any) -> dict[str, Any]:
    return row("Was?", "dies", "das", info={"language": language, "subject": "x"}, **more)


def test_exams_are_told_apart_by_language(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "exams/dev.jsonl", exam("Polish"), exam("Turkish", key="B"),
        exam("Turkish", key="@"),
    )  # fmt: skip
    (sample,) = make_task("exams", tmp_path, "tr").samples("dev")
    assert sample.correct == ("B",)
    assert full_prompt(make_template("exams"), sample, sample)[0] == "Was?\ndas.\nWas?\ndies."
    assert "has no sample" in reason(make_task("exams", tmp_path, "bg"), "dev")


def with_paragraphs(field: str, first: object, second: object) -> dict[str, Any]:
    found = exam("Polish")
    for each, text in zip(found["question"]["choices"], (first, second), strict=True):
        each[field] = text
    return found


@pytest.mark.parametrize(
    ("file", "field"), [("with_hits/dev", "hits"), ("with_paragraphs/dev_with_para", "para")]
)
def test_paragraphs_stand_in_front_of_exams(file: str, field: str, tmp_path: Path) -> None:
    row = with_paragraphs(field, ["One.\n\n", "Two.", "Three."], ["One."])
    write_jsonl(tmp_path / f"exams/multilingual/{file}.jsonl", row)
    write_jsonl(tmp_path / "exams/dev.jsonl", exam("Polish"))
    template = make_template("exams")
    for hits, said in [(0, ""), (1, "One.\n"), (2, "One. Two.\n"), (9, "One. Two. Three.\n")]:
        (sample,) = make_task("exams", tmp_path, "pl", max_hits_cnt=hits).samples("dev")
        assert full_prompt(template, sample)[0] == said + "Was?\ndies."
    write_jsonl(tmp_path / "bare.jsonl", exam("Polish"))
    task = make_task("exams", tmp_path, "pl", max_hits_cnt=1)
    assert "bare.jsonl:1: has neither `hits` nor" in reason(task, str(tmp_path / "bare.jsonl"))


def test_a_paragraph_that_is_one_text_is_taken_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "exams/with_paragraphs/dev_with_para.jsonl"
    write_jsonl(file, with_paragraphs("para", "One. Two.", "Three."))
    (sample,) = make_task("exams", tmp_path, "pl", max_hits_cnt=1).samples("dev")
    assert sample["context"] == "One. Two. Three."
    text = reason(make_task("exams", tmp_path, "pl", max_hits_cnt=2), "dev")
    assert f"{file}:1: `para` is one text, of which --max-hits-cnt 2 cannot tell" in text


def test_calibration_asks_without_the_question(tmp_path: Path) -> None:
    task = make_task("arceasy", tmp_path)
    scores = scores_of(
        task, make_template("arcchallenge_gpt3"), samples(tmp_path), k=0, calibrate=["question::"]
    )
    assert scores["accuracy"] in (0, 50, 100)


def test_real_files() -> None:
    root = shared_dir("data", "fewshot")
    for name, set_name, templates, count in [
        ("arceasy", "test", ["arc_old", "query"], 2376),
        ("arcchallenge", "test", ["arcchallenge_gpt3"], 1172),
        ("openbookqa", "test", [*WORDINGS, *GPT3], 500),
        ("commonsenseqa", "dev", ["arc_letters", "query"], 1221),
    ]:
        check_real_set(make_task(name, root), set_name, templates, count)


@pytest.mark.parametrize(
    ("language", "dev"),
    [
        ("bg", 365), ("hr", 335), ("hu", 263), ("it", 156), ("mk", 265), ("pl", 246), ("pt", 115),
        ("sq", 185), ("sr", 197), ("tr", 240), ("vi", 305),
    ],
)  # fmt: skip
def test_real_exams(language: str, dev: int) -> None:
    task = make_task("exams", shared_dir("data", "fewshot"), language)
    check_real_set(task, "dev", ["exams"], dev)


def test_real_exams_of_all_sets() -> None:
    task = make_task("exams", shared_dir("data", "fewshot"), "tr")
    # One of the 747 questions to train on has lost its answer.
    check_real_set(task, "train", ["exams", "arc_letters"], 746)
    check_real_set(task, "test", ["exams"], 977)
