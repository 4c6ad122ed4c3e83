"""Evaluation with several processes prints what one process prints, byte for byte."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fairseq_lite.errors import DataError
from fairseq_lite.parallel.stream import Ordered, worked
from fairseq_lite.parallel.world import World
from tests.helpers.commands import REPOSITORY, flite, flite_process, left_running
from tests.helpers.distributed import run_distributed
from tests.helpers.evaluating import (
    Case,
    language_model,
    outputs,
    pairs,
    random_lengths,
    translation_model,
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    work = tmp_path_factory.mktemp("work")
    data = pairs(work, random_lengths(20, seed=5))
    model = translation_model(data, work / "model")
    lm_data, lm = language_model(work)
    generate = [str(data), "--path", str(model), "--cpu", "--max-len-b", "15"]
    few = ["--batch-size", "3"]
    go_on = [
        *(str(lm_data), "--task", "language_modeling", "--path", str(lm), "--cpu", "--max-len-b"),
        *("20", "--sample-break-mode", "eos", "--batch-size", "4"),
    ]
    score = [str(lm_data), "--path", str(lm), "--cpu", "--batch-size", "2"]
    validate = [str(data), "--path", str(model), "--cpu", *few]
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 3, "max_len_b": 20}']
    return {
        "beam": ("generate", [*generate, *few, "--beam", "4", "--nbest", "2"]),
        "one batch": ("generate", [*generate, "--max-tokens", "12000", "--beam", "2"]),
        "sampling": ("generate", [*generate, *few, "--sampling", "--sampling-topp", "0.9",
                                  "--beam", "2", "--seed", "7"]),
        "prefix": ("generate", [*generate, *few, "--prefix-size", "2"]),
        "reference": ("generate", [*generate, *few, "--score-reference"]),
        "alignment": ("generate", [*generate, *few, "--print-alignment", "soft"]),
        "dropout": ("generate", [*generate, *few, "--retain-dropout", "--beam", "2"]),
        "a shard": ("generate", [*generate, *few, "--num-shards", "3", "--shard-id", "1"]),
        "quiet": ("generate", [*generate, *few, "--quiet"]),
        "too long": ("generate", [*generate, *few, "--max-source-positions", "30",
                                  "--skip-invalid-size-inputs-valid-test"]),
        "go on": ("generate", [*go_on, "--prefix-size", "2", "--beam", "2"]),
        "go on sampling": ("generate", [*go_on, "--prefix-size", "1", "--sampling", "--beam", "1"]),
        "score": ("eval_lm", score),
        "words": ("eval_lm", [*score, "--output-word-probs", "--output-word-stats"]),
        "context": ("eval_lm", [*score, "--tokens-per-sample", "20", "--context-window", "5"]),
        "first batches": ("eval_lm", [*score, "--max-valid-steps", "5"]),
        "a shard of a text": ("eval_lm", [*score, "--num-shards", "2", "--shard-id", "1"]),
        "validate": ("validate", validate),
        "validate bleu": ("validate", [*validate, *bleu, "--eval-bleu-print-samples"]),
        "validate and log": ("validate", [*validate, *bleu, "--log-format", "simple",
                                          "--no-progress-bar", "--log-interval", "2"]),
        "validate first": ("validate", [*validate, "--max-valid-steps", "3"]),
        "validate a shard": ("validate", [*validate, "--num-shards", "2", "--shard-id", "1"]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case]) -> dict[str, str]:
    (found,) = run_distributed(outputs, 1, cases)
    return found


# Reports in the middle of a split come at other places with other numbers of ranks.
def at_the_end(name: str, text: str) -> str:
    if name != "validate and log":
        return text
    return "\n".join(line for line in text.splitlines() if " / " not in line)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_output_is_that_of_one_process(
    cases: dict[str, Case], alone: dict[str, str], world_size: int
) -> None:
    found = run_distributed(outputs, world_size, cases, timeout=200)
    for name, text in alone.items():
        assert at_the_end(name, found[0][name]) == at_the_end(name, text), name
        assert text, name
    for other in found[1:]:
        assert not any(re.search(r"^[HDT]-|BLEU|Perplexity", text) for text in other.values())


def test_what_the_cases_are_of(alone: dict[str, str]) -> None:
    """Outputs differ in length, batches are many, some sentences are too long."""
    hypotheses = [line.split("\t")[2] for line in alone["beam"].splitlines() if line[:2] == "H-"]
    assert len({len(line.split()) for line in hypotheses}) > 3
    assert re.search(r"^H-\d+\t-inf\t$", alone["too long"], re.M)
    assert alone["dropout"] != alone["beam"] and "T-" in alone["beam"]
    assert "Generate test with beam=4: BLEU4" in alone["beam"]
    assert " | bleu " in alone["validate bleu"]
    assert alone["validate bleu"].count("example hypothesis") == 13
    assert alone["validate and log"].count(" / ") == 6
    assert "Perplexity" in alone["score"]


# -- the bug put in -------------------------------------------------------------------------------


def in_order(world: World, total: int, bug: bool) -> list[int]:
    stream: Ordered[int] = Ordered(world, total)
    if bug:
        hand_on = stream._gather
        stream._gather = lambda item: hand_on(item)[::-1]
    seen: list[int] = []
    for number in range(world.rank, total, world.size):
        time.sleep(0.01 * ((number * 7) % 5))
        stream.put(number)
        seen += stream.ready()
    seen += stream.rest()
    return seen


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 20])
def test_items_come_in_order(world_size: int, total: int) -> None:
    if world_size > 1 and total not in (2, 20):
        pytest.skip("one of each kind is enough")
    found = run_distributed(in_order, world_size, total, False)
    assert found == [list(range(total))] + [[]] * (world_size - 1)


def test_another_order_is_noticed() -> None:
    assert run_distributed(in_order, 2, 6, True)[0] != list(range(6))


def speeds(world: World) -> Any:
    return worked(world, {"sentences": 10 * (world.rank + 1)}, float(world.rank + 1))


def test_speeds_add_up() -> None:
    for work in run_distributed(speeds, 2):
        assert work.counts == {"sentences": 30}
        assert (work.seconds, work.speeds) == (2.0, {"sentences": 20.0})


# -- command lines --------------------------------------------------------------------------------


def test_commands_start_processes(cases: dict[str, Case], alone: dict[str, str]) -> None:
    command, words = cases["beam"]
    both = flite_process(command, *words, "--distributed-world-size", "2", timeout=120)
    assert both.returncode == 0, both.stderr
    assert both.stdout.rstrip("\n") == alone["beam"]
    assert re.search(r"Translated 23 sentences \([\d,]+ tokens\)", both.stderr)
    assert both.stderr.count("NOTE: hypothesis") == 1


@pytest.mark.parametrize("name", ["words", "validate"])
def test_other_commands_start_them_too(
    name: str, cases: dict[str, Case], capfd: pytest.CaptureFixture[str]
) -> None:
    command, words = cases[name]
    assert flite(command, *words, "--distributed-world-size", "2") == 0, capfd.readouterr().err


def test_a_folder_for_results(
    cases: dict[str, Case],
    alone: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, words = cases["beam"]
    two = ("--distributed-world-size", "2")
    assert flite(command, *words, *two, "--results-path", tmp_path) == 0
    assert capfd.readouterr().out == ""
    assert (tmp_path / "generate-test.txt").read_text("utf-8").rstrip("\n") == alone["beam"]


def test_interactive_is_one_process(
    cases: dict[str, Case], capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = cases["beam"]
    assert flite("interactive", *words[:3], "--distributed-world-size", "2") == 2
    assert "a terminal is read by one process; use flite-generate" in capsys.readouterr().err


def test_a_launcher_starts_them(cases: dict[str, Case], alone: dict[str, str]) -> None:
    command, words = cases["beam"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
                "-m", f"fairseq_lite_cli.{command}"]  # fmt: skip
    done = subprocess.run(
        [*launcher, *words],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == alone["beam"]


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.fixture
def running(cases: dict[str, Case]) -> Iterator[subprocess.Popen[str]]:
    """flite-generate of two processes, which has printed its first lines."""
    _, words = cases["beam"]
    long = ["--beam", "20", "--max-len-b", "900", "--min-len", "890", "--nbest", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "fairseq_lite_cli.generate", *words, *long,
         "--distributed-world-size", "2", "--batch-size", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        yield process
        process.kill()


def children_of(parent: int) -> list[int]:
    """Its child processes that are ranks."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in map(int, listed) if b"spawn_main" in _command_of(pid)]


def _command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_rank_that_is_killed_is_named(running: subprocess.Popen[str]) -> None:
    assert running.stdout is not None and running.stdout.readline()
    ranks = children_of(running.pid)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(max(ranks), signal.SIGKILL)
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert running.returncode == 2
    assert "rank 1 died (signal 9" in errors.splitlines()[-1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_reader_that_goes_away_ends_all(running: subprocess.Popen[str]) -> None:
    assert running.stdout is not None and running.stdout.readline()
    ranks = children_of(running.pid)
    running.stdout.close()
    assert running.stderr is not None
    errors = running.stderr.read()
    assert running.wait(timeout=100) == 141
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(cases: dict[str, Case]) -> None:
    _, words = cases["beam"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fairseq_lite_cli.generate", *words,
             "--distributed-world-size", "2"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, cwd=REPOSITORY,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("error: the output: No space left on device")


def test_an_error_of_one_rank_is_that_of_the_command(cases: dict[str, Case]) -> None:
    command, words = cases["beam"]
    wrong = {"beam": (command, [*words, "--gen-subset", "nix"])}
    with pytest.raises(DataError, match="no split 'nix'"):
        run_distributed(outputs, 2, wrong, timeout=200)
    assert left_running() == []
