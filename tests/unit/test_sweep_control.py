"""A sweep from its command line to its table, with a script in place of flite-train."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fairseq_lite.errors import ConfigError, DataError
from tests.helpers.sweeps import attempt, control, grid, hyperparam, results, state

State = state.State

# Takes flite-train's flags; fails where --lr is 3 and no file `mended` is beside the runs.
TRAINER = r"""
while [ $# -gt 0 ]; do
    case $1 in
        --save-dir) dir=$2 ;;
        --lr) lr=$2 ;;
        --max-update) max=$2 ;;
    esac
    shift
done
echo started >>"$dir/starts"
echo "UserWarning: that is no failure" >&2
echo "x | train_inner | {\"epoch\": 1, \"loss\": \"5\", \"wps\": \"90\", \"num_updates\": \"1\"}"
echo "x | train_inner | {\"epoch\": 1, \"loss\": \"4\", \"wps\": \"100\", \"num_updates\": \"2\"}"
echo "x | train_inner | {\"epoch\": 1, \"loss\": \"3\", \"wps\": \"500\", \"num_updates\": \"3\"}"
if [ "$lr" = 3 ] && [ ! -e "$dir/../mended" ]; then
    echo "trainer: error: the rate is too high" >&2
    exit 2
fi
for n in 3 4; do
    echo "x | valid | {\"epoch\": 1, \"valid_loss\": \"$lr.$n\", \"valid_ppl\": \"9.5\"," \
        "\"valid_num_updates\": \"$n\"}"
done
echo "x | train | {\"epoch\": 1, \"train_loss\": \"2.5\", \"train_num_updates\": \"4\"}"
echo "x | INFO | run | done training in 1.0 seconds"
"""


def get_grid(args):
    return [
        hyperparam("--lr", [1, 2, 3], save_dir_key=lambda v: f"lr{v}"),
        hyperparam("--max-update", args.mu),
    ]


def add_options(parser):
    parser.add_argument("--mu", type=int, default=4)


class Sweep:
    """A sweep in a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out = folder / "out"
        self._trainer = folder / "trainer.sh"
        self._trainer.write_text(TRAINER)
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0, prepare=None) -> list[str]:
        """Execute it; returns the lines it printed."""
        fixed = ["-p", "s", "-g", "1", "-t", "-1", "--local", "--checkpoints-dir", str(self.out)]
        fixed += ["--python", "sh", "--script", str(self._trainer)]
        got = 0
        try:
            control.conduct([*fixed, *words], get_grid, None, add_options, prepare, None)
        except SystemExit as e:
            got = e.code
        assert got == status
        return self._capsys.readouterr().out.splitlines()

    def folder(self, lr: int) -> Path:
        return self.out / f"s.lr{lr}.ngpu1"

    def starts(self) -> dict[int, int]:
        files = {lr: self.folder(lr) / "starts" for lr in (1, 2, 3)}
        return {lr: len(f.read_text().splitlines()) for lr, f in files.items() if f.exists()}


@pytest.fixture
def sweep(tmp_path, capsys) -> Sweep:
    return Sweep(tmp_path, capsys)


def test_the_others_go_on_when_one_fails(sweep):
    printed = sweep(status=1)
    assert sweep.starts() == {1: 1, 2: 1, 3: 1}
    (failed,) = [line for line in printed if "failed:" in line]
    assert failed.endswith("s.lr3.ngpu1: failed: trainer: error: the rate is too high")
    finished = [line.split("] ")[1] for line in printed if "finished in" in line]
    assert sorted(line.split(" in ")[0] for line in finished) == [
        "s.lr1.ngpu1: finished",
        "s.lr2.ngpu1: finished",
    ]
    assert all("4 updates, best valid loss" in line and "(ppl 9.50)" in line for line in finished)


def test_the_table(sweep):
    printed = sweep(status=1)
    rows = [line.split() for line in printed[printed.index("") + 1 : -1]]
    assert rows[0] == [
        *("run", "state", "updates", "valid_loss", "valid_ppl"),
        *("train_loss", "tokens_per_second", "seconds"),
    ]
    found = {row[0]: row[1:-1] for row in rows[1:]}
    assert found == {
        "s.lr1.ngpu1": ["finished", "4", "1.300", "9.50", "2.500", "100"],
        "s.lr2.ngpu1": ["finished", "4", "2.300", "9.50", "2.500", "100"],
        "s.lr3.ngpu1": ["failed", "3", "–", "–", "3.000", "100"],
    }
    lines = (sweep.out / "s.sweep_results.tsv").read_text().splitlines()
    table = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    (failed,) = [row for row in table if row["state"] == "failed"]
    assert failed["error"] == "trainer: error: the rate is too high"
    assert failed["valid_loss"] == failed["valid_bleu"] == ""
    assert {row["valid_loss"] for row in table} == {"1.3", "2.3", ""}


