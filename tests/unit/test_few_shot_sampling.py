"""Which samples are shots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.few_shot import gpt3_eval, results
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.sampling import classes_of, draw, order, translations
from fairseq_lite.errors import ConfigError


def pool_of(size: int, classes: int = 2) -> list[FewShotSample]:
    names = [f"class {n}" for n in range(classes)]
    return [choice({"text": f"text {i}"}, names, i % classes) for i in range(size)]


@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_an_order_holds_everything_once_and_is_made_again(size: int, seed: int, trial: int) -> None:
    found = order(size, seed=seed, trial=trial, task="copa")
    assert sorted(found) == list(range(size))
    assert found == order(size, seed=seed, trial=trial, task="copa")


def test_seed_trial_and_task_each_change_the_order() -> None:
    found = {
        tuple(order(50, seed=seed, trial=trial, task=task))
        for seed in (0, 1)
        for trial in (0, 1)
        for task in ("copa", "rte")
    }
    assert len(found) == 8
    # Seeds and trials are not added up.
    assert order(50, seed=0, trial=1, task="x") != order(50, seed=1, trial=0, task="x")


def test_the_order_of_today_is_the_order_of_tomorrow() -> None:
    # Results name their shots by seed: the draw may not change from release to release.
    assert order(10, seed=0, trial=0, task="copa") == [5, 7, 3, 9, 2, 6, 0, 1, 8, 4]


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30))
def test_fewer_shots_are_among_more(size: int, one: int, other: int) -> None:
    pool = pool_of(size)
    few, many = (
        draw(pool, k, seed=0, trial=0, task="t").of(choice({"text": "new"}, ["a"], 0))
        for k in sorted((one, other))
    )
    assert many[: len(few)] == few
    assert len(many) == min(max(one, other), size)


@given(st.integers(2, 20), st.integers(1, 19), st.data())
def test_a_sample_is_not_among_its_own_shots(size: int, k: int, data: st.DataObject) -> None:
    pool = pool_of(size)
    sample = data.draw(st.sampled_from(pool))
    found = draw(pool, k, seed=0, trial=0, task="t").of(sample)
    assert sample not in found
    assert len(found) == min(k, size - 1)


def test_a_copy_of_the_sample_counts_as_the_sample() -> None:
    pool = pool_of(5)
    copy = choice(dict(pool[2].data), pool[2].candidates, 0)
    assert pool[2] not in draw(pool, 5, seed=0, trial=0, task="t").of(copy)


def test_a_copy_under_another_number_or_with_another_answer_counts_as_the_sample() -> None:
    pool = [choice({"text": f"text {i}", "idx": i, "label": 0}, ["a", "b"], 0) for i in range(5)]
    copy = choice({"text": "text 2", "idx": 77, "label": 1}, ["a", "b"], 1)
    found = draw(pool, 5, seed=0, trial=0, task="t").of(copy)
    assert sorted(each["idx"] for each in found) == [0, 1, 3, 4]


@pytest.mark.parametrize("missing", [0, 2])
def test_the_translation_of_a_sample_is_not_among_its_shots(missing: int) -> None:
    german = [choice({"text": f"Satz {i}"}, ["a", "b"], 0, f"de:{i + 1}") for i in range(6)]
    english = [choice({"text": f"text {i}"}, ["a", "b"], 0, f"en:{i + 1}") for i in range(6)]
    del english[missing]  # a row that was not translated
    own = translations(german[:4], english)
    for number, sample in enumerate(german[:4]):
        found = draw(english, 6, seed=0, trial=0, task="t", translated=own).of(sample)
        assert f"text {number}" not in {each["text"] for each in found}
        leaking = draw(english, 6, seed=0, trial=0, task="t", translated=own, leak=True)
        assert len(leaking.of(sample)) == 5


@pytest.mark.parametrize("where", ["", "{}:7"])
def test_a_translation_that_stands_at_the_same_place_is_found_without_its_line(where: str) -> None:
    # Sets that are made of several files, or that tell no lines.
    german = [choice({"text": f"Satz {i}"}, ["a", "b"], 0, where.format("de")) for i in range(4)]
    english = [choice({"text": f"text {i}"}, ["a", "b"], 0, f"en:{i + 90}") for i in range(4)]
    own = translations(german, english)
    for number, sample in enumerate(german):
        found = draw(english, 4, seed=0, trial=0, task="t", translated=own).of(sample)
        assert sorted(each["text"] for each in found) == [
            f"text {i}" for i in range(4) if i != number
        ]


def _questions(path: Path, count: int, first: int = 0) -> None:
    """Of MultiRC: passages of two questions, each with two answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(first, first + count):
        answers = [{"text": f"answer {i} {j}", "label": j % 2, "idx": j} for j in range(2)]
        questions = [
            {"question": f"question {i} {j}?", "answers": answers, "idx": j} for j in range(2)
        ]
        lines.append(
            json.dumps({"idx": i, "passage": {"text": f"text {i}.", "questions": questions}})
        )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("train_set", ["val", "train"])
