"""What is said and does nothing: refused where no task heeds it, remarked where some do not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from examples.few_shot import gpt3_eval
from examples.few_shot.heeded import remarks
from examples.few_shot.options import EvaluationOptions
from examples.few_shot.predictors.api import PREDICTORS, Prediction, Predictor, Trial
from examples.few_shot.settings import plan
from fairseq_lite.errors import ConfigError
from tests.helpers.few_shot_tasks import write_jsonl
from tests.helpers.registered import registered


def said(model: str = "m", **given: Any) -> list[str]:
    values = {"tasks": "copa", "nb_few_shot_samples_values": 0, **given}
    return remarks(plan(model, **values), values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scoring": "mean"}, "--scoring mean: none of these tasks chooses among candidates"),
        ({"scoring": "sum"}, "--scoring sum: none of these tasks chooses"),
        ({"skip_context_scores": True}, "--skip-context-scores: none of these tasks chooses"),
        ({"tasks": ["lama", "wmt14fren"], "scoring": "mean"}, "--scoring mean: none of these"),
        ({"tasks": "copa", "beam_size": 4}, "--beam-size 4: none of these tasks writes answers"),
        ({"tasks": "perplexity", "perplexity_eval_set": "a.txt", "train_sep": "\\n"},
         r"--train-sep \\n: none of these tasks puts questions"),
    ],
)  # fmt: skip
def test_what_no_task_heeds_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        said(**{"tasks": "naturalquestions", **given})
    assert str(raised.value).endswith("leave it out") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "remark"),
    [
        ({"tasks": ["copa", "naturalquestions"], "scoring": "mean"},
         "--scoring mean: does nothing for naturalquestions; it is for what chooses among"
         " candidates"),
        ({"tasks": ["copa", "lama", "triviaqa"], "scoring": "mean"},
         "--scoring mean: does nothing for lama_conceptnet, lama_googlere, lama_squad, lama_trex"
         " and 1 more; it is for what chooses among candidates"),
        ({"tasks": ["copa", "naturalquestions"], "beam_size": 4},
         "--beam-size 4: does nothing for copa; it is for what writes answers or ranks words"),
        ({"tasks": "naturalquestions", "add_positional_scores_to_meta": True},
         "--add-positional-scores-to-meta: does nothing for naturalquestions; it is for what"
         " chooses among candidates"),
        ({"add_calib_to_meta": True}, "--add-calib-to-meta: does nothing without"
         " --calibrator-name"),
    ],
)  # fmt: skip
def test_what_some_tasks_do_not_heed_is_one_remark(given: dict[str, Any], remark: str) -> None:
    assert said(**given) == [remark]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"any_languages": ["de"]}, "--any-languages de: none of these tasks is in several"),
        ({"any_train_lang": "de"}, "--any-train-lang de: none of these tasks is in several"),
        ({"any_valid_lang": "de"}, "--any-valid-lang de: none of these tasks is in several"),
        ({"tasks": ["copa", "xcopa"], "any_valid_lang": "it"},
         "--any-valid-lang it: say --any-valid-set, too"),
    ],
)  # fmt: skip
def test_languages_are_refused_where_no_task_has_several(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        said(**given)


def test_what_is_said_of_shots_is_a_remark_where_there_are_none() -> None:
    given = {
        "tasks": ["copa", "xcopa"], "num_trials": 3, "any_train_set": "val",
        "xcopa_languages": "it", "xcopa_train_lang": "et", "uniform_sampling": True,
    }  # fmt: skip
    assert said(**given) == [
        "--uniform-sampling, --num-trials 3, --any-train-set val, --xcopa-train-lang et: do nothing"
        " without shots, --nb-few-shot-samples-values 0"
    ]
    assert said(**given, nb_few_shot_samples_values=[0, 1]) == []
    assert said(copa_train_set="val") == [
        "--copa-train-set val: does nothing without shots, --nb-few-shot-samples-values 0"
    ]
    assert said("random", predictor_name="random", num_trials=2)[0].startswith("--num-trials 2")


def test_a_port_is_for_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"PROCID": 0, "NTASKS": 2, "STEP_ID": 1, "JOB_NODELIST": "a,b", "NNODES": 2}
    options = EvaluationOptions(distributed_port=12345)
    for name in ("RANK", "WORLD_SIZE", *(f"SLURM_{name}" for name in slurm)):
        monkeypatch.delenv(name, raising=False)
    assert not gpt3_eval._meet_at_port(options)
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert gpt3_eval._meet_at_port(options)


def test_what_is_heeded_or_not_said_is_no_remark() -> None:
    assert said(scoring="mean", train_sep="\\n", copa_template="copa", cause_conj=" for ") == []
    assert said(tasks=["copa", "naturalquestions"], scoring=None, beam_size=1) == []
    assert said(tasks="naturalquestions", skip_context_scores=False) == []
    calibrated = {"calibrator_name": "average_option", "copa_calibration_options": ["premise::"]}
    assert said(add_calib_to_meta=True, **calibrated) == []


@pytest.mark.parametrize("baseline", ["random", "majorityclass", "majority"])
@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"copa_template": ["copa"]}, "--copa-template copa"),
        ({"cause_conj": " for "}, "--cause-conj  for "),
        ({"capitalization": "upper"}, "--capitalization upper"),
        ({"scoring": "mean"}, "--scoring mean"),
        ({"train_sep": "\\n"}, r"--train-sep \\n"),
        ({"train_sep": "\n"}, r"--train-sep \\n"),
        ({"calibrator_name": "average_option", "copa_calibration_options": ["premise::"]},
         "--calibrator-name average_option"),
        ({"max_positions": 100}, "--max-positions 100"),
        ({"moe_eval_capacity_token_fraction": 0.5}, "--moe-eval-capacity-token-fraction 0.5"),
        ({"bf16": True}, "--bf16"),
    ],
)  # fmt: skip
def test_a_baseline_reads_no_prompt(baseline: str, given: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigError, match=f"{shown}: --predictor-name {baseline} reads no prompt"):
        said(baseline, predictor_name=baseline, **given)


def test_what_changes_no_number_of_a_baseline_is_a_remark() -> None:
    given = {"max_tokens": 2048, "add_prompt_to_meta": True, "n_eval_samples": 5, "cpu": True}
    assert said("random", **given) == [
        "--add-prompt-to-meta: does nothing, --predictor-name random reads no prompt",
        "--max-tokens 2048: does nothing, --predictor-name random reads no prompt",
    ]
    assert (
        said("majority", copa_eval_set="val", copa_valid_set="train", confusion_matrix=True) == []
    )


def test_a_predictor_of_a_plugin_reads_prompts_unless_it_says_that_it_does_not() -> None:
    class Asked(Predictor):
        needs_model = False

        def predict(self, trial: Trial) -> list[Prediction]:
            raise AssertionError

    with registered((PREDICTORS, "asked_elsewhere", Asked)):
        assert said(predictor_name="asked_elsewhere", scoring="mean", copa_template="copa") == []


def test_the_command_says_so_before_it_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"premise": "A.", "choice1": "b.", "choice2": "c.", "question": "cause", "label": 0}
    write_jsonl(tmp_path / "COPA/val.jsonl", row)
    write_jsonl(tmp_path / "odqa/nq.dev.jsonl", {"question": "who", "answer": ["me"]})
    words = ["--model-name", "dummy", "--nshot", "0", "--data-dir", str(tmp_path), "--results-dir",
             str(tmp_path / "out"), "--scoring", "mean", "--tasks", "naturalquestions"]  # fmt: skip
    with pytest.raises(ConfigError, match="--scoring mean: none of these tasks"):
        gpt3_eval.main(words)
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING):
        gpt3_eval.main([*words, "copa", "--naturalquestions-eval-set",
                        str(tmp_path / "odqa/nq.dev.jsonl")])  # fmt: skip
    assert caplog.messages == [
        "--scoring mean: does nothing for naturalquestions; it is for what chooses among candidates"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        gpt3_eval.main([*words[:-4], "--tasks", "copa", "--distributed-port", "12345"])
    assert caplog.messages[0].startswith("--distributed-port 12345: does nothing outside Slurm")


def test_scoring_makes_no_other_evaluation_of_tasks_that_do_not_heed_it() -> None:
    mean, total = (
        plan("m", tasks="naturalquestions", nb_few_shot_samples_values=0, scoring=each)[0]
        for each in ("mean", "sum")
    )
    assert mean.results_file == total.results_file and "sco." not in mean.prefix
    assert mean.settings["scoring"] is None


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({}, "--calibrator-name"),
        ({"naturalquestions_calibration_options": ["question::"]},
         "--naturalquestions-calibration-options"),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_refused_at_once(given: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}: naturalquestions has no candidates"):
        said(tasks="naturalquestions", calibrator_name="average_option", **given)


def test_a_capacity_makes_what_is_computed_together_a_setting() -> None:
    def one(**given: Any) -> Any:
        (found,) = plan("m", tasks="copa", nb_few_shot_samples_values=0, **given)
        return found.results_file

    for given in ({"batch_size": 7}, {"max_tokens": 64}, {"distributed_world_size": 2}):
        assert one(**given) == one()
        capacity = {"moe_eval_capacity_token_fraction": 0.5}
        assert one(**capacity, **given) != one(**capacity)