def test_what_finished_is_skipped_and_what_failed_waits_for_a_flag(sweep):
    sweep(status=1)
    printed = sweep(status=1)
    assert sweep.starts() == {1: 1, 2: 1, 3: 1}
    assert sum("skipped, as it has finished" in line for line in printed) == 2
    assert any("(--resume-failed goes on): trainer: error" in line for line in printed)
    (sweep.out / "mended").touch()
    sweep("--resume-failed")
    assert sweep.starts() == {1: 1, 2: 1, 3: 2}
    record = json.loads((sweep.folder(3) / state.RECORD).read_text())
    assert (record["state"], record["attempt"], record["error"]) == ("finished", 2, "")


def test_finished_runs_start_once_more_when_asked(sweep):
    (sweep.out / "x").mkdir(parents=True)
    (sweep.out / "mended").touch()
    sweep()
    printed = sweep("--resume-finished", "--mu", "9")
    assert sweep.starts() == {1: 2, 2: 2, 3: 2}
    assert sum("--max-update was 4 and is 9" in line for line in printed) == 3


def test_a_dry_run_does_nothing(sweep):
    prepared = []
    printed = sweep("--dry-run", prepare=prepared.append)
    assert not sweep.out.exists() and not prepared
    commands = [line for line in printed if line.startswith("    sh ")]
    assert len(commands) == 3
    assert all("--save-dir" in line and "--log-format json" in line for line in commands)
    sweep(status=1, prepare=prepared.append)
    before = sorted(sweep.out.rglob("*"))
    printed = sweep("--dry-run")
    assert sorted(sweep.out.rglob("*")) == before
    assert sweep.starts() == {1: 1, 2: 1, 3: 1}
    assert any("lr3.ngpu1  failed" in line for line in printed), "it shows how things stand"
    assert len(prepared) == 1


def test_a_run_in_progress_is_not_started_twice(sweep):
    folder = sweep.folder(2)
    folder.mkdir(parents=True)
    record = state.Record(State.RUNNING, **state.this_process())
    state.store(folder, record)
    printed = sweep(status=1)
    assert sweep.starts() == {1: 1, 3: 1}
    (line,) = [line for line in printed if "skipped, as it is running" in line]
    assert f"(process {os.getpid()})" in line
    assert state.load(folder) == record


def test_two_sweeps_in_one_moment_start_each_run_once(sweep, capsys):
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                sweep(status=1)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert sweep.starts() == {1: 1, 2: 1, 3: 1}


def test_a_run_is_its_sweeps_until_it_is_written_how_it_ended(sweep, monkeypatch):
    seen = []
    judge = attempt.Attempt._judge

    def slowly(self: attempt.Attempt, code: int) -> state.Record:
        seen.append(state.state_of(self.run.save_dir)[0])
        return judge(self, code)

    monkeypatch.setattr(attempt.Attempt, "_judge", slowly)
    sweep(status=1)
    assert seen == [State.RUNNING] * 3


def test_a_sweep_that_was_killed_goes_on(sweep):
    (sweep.out / "x").mkdir(parents=True)
    (sweep.out / "mended").touch()
    pid = os.fork()
    if pid == 0:
        try:
            sweep._trainer.write_text("exec sleep 90")
            sweep()
        finally:
            os._exit(0)
    folders = [sweep.folder(lr) for lr in (1, 2, 3)]

    def begun() -> list[Path]:
        records = {folder: state.load(folder) for folder in folders}
        return [folder for folder, record in records.items() if record and record.pid != pid]

    while not begun():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    (folder,) = begun()
    record = state.load(folder)
    assert record is not None and state.state_of(folder)[0] is State.RUNNING, "its child lives"
    os.kill(record.pid, signal.SIGKILL)
    while state.is_alive(record):
        time.sleep(0.01)
    assert state.state_of(folder)[0] is State.INTERRUPTED
    sweep._trainer.write_text(TRAINER)
    printed = sweep()
    assert sum("starts where it was interrupted" in line for line in printed) == 1
    assert sweep.starts() == {1: 1, 2: 1, 3: 1}


def test_steps_follow_though_the_sweep_was_killed_before(sweep):
    (sweep.out / "x").mkdir(parents=True)
    (sweep.out / "mended").touch()
    pid = os.fork()
    if pid == 0:
        try:
            sweep("--post-steps", "kill -9 $PPID")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert sum(sweep.starts().values()) == 1, "the first run has trained"
    sweep("--post-steps", "touch {job_dir}/after")
    assert all((sweep.folder(lr) / "after").exists() for lr in (1, 2, 3))