def test_questions_of_several_answers_are_not_among_their_shots(
    train_set: str, tmp_path: Path
) -> None:
    _questions(tmp_path / "MultiRC" / "val.jsonl", 3)
    # The same passages at other places of another file.
    _questions(tmp_path / "MultiRC" / "train.jsonl", 4, first=-1)
    (found,) = gpt3_eval.run_evaluations_from_model_name(
        "m", tasks="multirc", multirc_train_set=train_set, predictor_name="dummy",
        nb_few_shot_samples_values=[20], num_trials=1, data_dir=str(tmp_path),
        results_dir=str(tmp_path / "out"), add_prompt_to_meta=True, max_positions=2000,
    )  # fmt: skip
    (name,) = found["predictions"]
    lines = results.read_rows(tmp_path / "out" / name)
    assert len(lines) == 12
    for line in lines:
        number, _, _ = line["idx"].partition(".")
        asked = f"question {int(number) // 2} {int(number) % 2}?"
        prompt = line["candidates"][0][1]["meta"]["prompt"]
        assert prompt.count(asked) == 1
        assert prompt.count("question ") == len(line["shots"]) + 1
        assert len(line["shots"]) == (5 if train_set == "val" else 7)


def test_a_sample_may_be_its_own_shot_where_that_is_asked_for() -> None:
    pool = pool_of(4)
    assert pool[1] in draw(pool, 4, seed=0, trial=0, task="t", leak=True).of(pool[1])


def test_only_the_sample_s_own_place_is_taken_by_another() -> None:
    pool = pool_of(30)
    shots = draw(pool, 6, seed=0, trial=0, task="t")
    usual = shots.of(choice({"text": "new"}, ["a"], 0))
    found = shots.of(usual[2])
    assert found[:5] == usual[:2] + usual[3:]


@given(st.sampled_from([2, 3, 4]), st.integers(0, 4), st.integers(0, 5))
def test_uniform_shots_are_as_many_of_each_class(classes: int, each: int, trial: int) -> None:
    pool = pool_of(10 * classes, classes)
    shots = draw(pool, classes * each, seed=0, trial=trial, task="t", uniform=True)
    found = [one.correct[0] for one in shots.of(pool[0])]
    assert all(found.count(f"class {n}") == each for n in range(classes))
    assert pool[0] not in shots.of(pool[0])


def test_uniform_shots_need_a_multiple_of_the_classes() -> None:
    with pytest.raises(ConfigError, match="5 shots are no multiple of the 2 classes"):
        draw(pool_of(10), 5, seed=0, trial=0, task="t", uniform=True)


def test_uniform_shots_need_classes() -> None:
    with pytest.raises(ConfigError, match="do not have one class each"):
        draw([FewShotSample({"q": 1}, correct=("x",))], 1, seed=0, trial=0, task="t", uniform=True)


def test_uniform_shots_need_enough_of_each_class() -> None:
    few = [choice({"n": i}, ["a", "b"], 0) for i in range(9)] + [choice({"n": 9}, ["a", "b"], 1)]
    with pytest.raises(ConfigError, match="class 'b' has 1 samples for 2 shots"):
        draw(few, 4, seed=0, trial=0, task="t", uniform=True).of(choice({"n": 11}, ["a"], 0))


def test_shots_stand_in_the_order_of_the_file_where_that_is_asked_for() -> None:
    pool = pool_of(20)
    new = choice({"text": "new"}, ["a"], 0)
    usual = draw(pool, 8, seed=0, trial=0, task="t").of(new)
    kept = draw(pool, 8, seed=0, trial=0, task="t", keep_order=True).of(new)
    assert usual != kept == [one for one in pool if one in usual]


def test_a_class_whose_only_sample_is_asked_about_stays_a_class() -> None:
    pool = [choice({"n": i}, ["a", "b"], int(i == 0)) for i in range(6)]
    with pytest.raises(ConfigError, match="class 'b' has 0 samples for 1 shots"):
        draw(pool, 2, seed=0, trial=0, task="t", uniform=True).of(pool[0])


def test_alternatives_of_each_sample_are_classes_by_the_place_of_the_right_one() -> None:
    pool = [choice({"n": i}, [f"left {i}", f"right {i}"], i % 2) for i in range(12)]
    found = draw(pool, 4, seed=0, trial=0, task="copa", uniform=True).of(pool[0])
    assert [one.correct[0].split()[0] for one in found] == ["left", "right"] * 2
    with pytest.raises(ConfigError, match="2 classes of copa: answer 1, answer 2$"):
        draw(pool, 3, seed=0, trial=0, task="copa", uniform=True)


def test_the_order_of_candidates_makes_no_other_classes() -> None:
    pool = [choice({"n": i}, ["yes", "no"] if i % 2 else ["no", "yes"], 0) for i in range(6)]
    assert set(classes_of(pool, "t")) == {"yes", "no"}


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([["a", "b"], ["c", "d", "e"]], "do not have one class each"),
        ([["a", "b"], ["c", "d"]], "are of one class, 'answer 1'"),
        ([["a", "b"], ["a", "b"]], "are of one class, 'a'"),
    ],
)
def test_uniform_shots_need_several_classes(candidates: list[list[str]], message: str) -> None:
    pool = [choice({"n": i}, its, 0) for i, its in enumerate(candidates)]
    with pytest.raises(ConfigError, match=message) as raised:
        draw(pool, 2, seed=0, trial=0, task="t", uniform=True)
    assert str(raised.value).endswith("leave it out")
