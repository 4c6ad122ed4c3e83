"""Natural Questions, TriviaQA, WebQuestions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.few_shot.metrics.api import build_metric
from examples.few_shot.metrics.written import normalised
from examples.few_shot.predictors.api import Prediction, ScoredCandidate
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.odqa import descriptions
from tests.helpers.few_shot_tasks import (
    make_task,
    make_template,
    reason,
    scores_of,
    write_jsonl,
    write_text,
)
from tests.helpers.shared import shared_dir


def test_naturalquestions(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "nq_open/NQ-open.dev.jsonl",
        {"question": "who ran", "answer": ["Ann", "Ann B.", "Ann"]},
        {"question": "who fell?", "answer": "Bob"},
    )
    task = make_task("naturalquestions", tmp_path)
    first, second = task.samples("dev")
    assert first.candidates == () and first.correct == ("Ann", "Ann B.")
    template = make_template("odqa")
    assert template.encode(second) == "Q: who fell?\nA: <mask>"
    assert template.encode_correct_candidate(first) == "Q: who ran\nA: Ann"
    assert (task.kind, task.max_new_tokens) == ("generation", 20)
    assert scores_of(task, template, [first, second], k=1) == {"exact-match": 0}


@pytest.mark.parametrize(
    ("written", "answer"),
    [(" Ann\nQ: who", "Ann"), ("\nAnn", "Ann"), (" Ann Q: who fell? A: Bob", "Ann"), ("", "")],
)
def test_the_answer_ends_where_the_model_goes_on(written: str, answer: str) -> None:
    sample = FewShotSample({"question": "q"}, (), ("a",))
    assert make_template("odqa").postprocess(sample, written) == answer


def test_triviaqa_in_three_formats(tmp_path: Path) -> None:
    whole = {"Question": "Which root? ", "Answer": {"Value": "Onion", "Aliases": ["Onion", "Pyaz"]}}
    write_text(
        tmp_path / "triviaqa-unfiltered/unfiltered-web-dev.json",
        json.dumps({"Data": [whole], "Version": 1.0}),
    )
    write_jsonl(tmp_path / "a.jsonl", {"question": "Which root?", "answer": ["Onion", "Pyaz"]})
    write_jsonl(
        tmp_path / "b.jsonl",
        {"context": "Question: Which root?\nAnswer:", "answer": "Onion", "aliases": ["Pyaz"]},
    )
    task = make_task("triviaqa", tmp_path)
    samples = task.samples("dev")
    assert samples[0]["question"] == "Which root?" and samples[0].correct == ("Onion", "Pyaz")
    for name in ("a", "b"):
        assert task.samples(str(tmp_path / f"{name}.jsonl")) == samples


def test_webquestions(tmp_path: Path) -> None:
    value = '(list (description "Jazmyn \\"J\\" (B)") (description Jaxon))'
    write_text(
        tmp_path / "webquestions/webquestions.examples.test.json",
        json.dumps([{"url": "u", "utterance": "who?", "targetValue": value}]),
    )
    (sample,) = make_task("webquestions", tmp_path).samples("test")
    assert sample.correct == ('Jazmyn "J" (B)', "Jaxon")
    assert descriptions("(list (description 1.5))") == ["1.5"]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "webquestions/webquestions.examples.test.json"
    task = make_task("webquestions", tmp_path)
    assert f"{path} is missing" in reason(task, "test")
    write_text(path, json.dumps([{"utterance": "who?", "targetValue": "(list)"}]))
    assert f"{path}: number 0: is no row of webquestions: has no answer" in reason(task, "test")
    write_text(path, "[\n{,")
    assert f"{path}:2: is not JSON" in reason(task, "test")
    write_jsonl(tmp_path / "nq_open/NQ-open.dev.jsonl", {"question": "who ran"})
    text = reason(make_task("naturalquestions", tmp_path), "dev")
    assert "NQ-open.dev.jsonl:1: is no row of naturalquestions: has no field 'answer'" in text


def written(text: str, *answers: str) -> Prediction:
    return Prediction(FewShotSample({}, (), answers), (ScoredCandidate(text, 1.0),))


def test_exact_match() -> None:
    predictions = [
        written("The  Beatles!", "Rolling Stones", "beatles"),
        written("a theory", "theory"),
        written("14 December", "14 December 1972"),
        written("", "x"),
    ]
    assert build_metric("exact-match").score(predictions) == {"exact-match": 50}
    assert normalised("An anthem, the \t U.S.A.'s") == "anthem usas"


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_to_normalise_twice_is_to_normalise_once(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_real_files() -> None:
    root = shared_dir("data", "fewshot")
    template = make_template("odqa")
    for name, count in [("naturalquestions", 3610), ("triviaqa", 3000)]:
        task = make_task(name, root)
        samples = task.samples("dev")
        assert len(samples) == count
        for sample in samples:
            assert template.split(sample)[1] == "" and sample.correct and all(sample.correct)
        assert set(scores_of(task, template, samples[:3], k=1)) == {"exact-match"}
