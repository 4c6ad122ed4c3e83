"""Scheduling of few-shot evaluations: settings, precedence, plans. Nothing is evaluated here."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.few_shot.builtins import load_builtins
from examples.few_shot.scheduling.arguments import arg_modify_default, checked, get_argparser
from examples.few_shot.scheduling.plan import Levels, Split, folder_name, plan_jobs
from examples.few_shot.scheduling.precedence import (
    LEVELS,
    canonical,
    gave_way,
    merge_run_args,
)
from examples.few_shot.scheduling.schedule import base_run_args
from examples.few_shot.scheduling.settings import (
    ModelSettings,
    TaskSettings,
    as_model_settings,
    as_task_settings,
    checked_args,
    chosen_models,
    chosen_tasks,
)
from examples.few_shot.settings import PlannedEvaluation
from fairseq_lite.errors import ConfigError
from tests.helpers.commands import REPOSITORY

_LEVEL = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 3) | st.none(), max_size=5)


# -- precedence


@given(st.tuples(*[_LEVEL] * len(LEVELS)))
def test_a_later_level_always_wins(levels: tuple[dict[str, Any], ...]):
    merged = merge_run_args(*levels)
    assert merged.values.keys() == merged.sources.keys() == set().union(*levels)
    for name, value in merged.values.items():
        last = max(i for i, level in enumerate(levels) if name in level)
        assert (value, merged.sources[name]) == (levels[last][name], LEVELS[last])


@given(st.tuples(*[_LEVEL] * len(LEVELS)), st.sampled_from("abcde"), st.integers(0, 4))
def test_what_a_level_says_is_heard_unless_a_later_one_speaks(
    levels: tuple[dict[str, Any], ...], name: str, at: int
):
    changed = [dict(level) for level in levels]
    changed[at][name] = "new"
    found = merge_run_args(*changed).values[name]
    assert (found == "new") == all(name not in level for level in levels[at + 1 :])


def test_merging_changes_no_level():
    levels: list[dict[str, Any]] = [{"a": i} for i in range(5)]
    merge_run_args(*levels)
    assert levels == [{"a": i} for i in range(5)]


def test_two_spellings_of_a_name_meet():
    load_builtins()
    given = {"xcopa_language": ["et"], "xcopa_templates": ["xcopa"], "scoring": "sum"}
    found = {"xcopa_languages": ["et"], "xcopa_template": ["xcopa"], "scoring": "sum"}
    assert canonical(given) == found


def test_only_what_was_typed_and_replaced_by_another_value_gave_way():
    base = {"scoring": "mean", "num_trials": 5, "seed": 1, "batch_size": 2}
    merged = merge_run_args(base, {}, {"num_trials": 3, "seed": 1}, {"batch_size": 4}, {})
    assert gave_way(base, ["scoring", "num_trials", "seed"], merged) == [
        ("num_trials", 3, "model setting")
    ]


# -- settings


def test_the_tuples_of_the_guide_are_settings():
    model = as_model_settings("m", ("moe", {}, {"train_sep": "\n"}, 2, 8, 1, 8, 3))
    assert model == ModelSettings(
        "moe", {}, {"train_sep": "\n"}, nodes=2, gpus_per_node=8, ntasks_per_node=1,
        cpus_per_task=8, max_parallel=3,
    )  # fmt: skip
    assert not model.combine_tasks
    assert as_model_settings("m", ("moe", {"combine_tasks": True})).combine_tasks
    task = as_task_settings("t", ("pawsx", ["pawsx"], {"pawsx_template": ["pawsx_default"]}))
    assert task == TaskSettings("pawsx", ["pawsx"], {"pawsx_template": ["pawsx_default"]})


def test_a_group_written_as_a_word_is_not_taken_apart_into_letters():
    assert as_task_settings("t", ("lama", "lama", {})).tasks == ("lama",)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("moe", "expected ModelSettings"),
        ((), "expected ModelSettings"),
        (("m", {}, {}, 1, 1, 1, 1, 1, None, None, None, None, 7), "expected ModelSettings"),
        ((7,), "the model's name: expected a word, found 7"),
        (("m", {"combine": True}), "combine_tasks"),
        (("m", {"combine_tasks": 1}), "combine_tasks"),
        (("m", {}, ["scoring"]), "expected {name: value}"),
        (("m", {}, {"scoring": {1}}), "expected plain values"),
        (("m", {}, {"tasks": ["copa"]}), "tasks = \\['copa'\\] has no place here"),
        (("m", {}, {"results_dir": "x"}), "-o says where results go"),
        (("m", {}, {}, 0), "nodes: expected a whole number from 1 on, found 0"),
        (("m", {}, {}, 1, -1), "gpus_per_node: expected a whole number from 0 on"),
        (("m", {}, {}, 1, 1, True), "ntasks_per_node: expected a whole number"),
        (("m", {}, {}, "two"), "nodes: expected a whole number"),
    ],
)
def test_a_wrong_model_setting_is_refused_in_one_line_with_its_key(value: Any, said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        as_model_settings("mine", value)
    assert "'mine'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (("copa",), "expected TaskSettings"),
        (("a/b", ["copa"]), "the folder's prefix"),
        (("", ["copa"]), "the folder's prefix"),
        (("copa", []), "the tasks: expected names"),
        (("copa", [1]), "the tasks: expected names"),
        (("copa", ["copa"], {"model_name": "x"}), "model_name = 'x' has no place here"),
    ],
)
def test_a_wrong_task_setting_is_refused_in_one_line_with_its_key(value: Any, said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        as_task_settings("mine", value)
    assert "'mine'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [ModelSettings("m", nodes=0), ModelSettings("m", {"a": 1})])
def test_a_wrong_setting_that_is_no_tuple_is_refused_with_its_key_too(setting: ModelSettings):
    with pytest.raises(ConfigError, match="^model setting 'mine': "):
        as_model_settings("mine", setting)
    with pytest.raises(ConfigError, match="^model setting 'm': "):
        _plan({"t": TaskSettings("t", ["copa"])}, setting)
    with pytest.raises(ConfigError, match="^task setting 'mine': the folder's prefix"):
        as_task_settings("mine", TaskSettings("a/b", ["copa"]))
    with pytest.raises(ConfigError, match="^task setting 't': the folder's prefix"):
        _plan({"t": TaskSettings("a/b", ["copa"])})


def test_values_become_plain_ones():
    assert checked_args({"a": (1, 2)}) == {"a": [1, 2]}


# -- which settings words mean


def test_words_are_groups_then_keys_each_once():
    available = {"a": ("m",), "b": ("m",), "g": ("other",)}
    found = chosen_models(["b", "g", "a"], {"g": ["a", "b"]}, available)
    assert list(found) == ["b", "a"]


def test_models_without_a_setting_go_by_path_name_or_group_of_model_configs():
    found = chosen_models(
        ["x/y.pt", "xglm_564M", "gpt3_setting"], {}, {"125M_gpt3_setting": ("z",)}
    )
    assert found["x_y.pt"] == ModelSettings("x/y.pt")
    assert found["xglm_564M"] == ModelSettings("xglm_564M")
    assert found["125M_gpt3_setting"] == ModelSettings("z")
    assert found["355M_gpt3_setting"] == ModelSettings("355M_gpt3_setting")


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="-m a_b/c.pt: would be called a_b_c.pt, as another"):
        chosen_models(["a/b/c.pt", "a_b/c.pt"], {}, {})
    assert list(chosen_models(["a/b.pt", "a/b.pt"], {}, {})) == ["a_b.pt"]


def test_every_registered_task_and_group_has_a_setting():
    assert chosen_tasks(["copa", "blimp"], {}, {}) == {
        "copa": TaskSettings("copa", ["copa"]),
        "blimp": TaskSettings("blimp", ["blimp"]),
    }


@pytest.mark.parametrize(
    ("words", "groups", "said"),
    [
        (["cpoa"], {}, "-t cpoa: no task setting and no group; did you mean copa"),
        (["zzzz"], {"g": []}, "-t zzzz: no task setting and no group; groups: g; settings: copa"),
        (["g"], {"g": ["zzzz"]}, "-t zzzz .of the group g.: no task setting"),
        (["g"], {"g": "copa"}, "task group 'g': expected a list of settings, found 'copa'"),
    ],
)
def test_unknown_words_are_refused(words: list[str], groups: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        chosen_tasks(words, groups, {"copa": ("copa", ["copa"])})


# -- the command line


def _parser() -> Any:
    return get_argparser("x", {"rai": ["a"]}, {"a": ()}, {"all": ["m"]}, {"m": ()})


def _args(*words: str) -> argparse.Namespace:
    found: argparse.Namespace = _parser().parse_args(["-o", "out", "-t", "a", "-m", "m", *words])
    return found


def test_the_flags_of_the_guide_are_there_with_its_defaults():
    args = _args()
    assert (args.scoring, args.predictor_name, args.num_trials) == ("mean", "clmprompting", 5)
    assert args.nb_few_shot_samples_values == [0] and args.n_eval_samples == 0
    assert not (args.local or args.dry_run or args.override_completed)
    shown = _parser().format_help()
    for word in ("--slurm-partition", "--nshot", "`rai`", "`all`", "--recalc-metrics-from-pred"):
        assert word in shown


def test_what_is_typed_is_told_from_defaults_even_when_equal():
    assert _args("--scoring", "mean", "--nshot", "0").typed == {
        "scoring", "nb_few_shot_samples_values", "output", "tasks", "models",
    }  # fmt: skip


def test_defaults_of_the_evaluator_are_not_said_again():
    # A model's name may imply another predictor, where nobody types one.
    assert base_run_args(_args()) == {
        "scoring": "mean", "nb_few_shot_samples_values": [0], "n_eval_samples": 0,
    }  # fmt: skip
    typed = base_run_args(_args("--predictor-name", "clmprompting", "--num-trials", "5"))
    assert typed["predictor_name"] == "clmprompting" and typed["num_trials"] == 5


def test_defaults_can_be_changed():
    parser = _parser()
    arg_modify_default(parser, "nb_few_shot_samples_values", [0, 32])
    arg_modify_default(parser, "output", "there")
    args = parser.parse_args([])
    assert args.nb_few_shot_samples_values == [0, 32] and args.output == "there"
    assert parser.parse_args(["--nshot", "1"]).nb_few_shot_samples_values == [1]


@pytest.mark.parametrize(
    ("dest", "value", "said"),
    [
        ("num_trails", 3, "no flag 'num_trails'; did you mean num_trials"),
        ("slurm_executor", "pbs", "expected one of slurm, local, debug"),
        ("nb_few_shot_samples_values", 3, "expected a list"),
        ("num_trials", [3], "expected one value"),
    ],
)
def test_a_default_that_cannot_be_is_refused(dest: str, value: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        arg_modify_default(_parser(), dest, value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--split-few-shot-trials", "--recalc-metrics-from-predictions", "--local"],
            "reads all trials of an evaluation: leave out --split-few-shot-trials",
        ),
        (["--recalc-metrics-from-predictions"], "add --local"),
        (["--recalc-metrics-from-predictions", "--local", "--override-completed"], "leave one out"),
        (["-j", "2"], "on Slurm it is --slurm-array-parallelism 2"),
        (["-j", "0", "--local"], "-j 0: expected 1 or more"),
        (["--slurm-nodes", "0"], "--slurm-nodes 0: expected 1 or more"),
        (["--slurm-gpus-per-node", "-1"], "--slurm-gpus-per-node -1: expected 0 or more"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_type(words: list[str], said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        checked(_args(*words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["-o", "-t", "-m"])
def test_what_is_needed_is_asked_for(flag: str):
    words = {"-o": "out", "-t": "a", "-m": "m"}
    del words[flag]
    args = _parser().parse_args([word for pair in words.items() for word in pair])
    with pytest.raises(ConfigError, match=f"^{flag} is needed: {flag} "):
        checked(args)


def test_an_unknown_flag_is_refused_with_a_near_one():
    with pytest.raises(ConfigError, match="unknown flag --num-trails; did you mean --num-trials"):
        _args("--num-trails", "3")


# -- plans

_OUT = Path("out")
_DUMMY = ModelSettings("dummy", {}, {"predictor_name": "dummy"})
_WHOLE = Split()


def _plan(
    tasks: dict[str, TaskSettings],
    model: ModelSettings = _DUMMY,
    split: Split = _WHOLE,
    typed: frozenset[str] = frozenset(),
    **levels: Any,
) -> Any:
    base = {"scoring": "mean", "nb_few_shot_samples_values": [0], **levels.pop("base", {})}
    return plan_jobs({"m": model}, tasks, Levels(base, typed, **levels), _OUT, split)


def test_a_job_says_where_each_value_comes_from():
    plan = _plan(
        {"t": TaskSettings("copa", ["copa"], {"num_trials": 3, "seed": 1})},
        base={"seed": 5, "num_trials": 7},
        typed=frozenset({"num_trials", "scoring"}),
        custom_base={"train_sep": "\n", "max_tokens": 9},
        custom_override={"seed": 2},
    )
    (job,) = plan.jobs
    (call,) = job.calls
    assert call.sources == {
        "scoring": "command line", "nb_few_shot_samples_values": "default",
        "predictor_name": "model setting", "num_trials": "task setting",
        "seed": "custom_override_run_args", "train_sep": "custom_base_run_args",
        "max_tokens": "custom_base_run_args",
    }  # fmt: skip
    assert call.run_args["seed"] == 2
    assert plan.remarks == ("--num-trials gives way to task setting t: 3",)
    assert job.evaluations[0].settings["train_sep"] == "\n"


def test_folders_are_named_by_prefix_model_shots_trials_and_samples():
    (job,) = _plan(
        {"t": TaskSettings("pre", ["copa"], {"nb_few_shot_samples_values": [0, 4]})}
    ).jobs
    assert job.name == "t.m"
    assert job.folders == (_OUT / "pre_m_fs.0_4_t5_smpl.All_current",)
    values = {"nb_few_shot_samples_values": 1, "num_trials": 2, "n_eval_samples": 8}
    assert folder_name("p", "a/b", values) == "p_a_b_fs.1_t2_smpl.8_current"
    assert folder_name("p", "m", {"n_eval_samples": 0}) == "p_m_fs.0_1_32_t5_smpl.All_current"


def test_settings_with_one_prefix_share_a_folder_and_scoring_tells_their_results_apart():
    jobs = _plan(
        {
            "mean": TaskSettings("copa", ["copa"]),
            "sum": TaskSettings("copa", ["copa"], {"scoring": "sum"}),
            "same": TaskSettings("copa", ["copa"]),
        }
    ).jobs
    assert len({folder for job in jobs for folder in job.folders}) == 1
    mean, total, same = (job.evaluations for job in jobs)
    assert mean[0].results_file != total[0].results_file
    # What an earlier job makes is not made twice.
    assert same == () and jobs[2].elsewhere[0].results_file == mean[0].results_file


def test_what_a_model_says_of_other_tasks_does_not_concern_a_job():
    model = ModelSettings("dummy", {}, {"xcopa_languages": ["et"], "cause_conj": " as "})
    tasks = {name: TaskSettings(name, [name]) for name in ("copa", "xcopa", "rte")}
    copa, xcopa, rte = _plan(tasks, model).jobs
    assert "xcopa_languages" not in copa.calls[0].run_args
    assert copa.evaluations[0].settings["template_options"]["cause_conj"] == " as "
    assert [each.language for each in xcopa.evaluations] == ["et"]
    assert "cause_conj" not in rte.calls[0].run_args


@pytest.mark.parametrize(
    ("task", "model", "said"),
    [
        ({"xcopa_languages": ["et"]}, {}, "model m, task t: .*xcopa is not among --tasks"),
        ({"no_such": 1}, {}, "model m, task t: --no-such: no option"),
        ({}, {"no_such": 1}, "model m, task t: --no-such: no option"),
        ({"scoring": "best"}, {}, "model m, task t: --scoring best: expected one of"),
    ],
)
def test_a_mistake_in_a_setting_names_it(task: dict[str, Any], model: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        _plan({"t": TaskSettings("copa", ["copa"], task)}, ModelSettings("dummy", {}, model))
    assert "\n" not in str(caught.value)


def test_no_task_is_dropped_silently():
    with pytest.raises(ConfigError, match="task t: --tasks blimp_all: no such task or group"):
        _plan({"t": TaskSettings("x", ["copa", "blimp_all"])})


def _names(evaluations: tuple[PlannedEvaluation, ...]) -> list[Path]:
    return [each.results_file for each in evaluations]


def test_split_jobs_share_the_folder_and_the_results_of_the_whole():
    tasks = {
        "t": TaskSettings("x", ["xcopa", "copa"],
                          {"xcopa_languages": ["et", "it"], "nb_few_shot_samples_values": [0, 2]})
    }  # fmt: skip
    (whole,) = _plan(tasks).jobs
    for split, names in (
        (Split(shots=True), ["t.m.fs0", "t.m.fs2"]),
        (Split(languages=True), ["t.m.et", "t.m.it", "t.m"]),
        (Split(True, True), [f"t.m.fs{k}{of}" for of in (".et", ".it", "") for k in (0, 2)]),
    ):
        jobs = _plan(tasks, split=split).jobs
        assert [job.name for job in jobs] == names
        parts = [file for job in jobs for file in _names(job.evaluations)]
        assert sorted(parts) == sorted(_names(whole.evaluations))


def test_trials_are_jobs_of_their_own_that_share_the_evaluation_of_the_whole():
    values = {"nb_few_shot_samples_values": [0, 2], "num_trials": 3, "seed": 7}
    tasks = {"t": TaskSettings("x", ["copa"], values)}
    (whole,) = _plan(tasks).jobs
    none, two = whole.evaluations
    jobs = _plan(tasks, split=Split(trials=True)).jobs
    assert [job.name for job in jobs] == ["t.m", "t.m.seed7", "t.m.seed8", "t.m.seed9"]
    # Without shots there is one trial.
    assert jobs[0].evaluations == (none,)
    for number, job in enumerate(jobs[1:]):
        (one,) = job.evaluations
        assert one == dataclasses.replace(two, trial=number)
        assert one.product == two.prediction_files[number]
        assert (one.results_file, one.settings) == (two.results_file, two.settings)
    names = [job.name for job in _plan(tasks, split=Split(True, False, True)).jobs]
    assert names == ["t.m.fs0", "t.m.fs2.seed7", "t.m.fs2.seed8", "t.m.fs2.seed9"]
    # What is made already by an earlier job's trial is not made twice.
    same = _plan({**tasks, "again": TaskSettings("x", ["copa"], values)}, split=Split(trials=True))
    assert [len(job.evaluations) for job in same.jobs] == [1] * 4 + [0] * 4
    assert [len(job.elsewhere) for job in same.jobs] == [0] * 4 + [1] * 4


def test_tasks_can_be_combined_in_one_job():
    tasks = {
        "a": TaskSettings("a", ["copa"]),
        "b": TaskSettings("b", ["rte"], {"scoring": "sum"}),
    }
    model = ModelSettings("dummy", {"combine_tasks": True}, _DUMMY.eval_params)
    (job,) = _plan(tasks, model).jobs
    assert job.name == "2_tasks.m" and job.task_keys == ("a", "b")
    apart = _plan(tasks).jobs
    assert _names(job.evaluations) == [f for one in apart for f in _names(one.evaluations)]
    assert job.folders == tuple(f for one in apart for f in one.folders)


def test_planning_needs_neither_data_nor_models_nor_torch(tmp_path: Path):
    code = """
import sys
from examples.few_shot.scripts.experiments import schedule_jobs_few_shot_english as script
status = script.main(sys.argv[1:])
assert status == 0
loaded = {"torch", "transformers", "submitit", "sentencepiece"} & set(sys.modules)
assert not loaded, loaded
"""
    words = [
        "-t",
        "all",
        "-m",
        "random",
        "moe_1.1T",
        "--nshot",
        "0",
        "-o",
        str(tmp_path / "a" / "b"),
        "--dry-run",
    ]
    environ = {**os.environ, "FSD": str(tmp_path / "none"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60,
        env=environ, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []  # and nothing was written
