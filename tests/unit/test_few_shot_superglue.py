"""CB, RTE, BoolQ, WiC, WSC, ReCoRD and MultiRC: rows, prompts, metrics, real files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from examples.few_shot import calibration
from examples.few_shot.metrics.api import build_metric
from examples.few_shot.samples import FewShotSample
from tests.helpers.few_shot_tasks import (
    check_real_set,
    full_prompt,
    make_task,
    make_template,
    predicted,
    reason,
    scores_of,
    write_jsonl,
)
from tests.helpers.shared import shared_dir

CB = (
    {"premise": "It rains. Did he go?", "hypothesis": "he went", "label": "neutral", "idx": 0},
    {"premise": "I know it rains.", "hypothesis": "it rains in Rome", "label": "entailment"},
)
RTE = (
    {"premise": "Rain fell in Rome.", "hypothesis": "It rained.", "label": "entailment", "idx": 0},
    {"premise": "The sun shone.", "hypothesis": "It rained.", "label": "not_entailment", "idx": 1},
)
BOOLQ = (
    {"question": "is rain wet", "passage": "Rain is water.", "label": True, "idx": 0},
    {"question": "is snow hot?", "passage": "Snow is cold.", "label": False, "idx": 1},
)
WIC = (
    {"word": "bank", "sentence1": "A river bank.", "sentence2": "My bank.", "label": False},
    {"word": "wash", "sentence1": "I wash it.", "sentence2": "He washed.", "label": True},
)
WSC = (
    {
        "text": "Mark told Pete, and he (Pete) knew. He was sad; then he left.",
        "target": {
            "span1_text": "Mark", "span1_index": 0, "span2_text": "he", "span2_index": 11,
        },
        "label": True,
    },
    {
        "text": "It is big.",
        "target": {"span1_text": "big", "span1_index": 2, "span2_text": "It", "span2_index": 0},
        "label": False,
    },
)  # fmt: skip
RECORD = (
    {
        "passage": {
            "text": "Ann met Bob in Rome.\n@highlight\nBob smiled",
            "entities": [
                {"start": 0, "end": 2}, {"start": 8, "end": 10},
                {"start": 15, "end": 18}, {"start": 32, "end": 34},
            ],
        },
        "qas": [
            {"query": "@placeholder smiled.", "answers": [
                {"start": 8, "end": 10, "text": "Bob"}, {"start": 32, "end": 34, "text": "Bob"},
            ]},
            {"query": "They met in @placeholder.", "answers": [
                {"start": 15, "end": 18, "text": "Rome"},
            ]},
        ],
    },
)  # fmt: skip
MULTIRC = (
    {
        "idx": 0,
        "passage": {
            "text": "Ann met Bob in Rome. ",
            "questions": [
                {"idx": 0, "question": "Who met?", "answers": [
                    {"text": "Ann", "label": 1}, {"text": "Eve", "label": 0},
                    {"text": "Bob", "label": 1},
                ]},
                {"idx": 1, "question": "Where?", "answers": [{"text": "Rome", "label": 1}]},
            ],
        },
    },
)  # fmt: skip
ROWS = {"CB": CB, "RTE": RTE, "BoolQ": BOOLQ, "WiC": WIC, "WSC": WSC, "ReCoRD": RECORD,
        "MultiRC": MULTIRC}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for folder, rows in ROWS.items():
        write_jsonl(tmp_path / folder / "val.jsonl", *rows)
    return tmp_path


# Template, the last candidate of the first sample behind the second as a shot.
PROMPTS = {
    ("cb", "cb"): (
        "Paragraph: I know it rains.\nQuestion: It rains in Rome? True, False, or Neither?\n"
        "Answer: True\nParagraph: It rains. Did he go?\n"
        "Question: He went? True, False, or Neither?\nAnswer: Neither"
    ),
    ("cb", "cb_no_struct"): (
        "I know it rains.\nIt rains in Rome? True, False, or Neither?\nTrue\n"
        "It rains. Did he go?\nHe went? True, False, or Neither?\nNeither"
    ),
    ("cb", "cb_gpt3_reproduce"): (
        "I know it rains.\nquestion: It rains in Rome. true, false, or neither?\nanswer: true\n"
        "It rains. Did he go?\nquestion: He went. true, false, or neither?\nanswer: neither"
    ),
    ("cb", "generativenli"): (
        "I know it rains, right? Yes, it rains in Rome\nIt rains. Did he go, right? Also, he went"
    ),
    ("rte", "rte"): (
        "The sun shone.\nquestion: It rained. True or False?\nanswer: False\n"
        "Rain fell in Rome.\nquestion: It rained. True or False?\nanswer: False"
    ),
    ("rte", "rte_gpt3_reproduce"): (
        "The sun shone.\nquestion: It rained. True or False?\nanswer: False\n"
        "Rain fell in Rome.\nquestion: It rained. True or False?\nanswer: False"
    ),
    ("rte", "petstylenli"): "The sun shone? No, it rained.\nRain fell in Rome? No, it rained.",
    ("boolq", "boolq"): (
        "Paragraph: Snow is cold.\nQuestion: Is snow hot?\nAnswer: False\n"
        "Paragraph: Rain is water.\nQuestion: Is rain wet?\nAnswer: True"
    ),
    ("boolq", "boolq_no_struct"): (
        "Snow is cold.\nIs snow hot?\nFalse\nRain is water.\nIs rain wet?\nTrue"
    ),
    ("boolq", "boolqnopassage"): (
        "Question: Is snow hot?\nAnswer: False\nQuestion: Is rain wet?\nAnswer: True"
    ),
    ("wic", "wic"): (
        "Sentence 1: I wash it.\nSentence 2: He washed.\n"
        "Question: Is the word 'wash' used in the same way in the two sentences above?\n"
        "Answer: True\nSentence 1: A river bank.\nSentence 2: My bank.\n"
        "Question: Is the word 'bank' used in the same way in the two sentences above?\n"
        "Answer: True"
    ),
    ("wsc", "wsc"): (
        "*It* is big.\n"
        'In the passage above, does the pronoun "*It*" refer to "big"? No\n'
        "Mark told Pete, and he (Pete) knew. He was sad; then *he* left.\n"
        'In the passage above, does the pronoun "*he*" refer to "Mark"? Yes'
    ),
    ("record", "record"): (
        "Ann met Bob in Rome.\nBob smiled\nThey met in Rome.\n"
        "Ann met Bob in Rome.\nBob smiled\nRome smiled."
    ),
    ("multirc", "multirc"): (
        "Ann met Bob in Rome.\nWhere?\n- [True] Rome\nAnn met Bob in Rome.\nWho met?\n- [True] Ann"
    ),
    ("multirc", "multirc_right_wrong"): (
        "Ann met Bob in Rome.\nWhere?\n- [Right] Rome\n"
        "Ann met Bob in Rome.\nWho met?\n- [Right] Ann"
    ),
}


@pytest.mark.parametrize(("task", "template"), PROMPTS)
def test_prompts(data, task, template):
    first, second = make_task(task, data).samples("val")
    question = first.problems()[0]
    assert full_prompt(make_template(template), question, second)[-1] == PROMPTS[task, template]


def test_with_a_space_between_fields(data):
    sample = make_task("rte", data).samples("val")[1]
    assert full_prompt(make_template("rte", sep=" "), sample)[1] == (
        "The sun shone. question: It rained. True or False? answer: False"
    )
    assert "\n" in full_prompt(make_template("rte_gpt3_reproduce", sep=" "), sample)[1]


@pytest.mark.parametrize(
    ("task", "candidates", "golds"),
    [
        ("cb", ("entailment", "contradiction", "neutral"), ["neutral", "entailment"]),
        ("rte", ("entailment", "not_entailment"), ["entailment", "not_entailment"]),
        ("boolq", ("false", "true"), ["true", "false"]),
        ("wic", ("false", "true"), ["false", "true"]),
        ("wsc", ("false", "true"), ["true", "false"]),
        ("record", ("Ann", "Bob", "Rome"), ["Bob", "Rome"]),
    ],
)
def test_candidates_and_gold(data, task, candidates, golds):
    samples = make_task(task, data).samples("val")
    assert [s.candidates for s in samples] == [candidates] * len(golds)
    assert [s.correct for s in samples] == [(gold,) for gold in golds]


def test_multirc_has_answers_as_subproblems(data):
    who, where = make_task("multirc", data).samples("val")
    assert [part["answer"] for part in who.subproblems] == ["Ann", "Eve", "Bob"]
    assert [part.correct for part in who.subproblems] == [("true",), ("false",), ("true",)]
    assert {part["question_id"] for part in who.subproblems} != {
        part["question_id"] for part in where.subproblems
    }
    assert make_template("multirc_yes_no").encode_correct_candidate(who) == (
        "Ann met Bob in Rome.\nWho met?\n- [Yes] Ann\n- [No] Eve\n- [Yes] Bob"
    )


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("multirc", "True", "False"),
        ("multirc_correct_incorrect", "Correct", "Incorrect"),
        ("multirc_right_wrong", "Right", "Wrong"),
        ("multirc_positive_negative", "Positive", "Negative"),
        ("multirc_correct_false", "Correct", "False"),
        ("multirc_yes_no", "Yes", "No"),
    ],
)
def test_words_of_multirc(data, name, right, wrong):
    question = make_task("multirc", data).samples("val")[0].problems()[0]
    template = make_template(name)
    assert [template.verbalize(question, c) for c in ("true", "false")] == [right, wrong]


@pytest.mark.parametrize(
    ("task", "template", "option", "prompt"),
    [
        ("cb", "cb", "premise::", "Question: He went? True, False, or Neither?\nAnswer: True"),
        (
            "cb", "cb", "premise:: | hypothesis::",
            "Question: True, False, or Neither?\nAnswer: True",
        ),
        (
            "cb", "cb", "sentence1:: | sentence2::",
            "Question: True, False, or Neither?\nAnswer: True",
        ),
        ("rte", "rte", "premise:: | hypothesis::", "answer: True"),
        ("boolq", "boolq", "paragraph::", "Question: Is rain wet?\nAnswer: False"),
        ("boolq", "boolq", "passage:: | question::", "Answer: False"),
        ("multirc", "multirc", "context:: | answer::", "Who met?\n- [False]"),
        ("multirc", "multirc", "paragraph::None. | question::", "None.\n- [False] Ann"),
    ],
)  # fmt: skip
def test_calibration_empties_fields(data, task, template, option, prompt):
    question = make_task(task, data).samples("val")[0].problems()[0]
    [copy] = calibration.copies(question, [option])
    assert full_prompt(make_template(template), copy)[0] == prompt


def test_boolq_reads_rows_with_a_prompt_of_their_own(tmp_path):
    row = {"query": "Passage: Rain\nis water.\nQuestion: is it wet?", "choices": ["no", "yes"],
           "gold": 1}  # fmt: skip
    write_jsonl(tmp_path / "llmfoundry" / "boolq.jsonl", row)
    [sample] = make_task("boolq", tmp_path).samples("val")
    assert sample.correct == ("true",)
    assert full_prompt(make_template("boolq"), sample)[1] == (
        "Paragraph: Rain\nis water.\nQuestion: Is it wet?\nAnswer: True"
    )
    assert full_prompt(make_template("query"), sample)[1] == (
        "Passage: Rain\nis water.\nQuestion: is it wet? yes"
    )


def test_rows_without_answers_are_read(tmp_path):
    write_jsonl(tmp_path / "WiC" / "test.jsonl", {k: v for k, v in WIC[0].items() if k != "label"})
    assert make_task("wic", tmp_path).samples("test")[0].correct == ()


@pytest.mark.parametrize(
    ("folder", "row", "says"),
    [
        ("CB", CB[0] | {"label": "maybe"}, "the answer 'maybe' is no candidate"),
        ("CB", {"premise": "A."}, "has no field 'hypothesis'"),
        ("BoolQ", BOOLQ[0] | {"label": "perhaps"}, "label 'perhaps'; expected true or false"),
        ("WSC", WSC[0] | {"text": "Nobody."}, "the text does not have 'he'"),
        ("ReCoRD", {"passage": {"text": "", "entities": []}}, "is no row of record"),
        ("ReCoRD", RECORD[0] | {"qas": [{"query": "A."}]}, "a query with one @placeholder"),
        ("MultiRC", {"passage": {"text": ""}}, "is no row of multirc"),
        ("MultiRC", {"idx": 0}, "is no row of multirc"),
    ],
)  # fmt: skip
def test_damaged_rows(tmp_path, folder, row, says):
    path = write_jsonl(tmp_path / folder / "val.jsonl", ROWS[folder][0], row)
    text = reason(make_task(folder.lower(), tmp_path), "val")
    assert text.startswith(f"{path}:2: ")
    assert says in text


@pytest.mark.parametrize("folder", ROWS)
def test_a_missing_file_is_named(tmp_path, folder):
    text = reason(make_task(folder.lower(), tmp_path), "train")
    assert f"{tmp_path}/{folder}/train.jsonl is missing" in text


def _judged(pairs: list[tuple[str, str, str]]) -> list:
    """Predictions of MultiRC: question, right, given."""
    return [
        predicted(
            FewShotSample({"question_id": question}, ("false", "true"), (right,)), given
        )
        for question, right, given in pairs
    ]  # fmt: skip


class TestMultiRCMetric:
    def test_by_hand(self):
        found = build_metric("multirc").score(
            _judged(
                [
                    # Two right answers, one found, one false alarm: P 1/2, R 1/2.
                    ("0.0", "true", "true"),
                    ("0.0", "true", "false"),
                    ("0.0", "false", "true"),
                    # All as it should be: P 1, R 1.
                    ("0.1", "true", "true"),
                    ("0.1", "false", "false"),
                    # Nothing right, nothing called right: P 1, R 1, all judged well.
                    ("1.0", "false", "false"),
                    # One right and not found: P 1, R 0.
                    ("1.1", "true", "false"),
                ]
            )
        )
        assert found["accuracy"] == 50
        assert found["question_P"] == pytest.approx((1 / 2 + 1 + 1 + 1) / 4)
        assert found["question_R"] == pytest.approx((1 / 2 + 1 + 1 + 0) / 4)
        p, r = 0.875, 0.625
        assert found["question_F1"] == pytest.approx(2 * p * r / (p + r))
        # Called right: three, two of them rightly; right: four.
        assert found["dataset_P"] == pytest.approx(2 / 3)
        assert found["dataset_R"] == pytest.approx(2 / 4)
        assert found["dataset_F1"] == pytest.approx(4 / 7)

    def test_without_answers_there_is_nothing_to_count(self):
        sample = FewShotSample({"question_id": "0.0"}, ("false", "true"))
        assert math.isnan(build_metric("multirc").score([predicted(sample, "true")])["accuracy"])


def test_metrics_of_cb():
    labels = ("entailment", "contradiction", "neutral")
    pairs = [
        ("entailment", "entailment"),
        ("entailment", "contradiction"),
        ("contradiction", "contradiction"),
        ("neutral", "entailment"),
    ]
    predictions = [predicted(FewShotSample({}, labels, (gold,)), given) for gold, given in pairs]
    macro = build_metric("prf1_macro").score(predictions)
    # Precision 1/2, 1/2, 0 (never given); recall 1/2, 1, 0; F1 1/2, 2/3, 0.
    assert macro["macro_P"] == pytest.approx((1 / 2 + 1 / 2) / 3)
    assert macro["macro_R"] == pytest.approx((1 / 2 + 1) / 3)
    assert macro["macro_F1"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert macro["macro_Support"] == 4
    micro = build_metric("prf1_micro").score(predictions)
    assert micro == {"micro_P": 0.5, "micro_R": 0.5, "micro_F1": 0.5, "micro_Support": 4}


def test_an_evaluation_gives_every_number(data):
    task = make_task("multirc", data)
    options = ["answer::", "paragraph:: | question::"]
    found = scores_of(
        task, make_template("multirc"), task.samples("val"), k=1, calibrate=options
    )  # fmt: skip
    assert set(found) == {
        "accuracy", "question_P", "question_R", "question_F1",
        "dataset_P", "dataset_R", "dataset_F1",
    }  # fmt: skip


REAL = [
    ("cb", "train", 250), ("cb", "val", 56), ("rte", "train", 2490), ("rte", "val", 277),
    ("boolq", "train", 32), ("boolq", "val", 3270), ("wic", "train", 32), ("wsc", "train", 32),
    ("record", "train", 32), ("multirc", "train", 32),
]  # fmt: skip
TEMPLATES = {
    "cb": ["cb", "cb_no_struct", "cb_gpt3_reproduce", "generativenli", "gpt3stylenli"],
    "rte": ["rte", "rte_gpt3_reproduce", "generativenli", "petstylenli"],
    "boolq": ["boolq", "boolq_no_struct", "boolqnopassage"],
    "multirc": ["multirc", "multirc_yes_no"],
}


@pytest.mark.parametrize(("name", "set_name", "count"), REAL)
def test_real_rows(name, set_name, count):
    task = make_task(name, shared_dir("data", "fewshot"))
    check_real_set(task, set_name, TEMPLATES.get(name, [name]), count)


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("cb", "superglue_cb/test.jsonl", 250),
        ("rte", "superglue_rte/test.jsonl", 3000),
        ("cb", "fewglue/CB/train.jsonl", 32),
        ("rte", "fewglue/RTE/train.jsonl", 32),
        ("wic", "fewglue/WiC/unlabeled.jsonl", 5428),
        ("wsc", "fewglue/WSC/unlabeled.jsonl", 554),
        ("multirc", "fewglue/MultiRC/unlabeled.jsonl", 5131),
    ],
)
def test_real_files_by_name(name, file, count):
    data = shared_dir("data", "fewshot")
    samples = make_task(name, data).samples(str(data / file))
    template = make_template(name)
    assert count == len(samples)
    for sample in samples:
        for question in sample.problems():
            assert full_prompt(template, question)
            assert bool(question.correct) == file.endswith("train.jsonl")
