"""HellaSwag, PIQA, StoryCloze, SAT analogies, LAMBADA, one's own texts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from examples.few_shot.metrics.api import build_metric
from examples.few_shot.predictors.api import Prediction, ScoredCandidate
from examples.few_shot.samples import FewShotSample
from examples.few_shot.settings import plan
from fairseq_lite.errors import ConfigError
from tests.helpers.few_shot_tasks import (
    check_real_set,
    full_prompt,
    make_task,
    make_template,
    reason,
    scores_of,
    write_jsonl,
    write_text,
)
from tests.helpers.shared import shared_dir

SWAG = {
    "ind": 1,
    "activity_label": "Baking",
    "ctx_a": "She opens the oven.",
    "ctx_b": "the cake",
    "ctx": "She opens the oven. the cake",
    "endings": ["is done.", "flies away.", "sings.", "[title] Wait [step] an hour."],
    "label": 3,
}


def test_hellaswag(tmp_path: Path) -> None:
    other = {"activity_label": "Rowing", "ctx": "He  rows. he", "endings": ["a", "b"], "label": "1"}
    write_jsonl(tmp_path / "hellaswag/hellaswag_val.jsonl", SWAG, other)
    first, second = make_task("hellaswag", tmp_path).samples("val")
    assert first.candidates == ("0", "1", "2", "3") and first.correct == ("3",)
    template = make_template("hellaswag")
    assert full_prompt(template, first)[0] == "Baking: She opens the oven. The cake is done."
    assert full_prompt(template, second, first) == [
        "Baking: She opens the oven. The cake [title] Wait [step] an hour.\nRowing: He rows. he a",
        "Baking: She opens the oven. The cake [title] Wait [step] an hour.\nRowing: He rows. he b",
    ]
    assert full_prompt(make_template("hellaswag_clean"), first)[3].endswith(
        "The cake Wait an hour."
    )
    assert template.encode(first.with_data(activity_label="")).startswith("She opens")
    write_jsonl(tmp_path / "hellaswag/hellaswag_test.jsonl", {**other, "label": ""})
    assert make_task("hellaswag", tmp_path).samples("test")[0].correct == ()


def test_hellaswag_says_what_is_wrong(tmp_path: Path) -> None:
    task = make_task("hellaswag", tmp_path)
    assert "hellaswag/hellaswag_val.jsonl is missing" in reason(task, "val")
    write_jsonl(tmp_path / "hellaswag/hellaswag_val.jsonl", SWAG, {**SWAG, "label": 4})
    assert "hellaswag_val.jsonl:2: the answer is number 4 of 4" in reason(task, "val")
    write_jsonl(tmp_path / "hellaswag/hellaswag_val.jsonl", {"ctx": "No endings", "label": 0})
    assert "hellaswag_val.jsonl:1: is no row of hellaswag: has no field 'endings'" in reason(
        task, "val"
    )


def test_piqa_joins_questions_with_their_answers(tmp_path: Path) -> None:
    rows = [
        {"goal": "Cut bread ", "sol1": " with a knife", "sol2": "with a spoon"},
        {"goal": "Boil an egg", "sol1": "in ice", "sol2": "in water"},
    ]
    write_jsonl(tmp_path / "piqa/valid.jsonl", *rows)
    write_text(tmp_path / "piqa/valid-labels.lst", "0\n1\n")
    first, second = make_task("piqa", tmp_path).samples("valid")
    assert (first.correct, second.correct) == (("sol1",), ("sol2",))
    assert full_prompt(make_template("piqa", sep=" "), second, first) == [
        "Cut bread with a knife Boil an egg in ice",
        "Cut bread with a knife Boil an egg in water",
    ]
    write_jsonl(tmp_path / "piqa/tests.jsonl", *rows)
    assert make_task("piqa", tmp_path).samples("test")[0].correct == ()


def test_piqa_without_its_answers_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "piqa/valid.jsonl", {"goal": "g", "sol1": "a", "sol2": "b"})
    assert "valid-labels.lst" in reason(make_task("piqa", tmp_path), "valid")
    write_text(tmp_path / "piqa/valid-labels.lst", "0\n1\n")
    assert "2 answers for 1 rows of valid.jsonl" in reason(make_task("piqa", tmp_path), "valid")
    write_text(tmp_path / "piqa/valid-labels.lst", "x\n")
    assert "valid.jsonl:1" in reason(make_task("piqa", tmp_path), "valid")


HEAD = "InputStoryid InputSentence1 InputSentence2 InputSentence3 InputSentence4 Quiz1 Quiz2 Right"
HEAD = HEAD.replace("Quiz", "RandomFifthSentenceQuiz").replace("Right", "AnswerRightEnding")
STORY = ["s1", "Ann ran.", "She fell.", 'It "hurt".', "She cried.", "She rose.", "She ate.", "1"]


def test_storycloze(tmp_path: Path) -> None:
    tsv = "\t".join(HEAD.split()) + "\n" + "\t".join(STORY) + "\n"
    write_text(tmp_path / "xstorycloze/spring2016.val.sw.tsv.split_20_80_eval.tsv", tsv)
    (sample,) = make_task("storycloze", tmp_path, "sw").samples("val2016_split_20_80_eval")
    assert sample.candidates == ("1", "2") and sample.correct == ("1",)
    prompt = 'Ann ran. She fell. It "hurt". She cried. '
    template = make_template("storycloze", language="sw")
    assert full_prompt(template, sample) == [prompt + "She rose.", prompt + "She ate."]
    assert full_prompt(template, sample, sample)[0] == f"{prompt}She rose.\n{prompt}She rose."


def test_storycloze_takes_english_as_it_is_distributed(tmp_path: Path) -> None:
    csv = ",".join(HEAD.split()) + "\n" + ",".join(STORY).replace('It "hurt".', '"It ""hurt""."')
    name = "cloze_test_test__spring2016 - cloze_test_ALL_test.csv"
    write_text(tmp_path / "storycloze" / name, csv + "\n")
    (sample,) = make_task("storycloze", tmp_path, "en").samples("test2016")
    assert sample["InputSentence3"] == 'It "hurt".'
    # The English file never stands in for another language's.
    assert "spring2016.test.ru.tsv is missing" in reason(
        make_task("storycloze", tmp_path, "ru"), "test2016"
    )
    assert len(plan("m", tasks="storycloze", nb_few_shot_samples_values=0)) == 11


SAT = """\
# three lines
# of comments

