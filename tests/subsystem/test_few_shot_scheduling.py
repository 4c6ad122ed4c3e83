"""Few-shot evaluations as jobs, here and through submitit, of models that cost nothing."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from examples.few_shot.predictors.api import PREDICTORS
from examples.few_shot.predictors.baselines import RandomPredictor
from examples.few_shot.scheduling import local
from examples.few_shot.scheduling.local import Pool
from examples.few_shot.scheduling.machine import Share
from examples.few_shot.scheduling.schedule import LOG, schedule_experiment_jobs
from examples.few_shot.scheduling.settings import ModelSettings, TaskSettings
from examples.few_shot.scheduling.worker import Order
from examples.few_shot.scripts.experiments import schedule_jobs_few_shot as base
from examples.few_shot.settings import plan
from fairseq_lite.errors import ConfigError, DataError, FliteError
from fairseq_lite_cli.alive import Process
from tests.helpers.commands import REPOSITORY
from tests.helpers.few_shot import write_copa
from tests.helpers.few_shot_rows import write_english_tasks
from tests.helpers.registered import registered

SCRIPTS = "examples/few_shot/scripts/experiments"
GUIDE = REPOSITORY / "examples/few_shot/docs/SCHEDULING.md"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with COPA alone."""
    return write_copa(tmp_path_factory.mktemp("tasks"), train=6, val=4)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictors that wait, start processes, or end theirs; a model that ends a rank."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "predictors.py").write_text(
        """
import __main__, os, signal, subprocess, time
from pathlib import Path
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.predictors.api import PREDICTORS
from examples.few_shot.predictors.baselines import RandomPredictor

@PREDICTORS.register("waiting")
class Waiting(RandomPredictor):
    def predict(self, trial):
        if trial.shots.k:
            Path(os.environ["REACHED"]).write_text(str(os.getpid()))
            while not os.path.exists(os.environ["GATE"]):
                time.sleep(0.02)
        return super().predict(trial)

@PREDICTORS.register("parent")
class Parent(RandomPredictor):
    def predict(self, trial):
        child = subprocess.Popen(["sleep", "600"])
        part = Path(os.environ["REACHED"] + f".{os.getpid()}.part")
        part.write_text(f"{os.getpid()} {child.pid}")
        part.rename(part.with_suffix(""))
        while True:
            time.sleep(0.02)

@PREDICTORS.register("deaf")
class Deaf(Parent):
    def predict(self, trial):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        __main__.GRACE_SECONDS = 0.5
        return super().predict(trial)

if "KILLED_RANK" in os.environ:
    def score(self, *args, **more):
        import torch.distributed as dist
        if dist.get_rank() == int(os.environ["KILLED_RANK"]):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    DummyModel.score = score

@PREDICTORS.register("second")
class Second(RandomPredictor):
    def predict(self, trial):
        if trial.trial == 1 and not os.path.exists(os.environ["GATE"]):
            raise ValueError("the second")
        return super().predict(trial)

@PREDICTORS.register("dying")
class Dying(RandomPredictor):
    def predict(self, trial):
        os._exit(3)

@PREDICTORS.register("faulty")
class Faulty(RandomPredictor):
    def predict(self, trial):
        raise ValueError("a bug")
""",
        encoding="utf-8",
    )
    return folder


def settings(**models: ModelSettings) -> tuple[Any, ...]:
    """Those of the base script, and further models."""
    return (
        base.default_task_run_groups,
        {
            **base.default_tasks_settings,
            "copa_sum": TaskSettings("copa", ["copa"], {"scoring": "sum"}),
        },
        base.default_model_run_groups,
        {**base.default_model_settings, **models},
    )


def schedule(*words: object, **models: ModelSettings) -> list[dict[str, Any]]:
    """Schedule in this process; what became of each job."""
    chosen = settings(**models)
    args = base.get_argparser("test", *chosen).parse_args([str(word) for word in words])
    _, infos = schedule_experiment_jobs(args, *chosen)
    return infos


