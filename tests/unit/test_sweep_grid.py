"""Grids, their points, the names and the commands of their runs."""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.errors import ConfigError
from tests.helpers.sweeps import grid as grids
from tests.helpers.sweeps import hyperparam, options

name_of, points, runs_of = grids.name_of, grids.points, grids.runs_of

GRID = [
    hyperparam("--task", "language_modeling"),
    hyperparam("--lr", [1e-3, 5e-4], save_dir_key=lambda v: f"lr{v}"),
    hyperparam("--dropout", [0.0, 0.1, 0.3], save_dir_key=lambda v: f"dr{v}"),
]


def args_of(*words: str) -> Namespace:
    return options.read(["-p", "x", "-g", "2", "-t", "-1", *words], None, None)


def names(grid: list[hyperparam], *words: str, postprocess: Any = None) -> list[str]:
    return [run.name for run in runs_of(lambda args: grid, postprocess, args_of(*words))]


def command_of(flag: hyperparam, value: Any) -> list[str]:
    return flag.with_value(value).get_cli_args()


def test_a_run_for_each_combination():
    assert sorted(names(GRID)) == sorted(
        f"x.lr{lr}.dr{dr}.ngpu2" for lr in (1e-3, 5e-4) for dr in (0.0, 0.1, 0.3)
    )


def test_the_order_is_fairseqs():
    expected = list(product([1e-3, 5e-4], [0.0, 0.1, 0.3]))
    random.seed(1234)
    random.shuffle(expected)
    assert names(GRID) == [f"x.lr{lr}.dr{dr}.ngpu2" for lr, dr in expected]
    assert names(GRID, "--seed", "2") != names(GRID)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    first=st.integers(1, 20),
)
def test_points_are_the_product_and_the_first_of_them_a_prefix(sizes, seed, first):
    grid = [
        hyperparam(f"--f{i}", list(range(size)), save_dir_key=str) for i, size in enumerate(sizes)
    ]

    def values(num_trials: int) -> list[tuple[int, ...]]:
        found = points(grid, seed=seed, num_trials=num_trials)
        return [tuple(flag.current_value for flag in config.values()) for config in found]

    everything = values(-1)
    assert set(everything) == set(product(*map(range, sizes)))
    assert len(everything) == len(set(everything))
    assert values(first) == everything[:first]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: hyperparam("--lr", [1, 2]), "--lr has 2 values and no save_dir_key"),
        (lambda: hyperparam("--lr", []), "--lr: no value"),
        (lambda: hyperparam("lr", 1), "expected a dash"),
        (lambda: hyperparam("--data", "x", positional_arg=True), "expected no dash"),
    ],
)
def test_what_is_no_hyperparam(make, line):
    with pytest.raises(ConfigError, match=line):
        make()


def test_words_of_the_command_line():
    assert command_of(hyperparam("--fp16"), True) == ["--fp16"]
    assert command_of(hyperparam("--fp16", [True, False], True, str), False) == []
    assert command_of(hyperparam("--lr", 1e-4), 1e-4) == ["--lr", "0.0001"]
    assert command_of(hyperparam("--nh", [None, 2], save_dir_key=str), None) == []
    assert command_of(hyperparam("data", "x", positional_arg=True), "x") == ["x"]
    assert command_of(hyperparam("--cap", -1.0), -1.0) == ["--cap", "-1.0"]
    assert command_of(hyperparam("--eps", -1e-08), -1e-08) == ["--eps", "-1e-08"]
    assert command_of(hyperparam("--suffix", "-a"), "-a") == ["--suffix=-a"]


def test_a_flag_without_value_enters_the_name_where_it_is_given():
    flag = hyperparam("--fp16", [True, False], binary_flag=True, save_dir_key=lambda v: f"fp16{v}")
    assert sorted(names([flag])) == ["x.fp161.ngpu2", "x.ngpu2"]


def test_the_later_of_two_flags_counts():
    grid = [*GRID, hyperparam("--lr", 7, save_dir_key=lambda v: f"lr{v}")]
    assert sorted(names(grid)) == [f"x.lr7.dr{v}.ngpu2" for v in (0.0, 0.1, 0.3)]


def test_what_is_unfit_for_a_folder_becomes_an_underscore():
    value = "a/b:c (0.9, %j)"
    flag = hyperparam("--x", value, save_dir_key=str)
    assert name_of({"--x": flag}, prefix="p", num_gpus=1) == "p.a_b_c_0.9_j_.ngpu1"


def test_two_runs_with_one_name_are_refused():
    same = hyperparam("--lr", [1, 2], save_dir_key=lambda v: "lr")
    with pytest.raises(ConfigError, match="two points of the grid are called x.lr.ngpu2"):
        names([same])
    told_apart_only_by_what_is_unfit = hyperparam("--x", ["a/b", "a:b"], save_dir_key=str)
    with pytest.raises(ConfigError, match="x.a_b.ngpu2"):
        names([told_apart_only_by_what_is_unfit])


def test_a_name_too_long_is_refused():
    with pytest.raises(ConfigError, match="has 308 bytes"):
        names([hyperparam("--x", "y" * 300, save_dir_key=str)])


