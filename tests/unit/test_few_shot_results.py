"""What evaluations write, and what they make of what is there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from examples.few_shot import gpt3_eval, results
from examples.few_shot.evaluation import Evaluation
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.settings import PlannedEvaluation, plan
from examples.few_shot.tasks.copa import COPA
from fairseq_lite.errors import ConfigError, DataError


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"premise": f"Number {i} fell.", "choice1": f"It was loose {i}.", "choice2": "I held it.",
         "question": ("cause", "effect")[i % 2], "label": i % 2, "idx": i}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "COPA"
    folder.mkdir(parents=True)
    for name, some in (("train", rows(12)[6:]), ("val", rows(6))):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "data"


def planned(data: Path, **given: Any) -> PlannedEvaluation:
    values: dict[str, Any] = {
        "tasks": "copa", "nb_few_shot_samples_values": [2], "num_trials": 3, "scoring": "mean",
        "predictor_name": "dummy", "data_dir": str(data), "results_dir": str(data.parent / "out"),
        **given,
    }  # fmt: skip
    (found,) = plan("dummy", **values)
    return found


def evaluate(one: PlannedEvaluation) -> dict[str, Any]:
    return Evaluation(one, DummyModel()).run()


def test_a_results_file_is_strict_json_and_says_what_was_done(data: Path) -> None:
    one = planned(data)
    evaluate(one)

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(one.results_file.read_text(), parse_constant=refuse)
    assert found["task"] == found["template"] == "copa"
    assert len(found["accuracy"]["scores"]) == 3
    assert found["accuracy"]["mean"] == pytest.approx(sum(found["accuracy"]["scores"]) / 3)
    assert found["settings"]["scoring"] == "mean"
    assert found["settings_hash"] == one.settings_hash
    assert found["metric_definitions"]["accuracy"].startswith("Percentage of questions")
    assert found["eval_examples_cnt"] == 6
    assert found["model"]["kind"] == "dummy"
    assert found["example_prompts"][0].startswith("Number 0 fell because")
    assert {"torch", "python", "fairseq_lite"} <= set(found["versions"])
    assert results.is_complete(one)


def test_numbers_that_are_none_are_null(data: Path) -> None:
    assert results.strict({"a": math.nan, "b": [math.inf, 1.5], "c": (1, None)}) == {
        "a": None, "b": [None, 1.5], "c": [1, None],
    }  # fmt: skip


def test_a_trial_s_predictions_are_one_line_a_question(data: Path) -> None:
    one = planned(data, add_prompt_to_meta=True, add_positional_scores_to_meta=True)
    evaluate(one)
    lines = results.read_rows(one.prediction_files[1])
    assert [line["idx"] for line in lines] == [str(i) for i in range(6)]
    first = lines[0]
    assert first["id"] not in first["shots"] and len(first["shots"]) == 2
    (name, said), other = first["candidates"]
    assert (name, said["gold"]) == ("It was loose 0.", True)
    assert said["best"] != other[1]["best"]
    assert said["meta"]["prompt"].endswith("Number 0 fell because it was loose 0.")
    scores = said["meta"]["positional_scores"]
    assert len(scores) == len(said["meta"]["prompt"])
    tail = said["meta"]["tail_scores"]
    assert scores[-len(tail) :] == tail
    assert said["score"] == pytest.approx(sum(tail) / len(tail))


def test_again_is_the_same_but_for_the_times(data: Path) -> None:
    one = planned(data)
    evaluate(one)
    before = {path: path.read_bytes() for path in one.prediction_files}
    first = json.loads(one.results_file.read_text())
    for path in (*one.prediction_files, one.results_file):
        path.unlink()
    evaluate(one)
    second = json.loads(one.results_file.read_text())
    assert first.pop("times") != second.pop("times")
    assert json.dumps(first) == json.dumps(second)
    assert {path: path.read_bytes() for path in one.prediction_files} == before


class Counting(DummyModel):
    """Counts the calls, and dies at one of them."""

    def __init__(self, deadly: int = -1) -> None:
        super().__init__()
        self.calls, self.deadly = 0, deadly

    def score(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.deadly:
            raise KeyboardInterrupt
        return super().score(*args, **options)


def test_an_interrupted_evaluation_goes_on_with_the_trial_that_is_missing(data: Path) -> None:
    one = planned(data)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(one, Counting(deadly=3)).run()
    assert [path.exists() for path in one.prediction_files] == [True, True, False]
    assert not results.is_complete(one)
    model = Counting()
    found = Evaluation(one, model).run()
    assert model.calls == 1
    whole = planned(data, results_dir=str(data.parent / "whole"))
    expected = evaluate(whole)
    assert found["accuracy"] == expected["accuracy"]
    assert [path.read_bytes() for path in one.prediction_files] == [
        path.read_bytes() for path in whole.prediction_files
    ]


def test_predictions_of_another_model_data_or_kind_are_made_again(data: Path) -> None:
    one = planned(data)
    evaluate(one)

    class Other(Counting):
        def identity(self) -> dict[str, Any]:
            return {"kind": "other", "sha256": "feedface" * 8}

    same, other = Counting(), Other()
    Evaluation(one, same).run()
    Evaluation(one, other).run()
    assert (same.calls, other.calls) == (0, 3)
    with_prompts, anew = Counting(), Counting()
    Evaluation(planned(data, add_prompt_to_meta=True), with_prompts).run()
    Evaluation(planned(data, override_completed=True), anew).run()
    assert (with_prompts.calls, anew.calls) == (3, 3)
    path = data / "COPA" / "val.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    changed = Counting()
    Evaluation(planned(data), changed).run()
    assert changed.calls == 3
    (data / "COPA" / "train.jsonl").write_text("".join(lines[:4]))
    with_other_shots = Counting()
    Evaluation(planned(data), with_other_shots).run()
    assert with_other_shots.calls == 3


@pytest.mark.parametrize("damage", ["", "{", '{"id": 1}\n', "null\n"])
def test_damaged_predictions_are_made_again(data: Path, damage: str) -> None:
    one = planned(data)
    evaluate(one)
    whole = one.prediction_files[1].read_bytes()
    one.prediction_files[1].write_text(damage)
    model = Counting()
    Evaluation(one, model).run()
    assert model.calls == 1
    assert one.prediction_files[1].read_bytes() == whole


@pytest.mark.parametrize("change", ["cut", "settings", "format", "incomplete", "other"])
def test_what_is_not_whole_or_of_other_settings_is_not_complete(data: Path, change: str) -> None:
    one = planned(data)
    found = evaluate(one)
    if change == "cut":
        one.results_file.write_text(one.results_file.read_text()[:-50])
    elif change == "other":
        one.results_file.write_text("[]")
    else:
        damaged = {
            "settings": {**found, "settings": {**found["settings"], "scoring": "sum"}},
            "format": {**found, "format": 0},
            "incomplete": {**found, "complete": False},
        }[change]
        results.write_results(one.results_file, damaged)
    assert not results.is_complete(one)


def test_metrics_are_computed_anew_from_predictions(data: Path) -> None:
    one = planned(data)
    found = evaluate(one)
    damaged = {**found, "accuracy": {"scores": [0.0]}}
    results.write_results(one.results_file, damaged)
    again = planned(data, recalc_metrics_from_predictions=True)
    Evaluation(again, None).recalculated()
    assert results.read_results(one.results_file) == results.strict(found)


def test_perplexities_of_calibration_are_there_where_it_is(data: Path) -> None:
    options = {"calibrator_name": "average_option", "copa_calibration_options": ["premise::"]}
    one = planned(data, **options, nb_few_shot_samples_values=[0])
    found = evaluate(one)
    names = {name for name in found if name.startswith("ppl_calib")}
    assert names >= {f"ppl_calib_{name}" for name in (
        "common_prefix", "selected_candidate", "full_selected_candidate", "candidates",
        "candidates_full_prompt")}  # fmt: skip
    assert found["metric_definitions"]["calibration_ppl"].startswith("Perplexities of the copies")
    again = planned(
        data, **options, nb_few_shot_samples_values=[0], recalc_metrics_from_predictions=True
    )
    assert results.strict(Evaluation(again, None).recalculated()) == results.strict(found)
    plain = evaluate(planned(data, nb_few_shot_samples_values=[0]))
    assert not any("calib" in name for name in {*plain, *plain["metric_definitions"]} - {
        "calibrator_name", "calibration_options"})  # fmt: skip


def test_recalculation_needs_predictions(data: Path) -> None:
    one = planned(data)
    evaluate(one)
    one.prediction_files[0].unlink()
    with pytest.raises(DataError, match="predictions.jsonl: leave the flag out"):
        Evaluation(planned(data, recalc_metrics_from_predictions=True), None).recalculated()


def test_a_missing_data_file_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task copa: .*COPA/val.jsonl is missing") as raised:
        gpt3_eval.run_evaluations_from_model_name(
            "no/such/model", tasks="copa", nb_few_shot_samples_values=0, data_dir=str(tmp_path)
        )
    assert "--data-dir" in str(raised.value) and "\n" not in str(raised.value)


WRONG_LABEL = {"premise": "A.", "choice1": "b", "choice2": "c", "question": "cause", "label": 2}


@pytest.mark.parametrize("line", ['{"premise": "A."}', "[1]", "{", json.dumps(WRONG_LABEL)])
def test_a_damaged_row_is_named(data: Path, line: str) -> None:
    path = data / "COPA" / "val.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"val.jsonl:2: ") as raised:
        evaluate(planned(data))
    assert "\n" not in str(raised.value)


def test_baselines_ask_no_model(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {
        "tasks": "copa", "nb_few_shot_samples_values": 0, "data_dir": str(data),
        "results_dir": str(data.parent / "out"),
    }  # fmt: skip
    (drawn,) = gpt3_eval.run_evaluations_from_model_name(
        "random", predictor_name="random", **values
    )
    (most,) = gpt3_eval.run_evaluations_from_model_name(
        "majority", predictor_name="majorityclass", confusion_matrix=True, **values
    )
    assert 0 <= drawn["accuracy"]["mean"] <= 100
    assert most["accuracy"]["mean"] == 50.0  # candidates differ: the most frequent place counts
    assert "accuracy 50.00" in capsys.readouterr().out


def test_skip_completed_asks_nothing_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "tasks": "copa", "nb_few_shot_samples_values": 0, "data_dir": str(data),
        "results_dir": str(data.parent / "out"), "predictor_name": "random",
    }  # fmt: skip
    first = gpt3_eval.run_evaluations_from_model_name("random", **values)
    monkeypatch.setattr(Evaluation, "run", lambda self: pytest.fail("evaluated again"))
    again = gpt3_eval.run_evaluations_from_model_name("random", skip_completed=True, **values)
    assert first == again


def test_a_folder_that_cannot_be_written_is_told(data: Path) -> None:
    (data.parent / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        evaluate(planned(data))


def test_a_shot_without_a_training_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tasks"):
        plan("m")


def test_a_majority_may_be_that_of_another_set(data: Path) -> None:
    biased = "".join(json.dumps({**row, "label": 1}) + "\n" for row in rows(5))
    (data / "COPA" / "test.jsonl").write_text(biased)
    values: dict[str, Any] = {
        "tasks": "copa", "nb_few_shot_samples_values": 0, "data_dir": str(data),
        "results_dir": str(data.parent / "out"), "predictor_name": "majorityclass",
    }  # fmt: skip
    (found,) = gpt3_eval.run_evaluations_from_model_name("m", copa_valid_set="test", **values)
    lines = results.read_rows(data.parent / "out" / found["predictions"][0])
    assert {line["candidates"][1][1]["best"] for line in lines} == {True}


def test_questions_without_a_known_answer_are_not_counted(data: Path) -> None:
    some = [{**row, "label": row["label"]} for row in rows(4)]
    for row in some[2:]:
        del row["label"]
    (data / "COPA" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    one = planned(data, copa_eval_set="test", nb_few_shot_samples_values=[0])
    evaluate(one)
    lines = results.read_rows(one.prediction_files[0])
    for line in lines[:2]:  # what the dummy holds best is right, of the two that can be
        for _, said in line["candidates"]:
            said["score"] = float(said["gold"])
    results.write_predictions(one.prediction_files[0], lines)
    found = evaluate(one)
    assert found["accuracy"]["mean"] == 100.0
    assert found["questions_cnt"] == 4


def test_shots_in_another_language_are_no_translations_of_the_question(tmp_path: Path) -> None:
    for language in ("it", "zh"):
        folder = tmp_path / "xcopa" / language
        folder.mkdir(parents=True)
        text = "".join(
            json.dumps({**row, "premise": f"{language} {i}."}) + "\n"
            for i, row in enumerate(rows(6))
        )
        (folder / f"val.{language}.jsonl").write_text(text, encoding="utf-8")
    (found,) = gpt3_eval.run_evaluations_from_model_name(
        "m", tasks="xcopa", xcopa_languages="it", xcopa_train_lang="zh", predictor_name="dummy",
        nb_few_shot_samples_values=[5], num_trials=2, data_dir=str(tmp_path),
        results_dir=str(tmp_path / "out"), add_prompt_to_meta=True,
    )  # fmt: skip
    for name in found["predictions"]:
        for line in results.read_rows(tmp_path / "out" / name):
            prompt = line["candidates"][0][1]["meta"]["prompt"]
            assert f"it {line['idx']}" in prompt
            assert prompt.count("zh ") == 5
            assert f"zh {line['idx']}" not in prompt


@pytest.mark.parametrize(
    ("change", "said"),
    [({"premise": "A <mask>."}, "<mask>"), ({"choice2": None}, "candidate"),
     ({"choice2": 5}, "candidate"), ({"premise": "\ud800x"}, "half a character")],
)  # fmt: skip
def test_a_row_that_cannot_be_asked_is_named(data: Path, change: dict[str, Any], said: str) -> None:
    path = data / "COPA" / "val.jsonl"
    path.write_text(json.dumps({**rows(1)[0], **change}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"val.jsonl:1: .*{said}"):
        evaluate(planned(data, nb_few_shot_samples_values=[0]))


def test_characters_beyond_sixteen_bits_may_be_written_as_escapes(data: Path) -> None:
    path = data / "COPA" / "val.jsonl"
    path.write_text(json.dumps({**rows(1)[0], "premise": "\U0001f600."}) + "\n", encoding="utf-8")
    assert "\\ud83d" in path.read_text(encoding="utf-8")
    assert evaluate(planned(data, nb_few_shot_samples_values=[0]))["questions_cnt"] == 1


def test_results_of_other_data_are_made_anew(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    values: dict[str, Any] = {
        "tasks": "copa", "nb_few_shot_samples_values": 0, "data_dir": str(data),
        "results_dir": str(data.parent / "out"), "predictor_name": "random",
    }  # fmt: skip
    (first,) = gpt3_eval.run_evaluations_from_model_name("random", **values)
    path = data / "COPA" / "val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    (again,) = gpt3_eval.run_evaluations_from_model_name("random", skip_completed=True, **values)
    assert (first["eval_examples_cnt"], again["eval_examples_cnt"]) == (6, 3)
    assert "was made with other data" in caplog.text
    path.unlink()
    (kept,) = gpt3_eval.run_evaluations_from_model_name("random", skip_completed=True, **values)
    assert kept == again


def test_evaluations_that_are_made_together_read_a_file_once(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    plain = COPA.rows
    monkeypatch.setattr(COPA, "rows", lambda self, path: read.append(path) or plain(self, path))
    gpt3_eval.run_evaluations_from_model_name(
        "random", tasks="copa", nb_few_shot_samples_values=[0, 1, 2], data_dir=str(data),
        results_dir=str(data.parent / "out"), predictor_name="random",
    )  # fmt: skip
    assert sorted(path.name for path in read) == ["train.jsonl", "val.jsonl"]


def test_a_field_that_is_null_is_named(data: Path) -> None:
    path = data / "COPA" / "val.jsonl"
    path.write_text(json.dumps({**rows(1)[0], "premise": None}) + "\n")
    with pytest.raises(DataError, match=r"val.jsonl:1: field 'premise' is null"):
        evaluate(planned(data))


def test_nothing_is_computed_anew_of_what_is_not_there(data: Path) -> None:
    said = r"^--recalc-metrics-from-predictions: there is no \S+results.json: leave the flag out"
    with pytest.raises(DataError, match=said):
        Evaluation(planned(data), None).recalculated()