def files(folder: Path, pattern: str = "*/*_results.json") -> dict[str, bytes]:
    """Results without what depends on when they were made."""
    found = {}
    for path in folder.glob(pattern):
        said = json.loads(path.read_text(encoding="utf-8"))
        del said["times"]
        said["versions"].pop("commit", None)  # somebody may commit while tests run
        found[str(path.relative_to(folder))] = json.dumps(said).encode()
    return found


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*/*_results.json")}


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


# -- here


def test_one_jobs_failure_stops_no_other_and_the_status_tells(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    words = [
        "-t",
        "rte",
        "copa",
        "-m",
        "random",
        "-o",
        str(out),
        "--data-dir",
        str(data),
        "--local",
    ]
    assert base.main(words) == 1
    said = capfd.readouterr().out
    assert "2 job(s), 2 evaluation(s); to do here: 2 job(s), 2 evaluation(s)" in said
    assert re.search(
        r"\[1/2\] failed    rte.random \| [\d.]+ s \| .*RTE/val.jsonl is missing", said
    )
    assert re.search(
        r"\[2/2\] done      copa.random \| [\d.]+ s \| 1 evaluation.*accuracy \d", said
    )
    assert "1 job(s) failed; the same command tries them again" in said
    assert [(one["name"], one["state"]) for one in logged(out)] == [
        ("rte.random", "failed"), ("copa.random", "completed"),
    ]  # fmt: skip
    one = logged(out)[1]
    assert one["sources"][0]["predictor_name"] == "model setting"
    assert one["sources"][0]["data_dir"] == "command line"
    assert list(out.rglob("*.submitted")) == []
    # The command that it ends with works as it is.
    command = said.splitlines()[-1].replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(command, shell=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0 and "copa" in (out / "results.tsv").read_text()
    # The failed one is tried again, the other is not.
    assert base.main(words) == 1
    said = capfd.readouterr().out
    assert "skipped   copa.random | 1 evaluation(s) are complete" in said
    assert "[1/1] failed    rte.random" in said


def test_a_folder_that_cannot_be_written_fails_its_job_alone(data: Path, tmp_path: Path):
    words = ["-t", "copa", "-m", "random", "majority", "--data-dir", data, "-o"]
    # A file stands where one job's results are to go.
    for name, where in (("local", ["--local"]), ("debug", ["--slurm-executor", "debug"])):
        out = tmp_path / name
        out.mkdir()
        (out / "copa_random_fs.0_t5_smpl.All_current").write_text("a file")
        infos = schedule(*words, out, *where)
        assert [info["state"] for info in infos] == ["failed", "completed"]
        assert ".submitted: cannot be written: " in infos[0]["error"]
        assert [one["state"] for one in logged(out)] == ["failed", "completed"]
    out = tmp_path / "log"
    (out / LOG).mkdir(parents=True)
    with pytest.raises(DataError, match=f"{LOG}: cannot be written: Is a directory"):
        schedule(*words, out, "--local")


def test_only_what_is_missing_is_evaluated(data: Path, tmp_path: Path):
    words = ["-t", "copa", "-m", "random", "-o", tmp_path, "--data-dir", data, "--local",
             "--nshot", "0", "2", "--num-trials", "2"]  # fmt: skip
    schedule(*words)
    before = stamps(tmp_path)
    (gone,) = tmp_path.glob("*/*fs2*_results.json")
    gone.unlink()
    (info,) = schedule(*words)
    assert (info["completed"], info["missing"], info["to_do"]) == (1, 1, 1)
    after = stamps(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {gone.name}
    (info,) = schedule(*words)
    assert (info["current_status"], info["state"]) == ("skip", "completed")
    # Results that another scoring made are others, though the folder is the same.
    (info,) = schedule(*words, "--scoring", "sum")
    assert info["missing"] == 2 and len(stamps(tmp_path)) == 4


def test_what_is_done_is_asked_of_the_data_by_the_plan_and_by_the_job(tmp_path: Path):
    data = write_copa(tmp_path / "data", train=6, val=4)
    words = ["-t", "copa", "-m", "random", "-o", tmp_path / "out", "--data-dir", data, "--local"]
    schedule(*words)
    (results,) = (tmp_path / "out").glob("*/*_results.json")
    write_copa(data, train=6, val=5)
    (info,) = schedule(*words)
    assert (info["missing"], info["state"]) == (1, "completed")
    assert json.loads(results.read_text())["eval_examples_cnt"] == 5
    (info,) = schedule(*words)
    assert (info["missing"], info["current_status"]) == (0, "skip")


def test_override_predicts_again_and_recalculation_only_measures(data: Path, tmp_path: Path):
    words = ["-t", "copa", "-m", "random", "-o", tmp_path, "--data-dir", data, "--local"]
    schedule(*words)
    (results,) = tmp_path.glob("*/*_results.json")
    (predictions,) = tmp_path.glob("*/*_predictions.jsonl")
    right, rows = files(tmp_path), predictions.read_text()
    accuracy = json.loads(results.read_text())["accuracy"]["mean"]

    results.write_text(results.read_text().replace(f'"mean": {accuracy}', '"mean": 12345.0'))
    (info,) = schedule(*words, "--recalc-metrics-from-predictions")
    assert info["state"] == "completed" and files(tmp_path) == right
    turned = [json.loads(line) for line in rows.splitlines()]
    for row in turned:
        for _, said in row["candidates"]:
            said["score"] *= -1
    predictions.write_text("".join(json.dumps(row) + "\n" for row in turned))
    schedule(*words, "--recalc-metrics-from-predictions")
    assert json.loads(results.read_text())["accuracy"]["mean"] == 100 - accuracy
    schedule(*words, "--override-completed")
    assert predictions.read_text() == rows and files(tmp_path) == right


def test_jobs_side_by_side_find_what_one_after_another_do(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    words = ["-t", "copa", "copa_sum", "rte", "-m", "random", "--nshot", "0", "2",
             "--num-trials", "2", "--data-dir", data, "--local"]  # fmt: skip
    schedule(*words, "-o", tmp_path / "one")
    capfd.readouterr()
    infos = schedule(*words, "-o", tmp_path / "two", "-j", "99", "--split-few-shot-experiments")
    said = capfd.readouterr().out
    cores = len(os.sched_getaffinity(0))
    assert f"-j 99: {cores} core(s) here" in said or cores >= 99
    assert [info["name"] for info in infos][:2] == ["copa.random.fs0", "copa.random.fs2"]
    assert [info["state"] for info in infos] == ["completed"] * 4 + ["failed"] * 2
    assert files(tmp_path / "one") == files(tmp_path / "two")
    if cores > 1:
        # What jobs print has files of their own.
        assert "random | copa" not in said
        log = Path(infos[0]["stdout"]).read_text()
        assert "random | copa copa val | k=0" in log


def without_times(folder: Path) -> dict[str, bytes]:
    """Everything that evaluations have written."""
    made = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.glob("*/*_predictions.jsonl")
    }
    return {**files(folder), **made}


@pytest.mark.parametrize("jobs", [1, 2])
def test_trials_apart_come_to_what_they_come_to_together(
    jobs: int, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    model = ModelSettings("dummy", {}, {"predictor_name": "dummy"}, gpus_per_node=0)
    words = ["-t", "copa", "-m", "one", "--nshot", "0", "2", "--num-trials", "3", "--cpu",
             "--data-dir", data, "--local"]  # fmt: skip
    schedule(*words, "-o", tmp_path / "whole", one=model)
    apart = [*words, "-o", tmp_path / "apart", "--split-few-shot-trials", "-j", jobs]
    capfd.readouterr()
    infos = schedule(*apart, one=model)
    said = capfd.readouterr().out
    assert "4 job(s), 2 evaluation(s); to do here: 4 job(s), 2 evaluation(s)" in said
    assert [info["state"] for info in infos] == ["completed"] * 4
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "apart")
    # Side by side, the trial that ends last need not be told last.
    which = r"\[4/4\]" if jobs == 1 else r"\[\d/4\]"
    assert re.search(
        which + r" done      copa.one.seed\d \| .* s \| 1 trial\(s\) \| accuracy", said
    )
    if jobs == 1:
        assert said.count("1 trial(s) | other trials are not there yet") == 2
        assert "dummy | copa copa val | k=2 | seed 0 | other trials are not there yet" in said
    assert all(info["current_status"] == "skip" for info in schedule(*apart, one=model))
    # A trial that is missing is made, and those that are there are not made again.
    results, *_ = sorted((tmp_path / "apart").glob("*/*fs2*_results.json"))
    first, second, third = sorted((tmp_path / "apart").glob("*/*fs2*_predictions.jsonl"))
    results.unlink()
    second.unlink()
    third.write_text(third.read_text()[:-20])
    kept = first.stat().st_ino
    infos = schedule(*apart, one=model)
    assert [info["to_do"] for info in infos] == [0, 1, 1, 1]
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "apart")
    assert first.stat().st_ino == kept
    # All of them anew.
    schedule(*apart, "--override-completed", one=model)
    assert first.stat().st_ino != kept
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "apart")


