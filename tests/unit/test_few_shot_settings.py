"""Which evaluations values mean, and what tells them apart."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.few_shot import gpt3_eval
from examples.few_shot.options import OF_SHOTS, EvaluationOptions
from examples.few_shot.settings import plan
from fairseq_lite.errors import ConfigError


def one(**given: Any) -> Any:
    (found,) = plan("model.pt", **{"tasks": "copa", "nb_few_shot_samples_values": 0, **given})
    return found


def test_planning_needs_neither_data_nor_model_nor_torch() -> None:
    code = (
        "import sys; from examples.few_shot.settings import plan;"
        "n = len(plan('no/such/model', tasks=['copa', 'xcopa'], data_dir='no/such/folder'));"
        "assert n > 3, n; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_evaluations_come_by_task_template_language_set_and_shots() -> None:
    found = plan(
        "m", tasks=["xcopa", "copa"], xcopa_languages=["it", "et"],
        xcopa_eval_set=["val", "test"], nb_few_shot_samples_values=[1, 0],
    )  # fmt: skip
    assert [(p.task, p.language, p.eval_set, p.k) for p in found] == [
        ("xcopa", language, eval_set, k)
        for language in ("it", "et")
        for eval_set in ("val", "test")
        for k in (1, 0)
    ] + [("copa", None, "val", 1), ("copa", None, "val", 0)]


def test_a_word_is_a_name_and_not_its_letters() -> None:
    assert [p.task for p in plan("m", tasks="copa", nb_few_shot_samples_values=0)] == ["copa"]
    assert one(copa_template="copa").template == "copa"


def test_files_are_named_by_what_they_hold() -> None:
    found = one(nb_few_shot_samples_values=[32], scoring="mean", num_trials=2, results_dir="out")
    name = "task.copa_tmp.copa_train.train_eval.val_sco.mean_fs32"
    assert found.results_file == Path("out") / f"{name}_{found.settings_hash}_results.json"
    assert [path.name for path in found.prediction_files] == [
        f"{name}_{found.settings_hash}_seed{seed}_predictions.jsonl" for seed in (0, 1)
    ]
    assert one().results_file.parent == Path("few_shot_model.pt_results")
    assert one(predictions_dump_dir="d", results_dir="r").prediction_files[0].parent == Path("d")


def test_whatever_changes_numbers_changes_the_files() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"scoring": "mean"}, {"n_eval_samples": 5}, {"train_sep": "\\n"},
        {"max_positions": 100},
        {"replace_newline_with_eos": True}, {"cause_conj": " since "}, {"capitalization": "upper"},
        {"predictor_name": "random"}, {"copa_eval_set": "test"}, {"bf16": True},
        {"calibrator_name": "average_option", "copa_calibration_options": ["premise::"]},
        {"calibrator_name": "average_option", "copa_calibration_options": ["choice1::"]},
        {"moe_eval_capacity_token_fraction": 0.5},
        {"nb_few_shot_samples_values": [1]}, {"nb_few_shot_samples_values": [1], "num_trials": 2},
        {"nb_few_shot_samples_values": [1], "seed": 2},
        *({"nb_few_shot_samples_values": [1], name: True} for name in OF_SHOTS),
        {"skip_context_scores": True}, {"num_training_updates": 10},
    ]  # fmt: skip
    files = [one(**change).results_file for change in changes]
    assert len(set(files)) == len(changes)
    assert one().results_file != plan("other", tasks="copa")[0].results_file


def test_what_changes_no_number_changes_no_file() -> None:
    usual = one(results_dir="r").results_file
    for change in (
        {"batch_size": 7}, {"max_tokens": 99}, {"distributed_world_size": 4}, {"cpu": True},
        {"add_prompt_to_meta": True}, {"confusion_matrix": True}, {"data_dir": "elsewhere"},
        {"skip_completed": True}, {"num_trials": 9}, {"debug": True}, {"any_train_set": "val"},
        *({name: True} for name in OF_SHOTS),
    ):  # fmt: skip
        assert one(results_dir="r", **change).results_file == usual, change


def test_every_option_is_known_to_change_numbers_or_not() -> None:
    # A new option is compared, unless it is put among those that change nothing.
    found = one(nb_few_shot_samples_values=[1])
    json.dumps(found.settings)  # plain values
    assert {"scoring", "seeds", "template_options", "model_name"} <= set(found.settings)


def test_a_set_is_the_task_s_own_or_that_for_all() -> None:
    few: dict[str, Any] = {"nb_few_shot_samples_values": [1]}
    assert one(**few).train_set == "train"
    assert one(**few, any_train_set="val").train_set == "val"
    assert one(**few, any_train_set="val", copa_train_set="test").train_set == "test"
    assert one(any_eval_set=["test"]).eval_set == "test"
    assert one(any_eval_set=["test"], copa_eval_set="val").eval_set == "val"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": "coppa"}, "--tasks coppa: no such task or group; did you mean .*copa"),
        ({"tasks": ["copa", "nothing at all"]}, "no such task or group"),
        ({"tasks": []}, "--tasks is needed"),
        ({"tasks": 7}, "expected a name or a list of names"),
        ({"copa_template": "coppa"}, "unknown template; did you mean .*copa"),
        ({"caus_conj": " so "}, "--caus-conj: no option of these tasks.*did you mean --cause-conj"),
        ({"capitalization": "title"}, "--capitalization title: expected one of correct"),
        ({"copa_languages": ["de"]}, "copa is in one language"),
        ({"xcopa_languages": ["de"]}, "xcopa is not among --tasks"),
        ({"tasks": "xcopa", "xcopa_languages": ["de"]}, "no language 'de'; it has et"),
        ({"tasks": "xcopa", "xcopa_train_lang": "de"}, "no language 'de'; it has et"),
        ({"nb_few_shot_samples_values": [-1]}, "expected numbers from 0 on"),
        ({"nb_few_shot_samples_values": []}, "expected numbers from 0 on"),
        ({"num_trials": 0}, "--num-trials 0: expected 1 or more"),
        ({"scoring": "best"}, "--scoring best: expected one of mean, sum"),
        ({"max_positions": 0}, "--max-positions 0 stands for --max-tokens"),
        ({"fp16": True, "bf16": True}, "--fp16 --bf16: choose one"),
        ({"fsdp": True, "predictor_name": "random"}, "--fsdp: every process has all weights"),
        ({"skip_completed": True, "override_completed": True}, "choose one"),
        ({"calibrator_name": "average_option"}, "copa needs --copa-calibration-options"),
        ({"copa_calibration_options": ["premise::"]}, "say --calibrator-name average_option"),
        ({"copa_valid_set": "val"}, "^--copa-valid-set: only --predictor-name majorityclass reads"),
        ({"any_valid_set": "val"}, "^--any-valid-set: only --predictor-name majorityclass reads"),
        ({"copa_valid_lang": "de"}, "^--copa-valid-lang: copa is in one language"),
        ({"tasks": "xcopa", "xcopa_valid_lang": "it"}, "say --xcopa-valid-set SET_OR_FILE, too"),
        ({"compute_vocab_dist": True}, "copa ranks no word of the vocabulary"),
        ({"copa_train_set": "nope", "nb_few_shot_samples_values": 0}, "no set and no file 'nope'"),
        ({"copa_eval_set": ["val", "dev"]}, "no set and no file 'dev'; its sets are train, val"),
        ({"predictor_name": "oracle"}, "--predictor-name oracle: unknown predictor"),
        ({"n_eval_samples": 2.5}, "n_eval_samples = 2.5: expected a whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        plan("m", **{"tasks": "copa", **given})
    assert "\n" not in str(raised.value)


def test_flags_are_values_by_their_names() -> None:
    found = gpt3_eval.parse(
        "--model-name m --tasks copa xcopa --nshot 0 4 --xcopa-languages it et --n 5 --cap 0.25"
        " --scoring mean --train-sep \\n --capitalization upper --copa-train-set val".split()
    )
    assert {name: value for name, value in found.items() if name != "list_tasks"} == {
        "model_name": "m", "tasks": ["copa", "xcopa"], "nb_few_shot_samples_values": [0, 4],
        "xcopa_languages": ["it", "et"], "n_eval_samples": 5, "scoring": "mean",
        "moe_eval_capacity_token_fraction": 0.25, "train_sep": "\\n", "capitalization": "upper",
        "copa_train_set": "val",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks copa --scorin mean", "--scorin: unknown flag; did you mean --scoring?"),
        ("--tasks copa --xcopa-languages it", "xcopa is not among --tasks"),
        ("--tasks copa --nshot two", "invalid int value: 'two'"),
        ("--tasks copa --scoring best", "expected one of mean, sum"),
        ("--tasks copa --copa-train-lang it", "--copa-train-lang"),
    ],
)
def test_flags_that_nobody_has_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gpt3_eval.parse(["--model-name", "m", *words.split()])


def test_the_flags_of_the_original_are_there() -> None:
    known = {o for action in gpt3_eval.get_argparser(["copa", "xcopa"], ["copa"])._actions
             for o in action.option_strings}  # fmt: skip
    wanted = """
        --model-name --tasks --predictor-name --calibrator-name --predictions-dump-dir --results-dir
        --user-dir --add-prompt-to-meta --add-calib-to-meta --add-positional-scores-to-meta
        --add-prompt-tokens-to-meta --scoring --n-eval-samples --n --confusion-matrix --batch-size
        --nb-few-shot-samples-values --nshot --uniform-sampling --beam-size --num-trials
        --moe-eval-capacity-token-fraction --cap --distributed-port
        --truncate-few-shot-samples-globally --max-positions --num-training-updates
        --no-shuffle-examples --replace-newline-with-eos --train-sep --debug --skip-completed
        --recalc-metrics-from-predictions --cause-conj --effect-conj --capitalization
        --any-train-set --any-valid-set --any-eval-set --any-train-lang --any-valid-lang
        --max-tokens --compute-vocab-dist --fsdp --copa-template --copa-train-set --copa-valid-set
        --copa-eval-set --copa-calibration-options --xcopa-languages --xcopa-train-lang
        --xcopa-valid-lang""".split()
    assert set(wanted) <= known
    assert {f.name for f in dataclasses.fields(EvaluationOptions)} >= {"max_tokens", "fsdp"}


def test_a_beam_size_of_a_models_setting_is_no_part_of_choosing() -> None:
    (one,), (other,) = (plan("m", tasks="copa", nb_few_shot_samples_values=[0], beam_size=size)
                        for size in (1, 4))  # fmt: skip
    assert one.settings == other.settings
