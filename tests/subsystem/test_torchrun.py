"""Two torchrun agents, on two hosts where the machine allows: restarts and signals lose nothing."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fairseq_lite.training.checkpoint import store
from tests.helpers.hosts import (
    Host,
    Processes,
    free_port,
    loopback,
    may_have_namespaces,
    namespaces,
    wait_until,
)
from tests.helpers.moe import WHOLE_TABLES
from tests.helpers.training import TOTAL, arguments, assert_same_end, train

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

HOSTS = {"loopback": loopback, "namespaces": namespaces}
QUIET = ("--no-epoch-checkpoints", "--disable-validation")
SHARDED = ("--ddp-backend", "fully_sharded", "--min-params-to-wrap", "1", "--use-sharded-state")


def start_agents(
    processes: Processes, hosts: list[Host], words: list[str], *flags: str, **environ: str
) -> None:
    """One agent a host, one rank an agent: what a user types on every machine."""
    endpoint = f"{hosts[0].address}:{free_port()}"
    for number, host in enumerate(hosts):
        # Said, as a host here does not know that the first address is its own: names have none.
        keeps_store = f"--rdzv-conf=is_host={int(number == 0)}"
        processes.start(
            [
                *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}"),
                *("--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"),
                *(
                    keeps_store,
                    f"--local-addr={host.address}",
                    *flags,
                    "-m",
                    "fairseq_lite_cli.train",
                    *words,
                ),
            ],
            host=host,
            **environ,
        )


def updates_saved(folder: Path) -> int:
    """The same in the whole checkpoint, or in each shard."""
    files = list(folder.glob("checkpoint_last*.pt"))
    numbers = {store.load(file)["optimizer_history"][0]["num_updates"] for file in files}
    assert len(numbers) == 1
    return int(numbers.pop())


@pytest.fixture(scope="module")
def undisturbed(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Two ranks that one command started, with these flags, run through once."""

    @functools.cache
    def run(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "checkpoints"
        two = ("--max-update", TOTAL, "--distributed-world-size", 2)
        train(toy_data, folder, *two, *QUIET, *flags)
        return folder

    return run


# In the first attempt only: the mark stays on the disk. All ranks are in the same update.
KILLS_ONE_RANK = '''
"""Ends rank 1, as kill -9 or the system short of memory would, once."""

import os
import signal
from pathlib import Path

from fairseq_lite.training.trainer import Trainer

mark, train_step = Path(os.environ["KILLED"]), Trainer.train_step


def dies_once(self, batches):
    if self.state.num_updates == 17 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, batches)


Trainer.train_step = dies_once
'''


# One file on hosts apart, shards on one. What is between shows nothing new.
PLACES = {"namespaces": ("namespaces", ()), "shards": ("loopback", SHARDED)}
if WHOLE_TABLES or not may_have_namespaces():
    PLACES["loopback"] = ("loopback", ())


@pytest.mark.parametrize(("place", "flags"), PLACES.values(), ids=PLACES)
def test_one_rank_is_killed_all_start_again(
    place: str,
    flags: tuple[str, ...],
    toy_data: Path,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The restart goes on from the last checkpoint and ends with the same bits."""
    plugin = tmp_path / "kills_one_rank"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(KILLS_ONE_RANK)
    folder = tmp_path / "checkpoints"
    words = arguments(toy_data, folder, *QUIET, *flags, "--max-update", TOTAL)
    words += ["--user-dir", str(plugin)]
    words += ["--save-interval-updates", "5", "--keep-interval-updates", "1"]
    with HOSTS[place](2) as hosts, Processes(tmp_path) as processes:
        killed = str(tmp_path / "killed")
        start_agents(processes, hosts, words, "--max-restarts=1", KILLED=killed)
        assert processes.wait(150) == [0, 0], processes.output()
        assert Path(killed).exists()
        assert wait_until(lambda: not processes.alive(), 5)
    log = folder.with_suffix(".log").read_text()
    assert "No existing checkpoint found" in log
    assert "checkpoint_last.pt (epoch 3 @ 15 updates)" in log, "it must not begin anew"
    assert_same_end(folder, undisturbed(*flags))


@pytest.mark.parametrize(
    ("number", "flags"),
    [(signal.SIGTERM, ()), (signal.SIGUSR1, SHARDED)],
    ids=["SIGTERM", "SIGUSR1-shards"],
)
def test_agents_that_are_asked_to_end_save_first(
    number: signal.Signals, flags: tuple[str, ...], toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    words = arguments(toy_data, folder, *QUIET, *flags, "--max-update", 100000)
    with loopback(2) as hosts, Processes(tmp_path) as processes:
        start_agents(processes, hosts, words, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
        log = folder.with_suffix(".log")
        assert wait_until(lambda: log.exists() and '"num_updates": "5"' in log.read_text(), 60)
        for agent in processes.started:
            agent.send_signal(number)
        # torchrun tells by its exit status that it was ended, not how the ranks ended.
        assert 0 not in processes.wait(30)
        assert wait_until(lambda: not processes.alive(), 5)
    said = log.read_text()
    assert "asked to end" in said and "done training" in said
    assert 5 <= updates_saved(folder) < 100000
