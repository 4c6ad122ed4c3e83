"""Many results as one table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from examples.few_shot import collecting, report, results
from examples.few_shot.evaluation import Evaluation
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.scripts import collect_results
from examples.few_shot.settings import plan
from fairseq_lite.errors import ConfigError, DataError


class Longer(DummyModel):
    """Another model: it has an opinion of its own about every token."""

    @staticmethod
    def _log_probs(ids: Any) -> Any:
        return DummyModel._log_probs(ids[::-1])[::-1]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two models with 0 and 2 shots, three trials, one of them calibrated."""
    root = tmp_path_factory.mktemp("collect")
    folder = root / "data" / "COPA"
    folder.mkdir(parents=True)
    rows = [
        {"premise": f"Number {i} fell.", "choice1": f"It was loose {i}.", "choice2": f"I held {i}.",
         "question": "cause", "label": i % 2} for i in range(9)
    ]  # fmt: skip
    for name in ("train", "val"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name, model in (("small", DummyModel()), ("large", Longer())):
        for one in plan(
            name, tasks="copa", nb_few_shot_samples_values=[0, 2], num_trials=3, scoring="mean",
            data_dir=str(root / "data"), results_dir=str(root / "out" / name),
            calibrator_name="average_option", copa_calibration_options=["premise::"],
            add_calib_to_meta=True,
        ):  # fmt: skip
            Evaluation(one, model).run()
    return root / "out"


def collect(*words: object) -> None:
    collect_results.main([str(word) for word in words])


def test_models_stand_side_by_side(evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.tsv"
    collect("-i", evaluated, "-o", out, "-v", "by_run_params_simple")
    head, *lines = [line.split("\t") for line in out.read_text().splitlines()]
    assert head[-2:] == ["large", "small"]
    assert [line[head.index("nb_few_shot_samples")] for line in lines] == ["0", "2"]
    rows = {(r["model_name"], r["nb_few_shot_samples"]): r
            for r in collecting.load(collecting.results_files([str(evaluated)]))}  # fmt: skip
    for line, k in zip(lines, (0, 2), strict=True):
        for column, model in ((-2, "large"), (-1, "small")):
            values = rows[model, k]["accuracy"]
            assert line[column].startswith(f"{values['mean']:.2f}")
            assert ("±" in line[column]) == (k == 2 and values["std"] > 0)


def test_everything_is_kept_beside_the_table(evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.tsv"
    collect("-i", evaluated / "small", "-o", out, "-v", "raw")
    raw = [json.loads(line) for line in (tmp_path / "t.tsv.raw.jsonl").read_text().splitlines()]
    assert len(raw) == 2
    head, *lines = [line.split("\t") for line in out.read_text().splitlines()]
    assert lines[0][head.index("_metric")] == "accuracy"
    assert float(lines[0][head.index("_metric_val")]) == raw[0]["accuracy"]["mean"]
    assert "settings::scoring" in head


def test_a_table_grows_by_what_is_new(evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.tsv"
    for _ in range(2):
        collect("-i", evaluated / "small", "-o", out)
    assert len(out.read_text().splitlines()) == 3
    collect("-i", evaluated / "large", "-o", out)
    assert len(out.read_text().splitlines()) == 5
    with pytest.raises(DataError, match="has other columns.*--overwrite-output"):
        collect("-i", evaluated, "-o", out, "-v", "raw")
    collect("-i", evaluated, "-o", out, "-v", "raw", "--overwrite-output")


@pytest.mark.parametrize("view", list(collecting.VIEWS))
def test_every_view_has_rows(
    evaluated: Path, view: str, capsys: pytest.CaptureFixture[str]
) -> None:
    collect("-i", evaluated, "-v", view)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    assert len({line.count("\t") for line in lines}) == 1


def test_recalculated_accuracies_are_those_that_were_reported(evaluated: Path) -> None:
    # `mean` with calibration is what the evaluations themselves counted.
    for row in collecting.load(collecting.results_files([str(evaluated)])):
        again = collecting.recalculated(row)
        assert again["accuracy_mean_calib"]["scores"] == row["accuracy"]["scores"]
        assert {"accuracy_sum", "accuracy_mean_full", "accuracy_sum_charnorm"} <= set(again)
        assert ("accuracy_mean_ensemble" in again) == (row["nb_few_shot_samples"] == 2)


@pytest.mark.parametrize("scoring", ["sum", "unconditional-norm"])
def test_recalculated_scores_are_those_of_an_evaluation_by_them(
    scoring: str, evaluated: Path
) -> None:
    (row,) = (
        r for r in collecting.load(collecting.results_files([str(evaluated / "small")]))
        if r["nb_few_shot_samples"] == 0
    )  # fmt: skip
    (one,) = plan(
        "small", tasks="copa", nb_few_shot_samples_values=0, scoring=scoring,
        data_dir=str(evaluated.parent / "data"), results_dir=str(evaluated.parent / scoring),
    )  # fmt: skip
    found = Evaluation(one, DummyModel()).run()
    if scoring == "unconditional-norm":  # it needs what others do not ask the model for
        assert f"accuracy_{scoring}" not in collecting.recalculated(row)
        row = {**found, "path": str(one.results_file)}
    again = collecting.recalculated(row)[f"accuracy_{scoring}"]
    assert again["scores"] == found["accuracy"]["scores"]


def test_positional_scores_are_all_that_scorings_are_made_of(evaluated: Path) -> None:
    def accuracies(scoring: str, **more: Any) -> dict[str, Any]:
        (one,) = plan(
            "small", tasks="copa", nb_few_shot_samples_values=0, scoring=scoring, **more,
            data_dir=str(evaluated.parent / "data"), results_dir=str(evaluated.parent / "whole"),
        )  # fmt: skip
        found = Evaluation(one, DummyModel()).run()
        return collecting.recalculated({**found, "path": str(one.results_file)})

    name = "accuracy_unconditional-norm"
    kept = accuracies("mean", add_positional_scores_to_meta=True)
    assert kept[name]["scores"] == accuracies("unconditional-norm")["accuracy"]["scores"]
    assert name not in accuracies("sum")


def test_accuracies_made_again_are_in_every_table(evaluated: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("t.tsv", "p.tsv", "r.md", "r.html")]
    long, wide, text, page = files
    collect("-i", evaluated, "-r", "-o", long, "--markdown", text, "--html", page)
    collect("-i", evaluated, "-r", "-o", wide, "-v", "by_run_params_simple")
    head, *lines = (line.split("\t") for line in long.read_text().splitlines())
    for line in lines:  # of scoring and calibration as the evaluation's own
        row = dict(zip(head, line, strict=True))
        assert row["accuracy_mean_calib"] == row["mean"]
        assert bool(row["accuracy_sum_charnorm_ensemble"]) == (row["nb_few_shot_samples"] == "2")
    for file in files[1:]:
        assert "accuracy_sum_charnorm_ensemble" in file.read_text()
    collect("-i", evaluated, "-o", tmp_path / "plain.tsv")
    assert "accuracy_sum" not in (tmp_path / "plain.tsv").read_text()


def test_suffixes_are_scored_again_where_there_are_some() -> None:
    ends = {"context_score": -9.0, "context_tokens": 3, "start": 0, "characters": 4}
    candidates = [
        [name, {"gold": name == "a", "meta": {**ends, "tail_scores": tail, "suffix": suffix}}]
        for name, tail, suffix in (("a", [-5.0, -1.0], 1), ("b", [-1.0, -2.0], 1))
    ]
    trial = [{"candidates": candidates}]
    suffix, total = (collecting.SCORINGS[name] for name in ("suffix", "sum"))
    assert collecting._scores(trial, suffix, False) == [[-1.0, -2.0]]
    assert collecting._scores(trial, total, False) == [[-15.0, -12.0]]
    candidates[0][1]["meta"]["suffix"] = 0
    assert collecting._scores(trial, suffix, False) is None


def test_scores_of_unread_prompts_are_no_mean_over_them(evaluated: Path) -> None:
    (one,) = plan(
        "small", tasks="copa", nb_few_shot_samples_values=0, skip_context_scores=True,
        data_dir=str(evaluated.parent / "data"), results_dir=str(evaluated.parent / "skipped"),
        calibrator_name="average_option", copa_calibration_options=["premise::"],
        add_calib_to_meta=True,
    )  # fmt: skip
    found = Evaluation(one, DummyModel()).run()
    again = collecting.recalculated({**found, "path": str(one.results_file)})
    assert "accuracy_sum_calib" in again
    assert not [name for name in again if name.startswith("accuracy_mean_full")]
    assert not [name for name in found if "full" in name]


def test_questions_without_a_known_answer_are_not_counted_again(evaluated: Path) -> None:
    (row,) = collecting.load(sorted((evaluated / "small").glob("*fs0*_results.json")))
    trial = collecting.results.read_rows(evaluated / "small" / row["predictions"][0])
    for line in trial[3:]:
        for _, said in line["candidates"]:
            said["gold"] = False
    scores = [[float(said["gold"]) for _, said in line["candidates"]] for line in trial]
    assert collecting._accuracy(trial, scores) == 100.0


def test_an_ensemble_is_the_mean_of_probabilities_or_the_most_votes() -> None:
    trials = [[[math.log(0.9), math.log(0.1)]], [[math.log(0.3), math.log(0.7)]],
              [[math.log(0.4), math.log(0.6)]]]  # fmt: skip
    (mean,) = collecting._mean(trials)
    assert mean == pytest.approx([1.6 / 3, 1.4 / 3])
    assert collecting._votes(trials) == [[1.0, 2.0]]


def test_recalculation_needs_predictions_with_scores(evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="predictions.jsonl: No such file"):
        collect("-i", evaluated, "-r", "--predictions-dir", tmp_path)


def test_pages_have_a_table_and_a_picture_of_each_task(evaluated: Path, tmp_path: Path) -> None:
    page, text = tmp_path / "r.html", tmp_path / "r.md"
    collect("-i", evaluated, "--html", page, "--markdown", text, "--plots", tmp_path / "plots",
            "-o", tmp_path / "t.tsv")  # fmt: skip
    (picture,) = (tmp_path / "plots").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"](plots/{picture.name})" in text.read_text()
    assert "| small |" in text.read_text().splitlines()[0]
    shown = page.read_text()
    assert shown.count("<tr>") == 3 and "data:image/png;base64," in shown
    assert not re.search(r"(src|href)=\"http", shown)


def test_curves_have_a_point_for_each_number_of_shots(evaluated: Path) -> None:
    rows = collecting.load(collecting.results_files([str(evaluated)]))
    ((title, metric, lines),) = report.curves(rows)
    assert metric == "accuracy" and title.startswith("copa copa val mean average_option")
    assert {model: [point[0] for point in points] for model, points in lines.items()} == {
        "small": [0, 2], "large": [0, 2],
    }  # fmt: skip


def test_what_is_damaged_is_left_out_and_told(
    evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a_results.json").write_text('{"complete": true')
    (tmp_path / "b_results.json").write_text('{"complete": false}')
    whole = next((evaluated / "small").glob("*_results.json"))
    (tmp_path / "c_results.json").write_bytes(whole.read_bytes())
    found = collecting.load(collecting.results_files([str(tmp_path)]))
    assert [Path(row["path"]).name for row in found] == ["c_results.json"]
    assert caplog.text.count("left out") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-i", "no/such/folder"], "neither a folder nor a results file"),
        (["-i", "no/such*"], "no folder or file has such a name"),
        (["-i", "OUT", "-t", "cb"], "no results of these tasks and models; there are large: copa"),
        (["-i", "OUT", "-t", "coppa"], "did you mean .*copa"),
        (["-i", "OUT", "-m", "medium"], "no results of these tasks and models"),
        (["-i", "OUT", "--view", "best"], "invalid choice"),
        ([], "-i/--input"),
    ],
)
def test_what_cannot_be_collected_is_told(evaluated: Path, words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        collect(*(str(evaluated) if word == "OUT" else word for word in words))


def test_results_of_one_model_only(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect("-i", evaluated, "-m", "small", "-t", "copa")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("\t")[0] for line in lines] == ["small", "small"]


def test_strictness_is_that_of_the_results() -> None:
    assert results.strict(math.nan) is None


def test_results_of_one_model_that_differ_by_settings_alone_stand_apart(tmp_path: Path) -> None:
    folder = tmp_path / "COPA"
    folder.mkdir()
    row = {"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "cause", "label": 0}
    text = "".join(json.dumps({**row, "premise": f"Number {i}."}) + "\n" for i in range(4))
    (folder / "val.jsonl").write_text(text)
    for name, some in (("one", (1, 3)), ("two", (3,))):
        for n in some:
            (one,) = plan(name, tasks="copa", nb_few_shot_samples_values=[0], n_eval_samples=n,
                          data_dir=str(tmp_path), results_dir=str(tmp_path / "out"))  # fmt: skip
            Evaluation(one, DummyModel()).run()
    rows = collecting.load(sorted((tmp_path / "out").glob("*_results.json")))
    told = {line["settings"]: line for line in collecting.pivot(rows)}
    assert set(told) == {"n_eval_samples=1", "n_eval_samples=3"}
    assert told["n_eval_samples=1"]["one"] and not told["n_eval_samples=1"]["two"]
    assert told["n_eval_samples=3"]["one"] and told["n_eval_samples=3"]["two"]
    assert len(list(report.curves(rows))) == 2
    alone = [each for each in rows if each["eval_examples_cnt"] == 3]
    assert "settings" not in collecting.columns_of(collecting.pivot(alone))


def test_what_cannot_be_recalculated_stays_as_it_is(evaluated: Path, tmp_path: Path) -> None:
    rows = collecting.load(sorted((evaluated / "small").glob("*_results.json")))
    whole, broken = rows[0], {**rows[1], "path": str(tmp_path / "x_results.json")}
    for name in broken["predictions"]:
        (tmp_path / name).write_text('{"candidates": [["a", {}]]}\n')
    first, second = collecting.recalculate([whole, broken])
    assert "accuracy_sum" in first
    assert second == broken
    with pytest.raises(DataError, match="x_results.json: its predictions are damaged"):
        collecting.recalculate([broken])


def test_results_without_their_metric_are_left_out(evaluated: Path, tmp_path: Path) -> None:
    whole = next((evaluated / "small").glob("*_results.json"))
    found = json.loads(whole.read_text())
    path = tmp_path / "x_results.json"
    path.write_text(json.dumps({**found, "accuracy": None}))
    assert collecting.load([whole, path]) == collecting.load([whole])
