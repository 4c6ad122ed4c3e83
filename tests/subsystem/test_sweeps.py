"""Sweeps that train: interrupted, failed, resumed, skipped, with their table; the guides' runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import fake_slurm, sweeps
from tests.helpers.languages import write_corpus, write_languages
from tests.helpers.sweeps import state

State = state.State
UPDATES = 300


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    # Not in the repository, where Python would find the package without being installed.
    monkeypatch.chdir(tmp_path)
    assert os.getcwd() == str(tmp_path)


def run(name: str, *words: object) -> int:
    """Execute one of the scripts in this process; its status."""
    module = sweeps.script(name)
    prepare = getattr(module, "make_data", None)
    typed = [str(word) for word in words]
    try:
        sweeps.main(module.get_grid, None, module.add_options, typed, prepare=prepare)
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def table(out: Path) -> dict[str, dict[str, str]]:
    """The table a sweep left: run -> column -> what stands there."""
    (path,) = out.glob("*.sweep_results.tsv")
    heads, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


def trained(folder: Path) -> list[int]:
    """The updates that a run logged, in the order in which it made them."""
    lines = (folder / state.LOG).read_text().splitlines()
    records = [json.loads(line[line.index("{") :]) for line in lines if "| train_inner |" in line]
    return [int(record["num_updates"]) for record in records]


def test_a_sweep_is_interrupted_fails_and_is_finished(tmp_path):
    data = write_corpus(tmp_path / "data", {"train": 3000, "valid": 10})
    out = tmp_path / "out"
    words = ["-d", data, "-p", "s", "-t", "-1", "-g", "1", "--local", "--checkpoints-dir", out]
    words += ["--arch", "transformer_lm_gpt2_tiny", "--lr", "1e-3", "1e-2", "--tps", "16"]
    words += ["--mu", UPDATES, "--wu", "5", "--li", "1", "--nw", "0", "--precision", "fp32"]
    first, second = (r.save_dir for r in sweeps.runs_of(sweeps.script("sweep_lm"), *words))

    # Ctrl-C in the middle of the first run: it saves, and the second does not begin.
    command = [sys.executable, sweeps.FOLDER / "sweep_lm.py", *words]
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE) as process:
        log = first / state.LOG
        while not (log.exists() and "| train_inner |" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [state.state_of(folder)[0] for folder in (first, second)] == [
        State.INTERRUPTED,
        State.NEW,
    ]
    made = trained(first)
    assert 0 < made[-1] < UPDATES

    # A second time: the first goes on; the second fails, as its checkpoint is damaged.
    second.mkdir()
    (second / "checkpoint_last.pt").write_bytes(b"damaged")
    assert run("sweep_lm", *words) == 1
    rows = table(out)
    assert [rows[folder.name]["state"] for folder in (first, second)] == ["finished", "failed"]
    assert "checkpoint_last.pt" in rows[second.name]["error"]
    assert trained(first) == list(range(1, UPDATES + 1)), "no update was made twice"

    # A third time, and a fourth: what failed is only resumed when asked, what finished never.
    (second / "checkpoint_last.pt").unlink()
    before = (first / state.LOG).stat().st_mtime_ns
    assert run("sweep_lm", *words) == 1
    assert run("sweep_lm", *words, "--resume-failed") == 0
    assert (first / state.LOG).stat().st_mtime_ns == before
    rows = table(out)
    assert [row["state"] for row in rows.values()] == ["finished", "finished"]
    for folder in (first, second):
        row = rows[folder.name]
        assert row["updates"] == str(UPDATES)
        lines = (folder / state.LOG).read_text().splitlines()
        records = [json.loads(x[x.index("{") :]) for x in lines if "| valid |" in x and "{" in x]
        best = min(records, key=lambda record: float(record["valid_loss"]))
        assert float(row["valid_loss"]) == pytest.approx(float(best["valid_loss"]))
        assert float(row["valid_ppl"]) == pytest.approx(float(best["valid_ppl"]))
        assert float(row["train_loss"]) > 0 and float(row["tokens_per_second"]) > 0
    assert (second / "checkpoint_best.pt").is_file()


def test_the_benchmark_of_the_guide_runs(tmp_path, capfd):
    # gshard's function but for what makes it large: -g 8, 256 wide, 512 blocks of 1024 tokens.
    words = ["-g", "2", "-t", "1", "-n", "1", "--dl", "2", "--embed-dim", "16"]
    words += ["--bs", "4", "--li", "1", "--epg", "0", "--mu", "3"]
    words += ["--constraint", "volta32gb", "--partition", "learnaccel", "--resume-failed"]
    words += ["--nw", "0", "-p", "tiny", "--checkpoints-dir", tmp_path, "--opt", "adam"]
    words += ["--ddp", "no_c10d", "--local", "--ebs", "16", "--tps", "16", "--dict-size", "30"]
    assert run("benchmark_lm", *words, "--snapshot-code") == 0
    printed = capfd.readouterr().out
    assert "no -d: the data are random tokens" in printed
    ((name, row),) = table(tmp_path).items()
    assert name.startswith("tiny.fp16.") and name.endswith(".bs4.ebs16.mu3.ngpu2")
    assert (row["state"], row["updates"]) == ("finished", "3")
    assert f"{name}  finished" in printed
    log = (tmp_path / name / state.LOG).read_text()
    assert "training on 2 devices" in log
    assert f"{name}/code/fairseq_lite_cli/train.py" in log.splitlines()[0]


def test_the_multilingual_sweep_of_the_guide_runs(tmp_path, monkeypatch):
    data = write_languages(tmp_path / "data", {"de": 30, "en": 20}, valid=8)
    # The guide's variable and flags; two experts on one process instead of eight on eight.
    monkeypatch.setenv("MU", "4")
    words = ["-n", "1", "-g", "1", "--epg", "2", "-d", data, "--local", "-t", "1"]
    words += ["-p", "tiny_multi", "--checkpoints-dir", tmp_path / "out", "--tps", "16"]
    assert run("sweep_multilingual_lm", *words, "--post-steps", "echo {job_dir} >steps") == 0
    ((name, row),) = table(tmp_path / "out").items()
    assert ".nlangs_2.transformer_lm_gpt2_tiny.moe_w0.01.all." in name
    assert (row["state"], row["updates"]) == ("finished", "4")
    assert (tmp_path / "out" / name / "checkpoint_last-shared.pt").is_file()
    assert Path("steps").read_text() == f"{tmp_path / 'out' / name}\n"


def test_a_sweep_in_an_allocation_trains_on_its_machines(tmp_path, monkeypatch, capfd):
    data = write_corpus(tmp_path / "data", {"train": 200, "valid": 10})
    (tmp_path / "slurm").mkdir()
    said = {"JOB_ID": "17", "JOB_NUM_NODES": "2", "NNODES": "2", "NTASKS": "2",
            "JOB_NODELIST": "localhost,localhost"}  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    commands = fake_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    words = ["-d", data, "-p", "s", "-t", "1", "-n", "2", "-g", "1", "--checkpoints-dir", "out"]
    words += ["--arch", "transformer_lm_gpt2_tiny", "--tps", "16", "--mu", "3", "--wu", "1"]
    words += ["--li", "1", "--nw", "0", "--precision", "fp32", "--partition", "p"]
    assert run("sweep_lm", *words, "--salloc", "--dry-run") == 0
    printed = capfd.readouterr().out
    assert "    srun --nodes=2 --ntasks=2" in printed
    assert "--salloc: no part in it have --partition" in printed
    assert run("sweep_lm", *words, "--salloc") == 0
    ((name, row),) = table(Path("out")).items()
    assert name.endswith(".ngpu2")
    assert (row["state"], row["updates"]) == ("finished", "3")
    log = (Path("out") / name / state.LOG).read_text()
    assert "training on 2 devices" in log and trained(Path("out") / name) == [1, 2, 3]
    assert run("sweep_lm", *words, "--salloc") == 0
    assert "skipped, as it has finished" in capfd.readouterr().out


# Slurm, as far as a job needs it: sbatch keeps the script, srun executes what follows its options,
# and scontrol notes what it is told.
SLURM = {
    "sbatch": 'cp "$1" "$(dirname "$0")/job.17"; echo "Submitted batch job 17"\n',
    "srun": 'while [ "${1#--}" != "$1" ]; do\n'
    "    case $1 in --output|--error) shift ;; esac\n"
    "    shift\n"
    "done\n"
    'echo $$ >"$(dirname "$0")/pid"; exec "$@"\n',
    "scontrol": 'echo "$@" >>"$(dirname "$0")/calls"\n',
    "squeue": "echo 17\n",
}


def test_a_job_makes_room_comes_back_and_finishes(tmp_path, monkeypatch):
    """From sbatch's script to the end, with what submitit carries there and back."""
    pytest.importorskip("submitit")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in SLURM.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    trainer = tmp_path / "trainer.sh"
    trainer.write_text(
        "trap 'echo the process was asked to end; exit 0' USR1; echo be''gun\n"
        "for i in $(seq 3000); do sleep 0.02; done\n"
    )
    words = ["-p", "s", "-t", "1", "-g", "1", "--checkpoints-dir", tmp_path / "out"]
    words += ["--python", "sh", "--script", trainer, "-d", "data"]
    assert run("sweep_lm", *words) == 0
    ((name, row),) = table(tmp_path / "out").items()
    assert row["state"] == "submitted"
    folder = tmp_path / "out" / name
    script = commands / "job.17"
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    with subprocess.Popen(["bash", script], stderr=subprocess.PIPE) as job:
        log = folder / state.LOG
        while not (log.exists() and "begun" in log.read_text()):
            assert job.poll() is None
            time.sleep(0.02)
        os.kill(int((commands / "pid").read_text()), signal.SIGUSR2)  # Slurm's warning
        job.wait(60)
    assert (commands / "calls").read_text() == "requeue 17\n"
    assert log.read_text().splitlines()[-1] == "the process was asked to end"
    record = state.load(folder)
    assert record is not None and (record.state, record.job) == (State.SUBMITTED, "17")

    trainer.write_text("echo done training\n")
    assert subprocess.run(["bash", script], stderr=subprocess.PIPE, timeout=60).returncode == 0
    assert state.state_of(folder)[0] is State.FINISHED
    assert run("sweep_lm", *words) == 0, "nothing is left to submit"
    assert state.load(folder).attempt == 1  # type: ignore[union-attr]