190 FROM REAL SATs
lull trust v:n
balk fortitude v:n
betray loyalty v:n
cajole compliance v:n
hinder destination v:n
soothe passion v:n
c

ML: 12
arid dry a:a
glacial cold a:a
coastal tidal a:a
damp muddy a:a
snowbound polar a:a
no choice
a
"""


def test_satanalogies(tmp_path: Path) -> None:
    path = write_text(tmp_path / "satanalogies/SAT-package-V3.txt", SAT.replace("\n", "\r\n"))
    first, second = make_task("satanalogies", tmp_path).samples("test")
    assert first.candidates == ("a", "b", "c", "d", "e") and first.correct == ("c",)
    assert second.candidates == ("a", "b", "c", "d") and second.where == f"{path}:13"
    prompts = full_prompt(make_template("satanalogies"), second, first)
    assert prompts[0] == (
        "lull is to trust as cajole is to compliance\narid is to dry as glacial is to cold"
    )
    write_text(path, SAT.replace("soothe passion v:n\n", ""))
    assert f"{path}:4: a question has 8 lines" in reason(
        make_task("satanalogies", tmp_path), "test"
    )


def test_lambada_asks_for_the_last_word(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "lambada/lambada_test.jsonl",
        {"text": "It was the best of times "},
        {"context": "It was the worst of ", "continuation": " times"},
    )
    task = make_task("lambada", tmp_path)
    first, second = task.samples("test")
    assert first.candidates == first.correct == second.correct == ("times",)
    template = make_template("lambada")
    assert full_prompt(template, second, first) == [
        "It was the best of times\nIt was the worst of times"
    ]
    scores = scores_of(task, template, [first, second], k=0)
    assert scores["last_word_accuracy"] == 0 and scores["last_word_perplexity"] > 1
    write_jsonl(tmp_path / "lambada/lambada_test.jsonl", {"text": "Word"})
    assert "lambada_test.jsonl:1" in reason(make_task("lambada", tmp_path), "test")


def test_the_metric_of_last_words() -> None:
    def said(greedy: bool, *scores: float) -> Prediction:
        meta = {"greedy": greedy, "tail_scores": list(scores)}
        sample = FewShotSample({}, ("w",), ("w",))
        return Prediction(sample, (ScoredCandidate("w", -9.0, meta),))

    found = build_metric("last_word_accuracy").score(
        [said(True, -0.5), said(False, -1.0, -2.0), said(True, 0.0, -0.5)]
    )
    assert found["last_word_accuracy"] == pytest.approx(200 / 3)
    assert found["last_word_perplexity"] == pytest.approx(math.exp(4 / 3))


def test_processtext(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        {"text": "The <mask> is blue.", "candidates": ["sky", "sun"], "answer": "sky"},
        {"text": "Grass is", "candidates": ["green.", "red."]},
    )
    task = make_task("processtext", tmp_path)
    first, second = task.samples(str(path))
    template = make_template("processtext")
    assert full_prompt(template, first) == ["The sky is blue.", "The sun is blue."]
    assert full_prompt(template, second, first)[0] == "The sky is blue.\nGrass is green."
    assert second.correct == ()
    assert set(scores_of(task, template, [first], k=0)) == {"accuracy"}
    write_jsonl(path, {"text": "t", "candidates": ["a"], "answer": "b"})
    assert "the answer 'b' is no candidate" in reason(make_task("processtext", tmp_path), str(path))
    with pytest.raises(ConfigError, match="say --processtext-eval-set FILE"):
        plan("m", tasks="processtext", nb_few_shot_samples_values=0)


def test_real_files() -> None:
    root = shared_dir("data", "fewshot")
    swag = check_real_set(
        make_task("hellaswag", root), "val", ["hellaswag", "hellaswag_clean"], 10042
    )
    assert swag[0].correct == ("3",)
    check_real_set(make_task("piqa", root), "valid", ["piqa"], 1838)
    assert len(make_task("piqa", root).samples("test")) == 3084
    assert "train.jsonl is missing" in reason(make_task("piqa", root), "train")
    task = make_task("lambada", root)
    samples = task.samples("test")
    assert len(samples) == 8 and samples[0].correct == ("signs",)
    assert "last_word_accuracy" in scores_of(task, make_template("lambada"), samples[:3], k=0)