def test_one_trials_failure_stops_no_other(data: Path, plugin: Path, tmp_path: Path):
    words = ["--local", "--split-few-shot-trials", "--num-trials", "2"]
    script = start(tmp_path, data, plugin, "second", *words)
    said = ended(script, tmp_path)
    assert script.returncode == 1
    assert re.search(r"done      copa.some_model.seed0 .* other trials are not there yet", said)
    assert re.search(r"failed    copa.some_model.seed1 .* ValueError: the second", said)
    assert len(stamps(tmp_path)) == 1 and list(tmp_path.rglob("*.submitted")) == []
    (tmp_path / "gate").touch()
    again = start(tmp_path, data, plugin, "second", *words)
    assert "2 trial(s)" not in ended(again, tmp_path) and again.returncode == 0
    (path,) = tmp_path.glob("*/*fs2*_results.json")
    assert len(json.loads(path.read_text())["accuracy"]["scores"]) == 2


def test_combined_tasks_share_a_model_and_one_missing_file_stops_no_other(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    model = ModelSettings("dummy", {"combine_tasks": True}, {"predictor_name": "dummy"})
    words = ["-t", "copa", "rte", "copa_sum", "-m", "both", "--data-dir", data, "--local", "--cpu"]
    (info,) = schedule(*words, "-o", tmp_path, both=model)
    assert (info["name"], info["state"]) == ("3_tasks.both", "failed")
    assert info["error"].startswith("task rte: ") and "RTE/val.jsonl is missing" in info["error"]
    assert info["error"].count(";") == 1  # the one of the message
    assert "2 of 3 evaluation(s)" in capfd.readouterr().out
    assert len(stamps(tmp_path)) == 2


def test_a_damaged_file_stops_no_other_before_the_model_is_loaded(tmp_path: Path):
    data = write_copa(tmp_path / "data", train=6, val=4)
    (data / "COPA" / "train.jsonl").write_text("{")
    model = ModelSettings("dummy", {}, {"predictor_name": "dummy"}, gpus_per_node=0)
    words = ["-t", "copa", "-m", "one", "--nshot", "2", "0", "--data-dir", data, "--local", "--cpu"]
    (info,) = schedule(*words, "-o", tmp_path / "out", one=model)
    assert info["state"] == "failed" and "train.jsonl:1: " in info["error"]
    assert info["error"].count("train.jsonl") == 1
    (path,) = (tmp_path / "out").glob("*/*_results.json")
    assert json.loads(path.read_text())["nb_few_shot_samples"] == 0


def test_a_dry_run_makes_nothing(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    words = ["-t", "copa", "-m", "random", "--nshot", "0", "2", "--data-dir", data, "--dry-run"]
    attempted = schedule(*words, "-o", tmp_path / "a" / "b")
    assert attempted[0]["state"] == "planned" and list(tmp_path.iterdir()) == []
    said = capfd.readouterr().out
    assert (
        "dry run   copa.random | 2 evaluation(s) | copa_random_fs.0_2_t5_smpl.All_current" in said
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(FliteError, match="is a file; expected a folder"):
        schedule(*words, "-o", tmp_path / "file" / "b")


def test_custom_arguments_stand_below_and_above_the_settings(data: Path, tmp_path: Path):
    chosen = settings()
    args = base.get_argparser("test", *chosen).parse_args(
        ["-t", "copa_sum", "-m", "random", "-o", str(tmp_path), "--data-dir", str(data), "--local",
         "--dry-run"]
    )  # fmt: skip
    low, high = {"scoring": "suffix", "num_trials": 2}, {"seed": 3}
    _, (info,) = schedule_experiment_jobs(args, *chosen, low, high)
    (values,) = info["run_args"]
    assert (values["scoring"], values["num_trials"], values["seed"]) == ("sum", 2, 3)
    with pytest.raises(ConfigError, match="results_dir"):
        schedule_experiment_jobs(args, *chosen, {"results_dir": "x"})


# -- processes that end


def start(out: Path, data: Path, plugin: Path, predictor: str, *words: str) -> Any:
    """A script in a process of its own, with COPA without shots and with two."""
    environ = {**os.environ, "REACHED": str(out / "reached"), "GATE": str(out / "gate")}
    out.mkdir(exist_ok=True)
    # Not a pipe: jobs that outlive the script would keep it open.
    with open(out / "said", "a") as said:
        return subprocess.Popen(
            [sys.executable, f"{SCRIPTS}/schedule_jobs_few_shot.py", "-t", "copa",
             "-m", "some/model", "--nshot", "0", "2", "--num-trials", "1", "-o", str(out),
             "--data-dir", str(data), "--user-dir", str(plugin), "--predictor-name", predictor,
             *words],
            cwd=REPOSITORY, env=environ, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip


def ended(script: Any, out: Path) -> str:
    """What a script has said, when it has ended."""
    script.wait(timeout=60)
    said = (out / "said").read_text()
    (out / "said").write_text("")
    return said


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def waiting(out: Path, data: Path, plugin: Path) -> Iterator[tuple[Any, Process]]:
    """A script in the middle of its second evaluation, and the process that evaluates."""
    script = start(out, data, plugin, "waiting", "--local")
    reached = out / "reached"
    try:
        pid = until(lambda: script.poll() is not None or (reached.exists() and reached.read_text()))
        assert script.poll() is None, ended(script, out)
        yield script, Process.of(int(pid))
    finally:
        if script.poll() is None:
            script.kill()
        script.wait(timeout=30)
        (out / "gate").touch()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_script_that_is_ended_ends_its_jobs_and_keeps_what_is_finished(
    number: int, status: int, data: Path, plugin: Path, tmp_path: Path
):
    with waiting(tmp_path, data, plugin) as (script, job):
        before = stamps(tmp_path)
        assert job.is_alive and len(before) == 1
        assert len(list(tmp_path.rglob("*.submitted"))) == 2
        if number == signal.SIGINT:  # as a terminal sends it, to all that it sees
            os.killpg(script.pid, number)
        else:
            script.send_signal(number)
        said = ended(script, tmp_path)
        assert "Traceback" not in said
        assert script.returncode == status
        if number == signal.SIGKILL:  # which nobody hears: the job sees that it is alone
            until(lambda: not job.is_alive, seconds=20)
        assert not job.is_alive
    if number != signal.SIGKILL:
        assert "interrupted: 1 job(s) left; the same command goes on" in said
        assert list(tmp_path.rglob("*.submitted")) == []
    # What was left behind blocks nothing; the gate is open now.
    again = start(tmp_path, data, plugin, "waiting", "--local")
    assert "1 evaluation(s) | accuracy" in ended(again, tmp_path)
    assert again.returncode == 0
    after = stamps(tmp_path)
    assert len(after) == 2 and before.items() <= after.items()


def family(reached: Path) -> list[Process]:
    """The processes that predictors were in, and those that they started."""
    found = reached.parent.glob(f"{reached.name}.*[0-9]")
    return [Process.of(int(pid)) for path in sorted(found) for pid in path.read_text().split()]


def test_nobody_outlives_the_pool(
    data: Path, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reached = tmp_path / "reached"
    monkeypatch.setenv("REACHED", str(reached))
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    kinds = ("random", "parent", "deaf")
    with registered(*((PREDICTORS, name, RandomPredictor) for name in kinds[1:])):
        orders = [_order(name, data, plugin, tmp_path / name) for name in kinds]
    # The first two end when they are told to, and the third does not.
    endings = Pool(Share(3, 1), tmp_path / "logs").run(iter(orders))
    try:
        assert next(endings).order.name == "random"
        everybody = until(lambda: len(found := family(reached)) == 4 and found)
        assert all(each.is_alive for each in everybody)
    finally:
        endings.close()
    assert not any(each.is_alive for each in everybody)


def _order(predictor: str, data: Path, plugin: Path, folder: Path) -> Order:
    values: dict[str, Any] = {
        "tasks": ["copa"], "nb_few_shot_samples_values": [0], "predictor_name": predictor,
        "data_dir": str(data), "results_dir": str(folder), "user_dir": str(plugin),
    }  # fmt: skip
    (planned,) = plan("m", **values)
    return Order(predictor, (("m", values),), (str(planned.results_file),))


def test_a_killed_scripts_job_ends_though_it_hears_nothing_and_so_does_what_it_started(
    data: Path, plugin: Path, tmp_path: Path
):
    script = start(tmp_path, data, plugin, "deaf", "--local")
    try:
        everybody = until(lambda: family(tmp_path / "reached"))
        assert len(everybody) == 2 and all(each.is_alive for each in everybody)
    finally:
        script.kill()
        script.wait(timeout=30)
    until(lambda: not any(each.is_alive for each in everybody), seconds=20)


def test_the_last_line_names_the_rank_that_was_killed(data: Path, plugin: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.few_shot.gpt3_eval", "--model-name", "dummy",
         "--predictor-name", "dummy", "--user-dir", str(plugin), "--tasks", "copa", "--nshot", "0",
         "--data-dir", str(data), "--results-dir", str(tmp_path), "--cpu",
         "--distributed-world-size", "2"],
        cwd=REPOSITORY, env={**os.environ, "KILLED_RANK": "1"}, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gpt3_eval: error: rank 1 died (signal 9: killed)")


def test_two_scripts_do_not_work_on_the_same_job(data: Path, plugin: Path, tmp_path: Path):
    with waiting(tmp_path, data, plugin) as (script, _):
        other = start(tmp_path, data, plugin, "waiting", "--local", "--dry-run")
        said = ended(other, tmp_path)
        assert f"skipped   copa.some_model | process {script.pid} on " in said
        assert "works on 1 evaluation(s)" in said


def test_a_process_that_dies_or_has_a_bug_fails_its_job_alone(
    data: Path, plugin: Path, tmp_path: Path
):
    for predictor, error in (("dying", "ended with status 3"), ("faulty", "ValueError: a bug")):
        words = ["--local", "--split-few-shot-experiments"]
        script = start(tmp_path, data, plugin, predictor, *words)
        said = ended(script, tmp_path)
        assert script.returncode == 1
        assert len(re.findall(rf"\[./2\] failed .*{error}", said)) == 2, said
    assert list(tmp_path.rglob("*.submitted")) == []


# -- submitit


def test_submitits_debug_executor_runs_jobs_in_this_process(data: Path, tmp_path: Path):
    pytest.importorskip("submitit")
    infos = schedule(
        "-t", "copa", "rte", "-m", "random", "-o", tmp_path, "--data-dir", data,
        "--slurm-executor", "debug",
    )  # fmt: skip
    assert [info["state"] for info in infos] == ["completed", "failed"]
    assert infos[0]["current_status"] == "submit" and len(stamps(tmp_path)) == 1
    assert "RTE/val.jsonl is missing" in infos[1]["error"]
    assert list(tmp_path.rglob("*.submitted")) == []


def test_submitits_local_executor_runs_jobs_that_are_submitted_once(
    data: Path, plugin: Path, tmp_path: Path
):
    pytest.importorskip("submitit")
    words = ["waiting", "--slurm-executor", "local", "--slurm-gpus-per-node", "0"]
    try:
        said = ended(start(tmp_path, data, plugin, *words), tmp_path)
        (job,) = re.findall(r"submitted copa.some_model \| 2 evaluation\(s\) \| job (\d+)", said)
        until((tmp_path / "reached").exists)
        said = ended(start(tmp_path, data, plugin, *words), tmp_path)
        assert re.search(r"skipped .* works on 1 evaluation", said)
    finally:
        (tmp_path / "gate").touch()
    until(lambda: not Process.of(int(job)).began)
    assert "are complete" in ended(start(tmp_path, data, plugin, *words), tmp_path)
    assert list(tmp_path.rglob("*.submitted")) == []
    assert [one["state"] for one in logged(tmp_path)] == ["submitted"]


def test_the_tasks_of_submitits_local_executor_meet(data: Path, tmp_path: Path):
    pytest.importorskip("submitit")
    out = tmp_path / "out"
    model = ModelSettings("dummy", {}, {"predictor_name": "dummy"}, 1, 0, 2, 1)
    words = ["-t", "copa", "-m", "two", "-o", out, "--data-dir", data, "--cpu"]
    (info,) = schedule(*words, "--slurm-executor", "local", two=model)
    assert info["state"] == "submitted"
    job = Process.of(int(info["job_id"]))
    until(lambda: not job.began or not job.is_alive, seconds=100)
    said = [path.read_text() for path in sorted((out / "submitit").glob("*_log.out"))]
    assert len(said) == 2
    assert ["dummy | copa copa val | k=0" in text for text in said] == [True, False]
    assert len(stamps(out)) == 1 and list(out.rglob("*.submitted")) == []


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, srun and squeue: the first keeps its script, the last knows the jobs in a file."""
    pytest.importorskip("submitit")
    folder = tmp_path / "cluster"
    folder.mkdir()
    scripts = {
        "sbatch": f"cp $1 {folder}/script.$$; echo Submitted batch job 4711",
        "srun": "exit 1",
        "squeue": f"cat {folder}/jobs",
    }
    (folder / "jobs").write_text("4711_0\n4711_1\n")
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines of a script."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script.read_text(), re.MULTILINE))


def test_jobs_of_a_model_are_an_array_that_is_submitted_once_until_it_has_ended(
    data: Path, tmp_path: Path, cluster: Path
):
    model = ModelSettings(
        "random", {}, {"predictor_name": "random"}, 1, 0, 1, 2, 5, partition="own"
    )
    words = [
        "-t", "copa", "rte", "-m", "small", "-o", tmp_path / "out", "--data-dir", data,
        "--slurm-partition", "flag", "--slurm-constraint", "big", "--slurm-time", "30",
        "--slurm-mail-user", "me@example.org",
    ]  # fmt: skip
    infos = schedule(*words, small=model)
    assert [info["job_id"] for info in infos] == ["4711_0", "4711_1"]
    (script,) = cluster.glob("script.*")
    found = directives(script)
    wanted = {
        "array": "0-1%2", "partition": "own", "nodes": "1", "ntasks-per-node": "1",
        "cpus-per-task": "2", "time": "30", "constraint": "big", "job-name": "small_few_shot",
        "mail-user": "me@example.org", "mail-type": "FAIL",
    }  # fmt: skip
    assert wanted.items() <= found.items()
    script.unlink()
    # Both wait or run.
    infos = schedule(*words, "--override-completed", small=model)
    assert [(one["current_status"], one["state"]) for one in infos] == [("skip", "submitted")] * 2
    # One has ended without results: it alone is submitted again.
    (cluster / "jobs").write_text("4711_0\n")
    infos = schedule(*words, small=model)
    assert [one["current_status"] for one in infos] == ["skip", "submit"]
    assert "array" not in directives(next(cluster.glob("script.*")))


def test_what_slurm_does_not_take_is_a_failed_job(data: Path, tmp_path: Path, cluster: Path):
    (cluster / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n"
    )
    words = ["-t", "copa", "-m", "random", "-o", tmp_path / "out", "--data-dir", data]
    (info,) = schedule(*words)
    assert info["state"] == "failed" and "not submitted" in info["error"]
    assert list((tmp_path / "out").rglob("*.submitted")) == []


def test_without_slurm_the_flag_that_helps_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no Slurm: add --local"):
        schedule("-t", "copa", "-m", "random", "-o", tmp_path / "out", "--data-dir", data)
    assert not (tmp_path / "out").exists()


def _step(folder: Path, rank: int) -> Mapping[str, str]:
    """What Slurm says to one of two tasks of the first job of the array."""
    return {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
        "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip


def test_the_tasks_of_a_slurm_job_are_the_ranks_of_its_evaluations(
    data: Path, tmp_path: Path, cluster: Path, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    model = ModelSettings("dummy", {}, {"predictor_name": "dummy"}, 1, 0, 2, 1)
    words = ["-t", "copa", "-m", "two", "-o", out, "--data-dir", data, "--cpu"]
    (info,) = schedule(*words, two=model)
    assert info["job_id"] == "4711"
    (script,) = cluster.glob("script.*")
    assert directives(script)["ntasks-per-node"] == "2"
    command = [sys.executable, "-u", "-m", "submitit.core._submit", str(out / "submitit")]
    tasks = [subprocess.Popen(command, env=_step(out, rank)) for rank in (0, 1)]
    try:
        assert [task.wait(timeout=100) for task in tasks] == [0, 0]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert capfd.readouterr().out.count("dummy | copa copa val | k=0") == 1  # the first speaks
    assert len(stamps(out)) == 1 and list(out.rglob("*.submitted")) == []
    (info,) = schedule(*words, two=model)
    assert info["state"] == "completed"


# -- scripts and their guide

NAMES = sorted(path.stem for path in (REPOSITORY / SCRIPTS).glob("schedule_jobs_*.py"))


def test_a_command_has_the_defaults_of_its_script(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    words = ["-t", "copa", "-m", "random", "--data-dir", str(data), "--local"]
    defaults = {"output": str(tmp_path / "out"), "num_trials": 2, "scoring": "sum"}
    more = ["--scoring", "mean", "--nshot", "1"]
    assert base.schedule_command("x", *settings(), [*words, *more], defaults=defaults) == 0
    (path,) = (tmp_path / "out").glob("copa_random_fs.1_t2_*/*_results.json")
    assert json.loads(path.read_text())["scoring"] == "mean"  # what is typed wins
    capfd.readouterr()
    assert base.schedule_command("x", *settings(), words, defaults={"trials": 2}) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(r".*: error: arg_modify_default: no flag 'trials'.*\n", said)


def _script(name: str) -> ModuleType:
    return importlib.import_module(f"{SCRIPTS.replace('/', '.')}.{name}")


def test_the_scripts_are_those_of_the_guide():
    assert len(NAMES) == 7
    assert set(re.findall(r"`(schedule_jobs_\w+)\.py` \|", GUIDE.read_text())) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_everything_that_a_script_names_can_be_planned(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    script = _script(name)
    own = name != "schedule_jobs_few_shot"
    tasks = script.available_tasks_settings if own else script.default_tasks_settings
    groups = script.task_run_groups if own else script.default_task_run_groups
    models = script.available_model_settings if own else script.default_model_settings
    model_groups = script.model_run_groups if own else script.default_model_run_groups
    assert "all" in groups and "all" in model_groups
    keys = set(tasks) - {"perplexity", "processtext"}  # these are told what to read
    words = [*groups, *sorted(keys)]
    more = ["-o", str(tmp_path / "x"), "--nshot", "0", "--dry-run"]
    assert script.main(["-t", *words, "-m", next(iter(models)), *more]) == 0
    assert f"{len(keys)} job(s)" in capfd.readouterr().out
    assert script.main(["-t", words[-1], "-m", *model_groups, *models, *more]) == 0
    assert f"{len(models)} job(s)" in capfd.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_script_is_typed_as_it_stands(name: str, tmp_path: Path):
    text = (REPOSITORY / SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    (found,) = re.findall(r"^python (examples/\S+ \\\n\s+.*--dry-run)$", text, re.MULTILINE)
    words = found.replace("\\\n", " ").split()
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "dry run" in done.stdout and not (REPOSITORY / "few_shot_results").exists()


def test_the_calibrations_empty_fields_that_their_tasks_have(tmp_path: Path):
    folder = write_english_tasks(tmp_path / "tasks")
    script = _script("schedule_jobs_few_shot_calibration")
    several = {"xcopa_calib", "xnli_calib", "pawsx_calib", "exams_calib"}
    words = [key for key in script.task_run_groups["calibration"] if key not in several]
    assert len(words) == 15
    assert script.main(
        ["-t", *words, "-m", "dummy", "-o", str(tmp_path / "out"), "--data-dir", str(folder),
         "--local"]
    ) == 0  # fmt: skip


BY_ITSELF = """
args = get_argparser("x", {}, tasks, {}, models).parse_args()
schedule_experiment_jobs(args, {}, tasks, {}, models)
"""
WITH_STATUS = """
def main(argv=None):
    return schedule_command("x", {}, tasks, {}, models, argv)

sys.exit(run_script(main))
"""


@pytest.mark.parametrize(
    ("end", "words", "said"),
    [
        (BY_ITSELF, "-m wrong -t copa", "model setting 'wrong': nodes: expected a whole number"),
        (BY_ITSELF, "-m right -t wrong", "task setting 'wrong': the tasks: expected names"),
        (BY_ITSELF, "-m right --number 3", "unknown flag --number"),
        (WITH_STATUS, "-m wrong -t copa", "model setting 'wrong': nodes: expected a whole number"),
    ],
)
def test_a_wrong_setting_is_one_line_however_a_script_ends(
    end: str, words: str, said: str, tmp_path: Path
):
    script = tmp_path / "mine.py"
    script.write_text(
        f"""
import sys
from examples.few_shot.scripts.experiments.schedule_jobs_few_shot import *
models = {{"right": ModelSettings("random"), "wrong": ModelSettings("random", nodes=0)}}
tasks = {{**default_tasks_settings, "wrong": TaskSettings("x", [7])}}
{end}
""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script), *words.split(), "-o", "out", "--local"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mine{'.py' if end == BY_ITSELF else ''}: error: {said}")


def test_the_example_of_the_guide_is_a_script(data: Path, tmp_path: Path):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    # In place of checkpoints that nobody has here.
    code = code.replace(
        '"125M_gpt3_setting", eval_params={"scoring": "sum"}',
        '"random", eval_params={"scoring": "sum", "predictor_name": "random"}',
    )
    code = code.replace('"355M_gpt3_setting", {}, {"scoring": "sum"}',
                        '"random", {}, {"scoring": "sum", "predictor_name": "random"}')  # fmt: skip
    script = tmp_path / "schedule_jobs_copa_separator.py"
    script.write_text(code, encoding="utf-8")
    words = ["-t", "separators", "-m", "small", "--nshot", "0", "4", "--local"]
    assert f"{script.name} \\\n    {' '.join(words[:-1])}" in code  # as the example says
    done = subprocess.run(
        [sys.executable, str(script), *words, "-o", "out"], cwd=tmp_path, capture_output=True,
        text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "FSD": str(data)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/*_results.json")]
    assert {one["settings"]["train_sep"] for one in found} == {" ", "\n"}
    assert {one["nb_few_shot_samples"] for one in found} == {0, 4}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {
        "copa_125M_sum_fs.0_4_t3_smpl.All_current", "copa_355M_sum_fs.0_4_t3_smpl.All_current",
    }  # fmt: skip