def test_postprocessing_changes_a_point_before_it_is_named():
    def postprocess(args, config):
        if config["--lr"].current_value > 6e-4:
            config["--dropout"].current_value = 0.5
        config["--clip-norm"] = hyperparam("--clip-norm", args.num_gpus)

    grid = [GRID[1], hyperparam("--dropout", 0.1, save_dir_key=str)]
    runs = runs_of(lambda args: grid, postprocess, args_of())
    assert sorted(run.name for run in runs) == ["x.lr0.0005.0.1.ngpu2", "x.lr0.001.0.5.ngpu2"]
    assert all(run.command[-4:-2] == ("--clip-norm", "2") for run in runs)


def test_the_command():
    words = ["-d", "data", "--checkpoints-dir", "out", "-n", "3", "--baseline-model", "b.pt"]
    words += ["--tensorboard-logdir", "tb"]
    grid = [hyperparam("--lr", 1, save_dir_key=str), hyperparam("--log-format", "simple")]
    (run,) = runs_of(lambda args: grid, None, args_of(*words))
    assert run.save_dir == Path("out/x.1.ngpu6")
    assert run.command == (
        *(sys.executable, "-m", "fairseq_lite_cli.train", "data", "--save-dir", "out/x.1.ngpu6"),
        *("--distributed-world-size", "6", "--tensorboard-logdir", "tb/x.1.ngpu6"),
        *("--continue-once", "b.pt", "--lr", "1", "--log-format", "simple"),
    )
    assert run.arguments == run.command[3:]


def test_another_script_and_interpreter(tmp_path):
    (tmp_path / "steps").write_text("echo {job_dir}\n")
    words = ["--script", "t.py", "--python", "py", "--no-wandb"]
    words += ["--post-steps", str(tmp_path / "steps"), "ls {job_dir}"]
    (run,) = runs_of(lambda args: [hyperparam("--wandb-project", "w")], None, args_of(*words))
    assert run.command[:2] == ("py", "t.py")
    assert run.command[-2:] == ("--log-format", "json")
    assert "--wandb-project" not in run.command
    assert run.post_steps == ("echo checkpoints/x.ngpu2", "ls checkpoints/x.ngpu2")
    assert not run.arguments


def test_a_copy_of_the_code_is_run_from_its_folder():
    (run,) = runs_of(lambda args: [], None, args_of("--snapshot-code", "--checkpoints-dir", "out"))
    assert run.command[1] == "out/x.ngpu2/code/fairseq_lite_cli/train.py"
    assert run.python_path == str(Path("out/x.ngpu2/code").absolute())
    assert run.arguments == run.command[2:]


def test_in_an_allocation_a_run_is_a_step_with_a_task_on_each_machine():
    (run,) = runs_of(lambda args: [], None, args_of("--salloc", "-n", "2", "-g", "8"))
    assert run.launcher == (
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"),
        *("--cpu-bind=none", "--kill-on-bad-exit=1"),
    )
    (other,) = runs_of(lambda args: [], None, args_of("-n", "2", "-g", "8"))
    assert other.launcher == () and other.command == run.command
    assert "--distributed-world-size 16" in " ".join(run.command)


@pytest.mark.parametrize("name", ["--save-dir", "--distributed-world-size"])
def test_what_the_sweep_itself_gives_is_refused(name):
    with pytest.raises(ConfigError, match=f"the grid has {name}"):
        names([hyperparam(name, "x")])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-t", "0"], "-t 0: expected a number of runs"),
        (["-g", "0"], "-g 0: expected 1 or more"),
        (["-t", "x"], "invalid int value"),
        (["--local", "-n", "2"], "--local is this machine alone"),
        (["--salloc", "--local"], "--local is this machine, and --salloc those of an allocation"),
        (["-p", "a/b"], "--prefix a/b: expected letters"),
        (["--resume-faild"], "unknown flag --resume-faild.*--resume-failed"),
        (["--resume"], "unknown flag --resume"),
        (["--time", "tomorrow"], "--time tomorrow: expected minutes"),
        (["--script", "x.py", "--snapshot-code"], "--snapshot-code copies"),
        (["--no-tensorboard", "--tensorboard-logdir", "x"], "leave one of them out"),
    ],
)
def test_command_lines_that_are_refused(words, line):
    with pytest.raises(ConfigError, match=line) as error:
        args_of(*words)
    assert "\n" not in str(error.value)


def test_required_flags_are_named():
    with pytest.raises(ConfigError, match="-p/--prefix, -t/--num-trials, -g/--num-gpus"):
        options.read([], None, None)


@pytest.mark.parametrize(
    ("text", "number"),
    [("4320", 4320), ("0:30", 1), ("1:30:00", 90), ("3-0", 4320), ("1-12:30", 2190), ("0", 1)],
)
def test_durations(text, number):
    assert options.minutes(text) == number


def test_flags_of_slurm_are_told_of_where_they_have_no_part():
    words = ["--partition", "a", "--constraint", "b", "--time", "10", "--exclusive"]
    expected = {"--partition", "--constraint", "--time", "--exclusive"}
    for here in ("--local", "--salloc"):
        assert set(options.without_part(args_of(here, *words))) == expected
    assert options.without_part(args_of(*words)) == []


def test_the_package_is_found_from_the_root_of_the_repository_too():
    from scripts.sweep.sweep import hyperparam as the_same

    assert the_same("--fp16").get_cli_args() == ["--fp16"]