def test_a_folder_that_cannot_be_made_is_told_in_one_line(sweep):
    sweep.out.write_text("a file")
    with pytest.raises(DataError, match="--checkpoints-dir: cannot write to .*: Not a directory"):
        sweep()


@pytest.fixture
def nothing_called_by_the_collector() -> Iterator[None]:
    """Of hypothesis' function, which would swallow what a signal's handler raises inside it."""
    kept = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = kept


@pytest.mark.usefixtures("nothing_called_by_the_collector")
@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("HUP", 129)])
def test_an_order_to_end_ends_the_sweep(sweep, name, status):
    def terminate(number: int, frame: object) -> None:  # as run_command does
        raise SystemExit(143)

    sweep._trainer.write_text(f"kill -{name} $PPID; sleep 90")
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        sweep(status=status)
    finally:
        signal.signal(signal.SIGTERM, before)
    found = [state.state_of(sweep.folder(lr))[0] for lr in (1, 2, 3)]
    assert sorted(how_far.value for how_far in found) == ["interrupted", "new", "new"]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_slurms_flags_have_no_part_in_a_local_sweep(sweep):
    assert sweep("--partition", "a", "--dry-run")[0] == (
        "--local: no part in it have --partition, which are Slurm's"
    )


def test_several_grids(sweep, monkeypatch, tmp_path):
    grids = {"a": get_grid, "b": lambda args: [hyperparam("--lr", 7, save_dir_key=str)]}
    words = ["-p", "s", "-g", "1", "-t", "-1", "--local", "--dry-run", "--script", "x", "--grid"]
    control.conduct([*words, "b"], grids, None, None, None, None)
    assert "s.7.ngpu1" in sweep._capsys.readouterr().out
    with pytest.raises(ConfigError, match="--grid c: expected one of a, b"):
        control.conduct([*words, "c"], grids, None, None, None, None)
    with pytest.raises(ConfigError, match="--grid a: this script has one grid"):
        control.conduct([*words, "a"], get_grid, None, add_options, None, None)


def test_flags_that_flite_train_has_not_are_found_before_anything_starts(tmp_path):
    def wrong(args):
        names = ["--dropuot", "--dropout"]
        return [
            hyperparam("--arch", "transformer_lm_gpt"),
            hyperparam("--task", "language_modeling"),
            hyperparam("--optimizer", "adam"),
            *(hyperparam(name, [0.1], save_dir_key=str) for name in names),
        ]

    out = tmp_path / "out"
    words = ["-p", "s", "-g", "1", "-t", "-1", "--local", "--checkpoints-dir", str(out), "-d", "x"]
    with pytest.raises(ConfigError, match="s.0.1.0.1.ngpu1: unknown flag --dropuot.*nothing was"):
        control.conduct(words, wrong, None, None, None, None)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"--max-update": 9, "--lr-scheduler": "cosine", "--warmup-updates": 9}, "--max-update"),
        ({"--lr-scheduler": "polynomial_decay"}, "--total-num-update"),
        ({"--max-update": 9, "--batch-size": None}, "the size of a batch is missing"),
    ],
)
def test_what_cannot_train_is_found_before_anything_starts(flags, line):
    def run_of(**more):
        words = ["data", "--task", "language_modeling", "--arch", "transformer_lm_gpt"]
        given = {"--optimizer": "adam", "--lr": 1, "--batch-size": 2, **more}
        for name, value in given.items():
            words += [] if value is None else [name, str(value)]
        return grid.Run("x", Path("x"), ("p",), tuple(words))

    with pytest.raises(ConfigError, match=f"^x: .*{line}.*; nothing was started$"):
        control.check([run_of(**flags)], here=True)
    if "--batch-size" in flags:  # what the machine that trains is asked
        assert len(control.check([run_of(**flags)])) == 1
    assert len(control.check([run_of(), run_of(**{"--max-update": 9})], here=True)) == 2


def test_what_a_plugin_brings_is_not_looked_at_before():
    control.check([grid.Run("x", Path("x"), ("p",), ("data", "--user-dir", "u", "--odd", "1"))])


def test_speeds_and_losses_of_a_log_without_validation():
    assert results.values_of(results.Log()) == {}
    log = results.Log(
        inner={5: {"loss": 3.0, "wps": 7.0}}, valid={"valid": {5: {"loss": float("nan")}}}
    )
    assert results.values_of(log) == {"updates": 5, "train_loss": 3.0, "tokens_per_second": 7.0}
    row = results.Result("x", State.FINISHED, results.values_of(log))
    assert results.summary(row) == "5 updates, train loss 3.000"
