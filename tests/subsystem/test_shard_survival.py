"""One rank killed in the middle of a sharded save: a checkpoint is left that loads.

Most deaths are played: one helper process forks a child for each case, in which threads stand for
ranks; the child ends with SIGKILL at the chosen point. The last one is that of a real rank.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fairseq_lite.errors import DistributedError
from fairseq_lite.parallel.world import World
from fairseq_lite.training.checkpoint import parts, store
from tests.helpers.commands import REPOSITORY
from tests.helpers.distributed import run_distributed
from tests.helpers.sharded import Training, digests

pytestmark = pytest.mark.timeout(300)

# argv: the folder, then the cases "BEFORE AFTER POINT RANK [NUMBER]": what was there (ranks; 0 for
# one whole file; e2 for parts of four experts, written by two), what is being written, and where
# which rank dies.
SCRIPT = textwrap.dedent(
    """
    import os, signal, sys, threading, time
    from pathlib import Path
    import torch
    from fairseq_lite.config.core import CheckpointConfig
    from fairseq_lite.errors import CheckpointError
    from fairseq_lite.parallel.api import MAIN_PART, Part
    from fairseq_lite.parallel.experts import ExpertLayout
    from fairseq_lite.parallel.shards.experts import Member, Spread
    from fairseq_lite.parallel.shards.parted import whole_parts
    from fairseq_lite.parallel.shards.pieces import to_part
    from fairseq_lite.parallel.shards.sets import shard_name
    from fairseq_lite.parallel.shards.spans import Holding, Span, whole_span
    from fairseq_lite.training.checkpoint import parts, store
    from fairseq_lite.training.checkpoint.writing import CheckpointWriter, Job
    from tests.helpers.sharded import MOMENT, content

    SIZE = 42_000
    NAMES = ["checkpoint_best.pt", "checkpoint_last.pt"]
    me = threading.local()
    plan = None

    class Rank:  # what the writer asks of a world
        def __init__(self, rank, size, gather):
            self.rank, self.size, self.is_main = rank, size, rank == 0
            self.gather_objects = gather

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_here(point, number=0):
        return plan and plan[:2] == (point, me.rank) and number == plan[2]

    commit, write = store.commit, store._Recorder.write

    def dying_commit(path):
        number = NAMES.index(parts.whole_name(path).name)
        if dying_here("before-rename", number):
            time.sleep(0.1)  # the others rename theirs
            die()
        commit(path)
        if dying_here("after-rename", number):
            die()

    def dying_write(self, data):
        done = write(self, data)
        if dying_here("byte", plan[2] if plan and self._file.tell() > plan[2] else None):
            self._file.flush()
            die()
        return done

    def part_of(world, kind, value):
        rank, w = world.rank, torch.full((SIZE,), float(value))
        if kind[0] == "e":
            layout = ExpertLayout.of(4, int(kind[1:]))
            own = layout.owned(layout.place(rank))
            members = {f"m.{e}.w": Member("m", e, "w") for e in own}
            held = {"w": whole_span(w), **{name: whole_span(w.clone()) for name in members}}
            return whole_parts(world, Holding(held), Spread(layout, members))
        size = int(kind)
        if size == 0:
            return {MAIN_PART: Part({"w": w}, manifest={"world_size": 1})} if rank == 0 else {}
        each = SIZE // size
        span = Span((SIZE,), rank * each, w[rank * each : (rank + 1) * each])
        manifest = {"world_size": size, "shard": rank}
        return {shard_name(rank): to_part(Holding({"w": span}), manifest)}

    def save(folder, kind, value):
        ranks = max(int(kind.lstrip("e")), 2)  # a whole file is written by one of two
        barrier, box = threading.Barrier(ranks), [None] * ranks

        def gather(obj):
            box[me.rank] = obj
            barrier.wait()
            everything = list(box)
            barrier.wait()
            return everything

        def run(rank):
            me.rank = rank
            cfg = CheckpointConfig(save_dir=str(folder))
            world = Rank(rank, ranks, gather)
            writer = CheckpointWriter(cfg, world)
            own = part_of(world, kind, value)
            states = {name: content(part, f"save{value}") for name, part in own.items()}
            writer.submit(Job(list(NAMES), MOMENT, states))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def value_of(path):
        model = parts.whole_state(path)["model"]
        first = model["w"][0]
        assert all(w.numel() == SIZE and bool((w == first).all()) for w in model.values())
        return int(first)

    folder = Path(sys.argv[1])
    store.commit, store._Recorder.write = dying_commit, dying_write
    for number, case in enumerate(sys.argv[2:], start=1):
        before, after, point, rank, *at = case.split()
        place = folder / str(number)
        place.mkdir()
        save(place, before, 0)
        files = sorted(p.name for p in place.iterdir())
        pid = os.fork()
        if pid == 0:
            plan = (point, int(rank), int(at[0]) if at else 0)
            save(place, after, 1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (case, status)
        found = [value_of(place / name) for name in NAMES]
        parts.finish_renaming(place)
        assert [value_of(place / name) for name in NAMES] == found, case
        assert not list(place.glob("*.tmp")), case
        print(*found, flush=True)
        save(place, after, 2)
        assert [value_of(place / name) for name in NAMES] == [2, 2], case
        if before == after:
            assert sorted(p.name for p in place.iterdir()) == files, case
    """
)


WHERE = ("before", "after")


def survive(folder: Path, *cases: str) -> list[list[int]]:
    """Play the cases; returns for each which save the two names of the checkpoint hold."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *cases],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def test_before_all_have_written_the_old_one_loads(tmp_path: Path) -> None:
    cases = [f"2 2 byte {rank} {at}" for rank in (0, 1) for at in (0, 1000, 50_000, 80_000)]
    cases += ["3 3 byte 2 9", "4 2 byte 1 9", "2 4 byte 3 9", "0 2 byte 1 9", "2 0 byte 0 9"]
    assert survive(tmp_path, *cases) == [[0, 0]] * len(cases)


def test_after_all_have_written_a_kill_loses_nothing(tmp_path: Path) -> None:
    """The second number: at which of the two names; until then the first one is complete."""
    same = ("before-rename 0", "before-rename 1", "after-rename 0", "after-rename 1")
    others = ("4 4 before-rename 2", "4 2 before-rename 1", "4 2 after-rename 0")
    more = ("2 4 before-rename 3", "2 2 before-rename 1 1", "2 4 before-rename 0 1")
    survived = survive(
        tmp_path, *(f"2 2 {point}" for point in same), *others, *more, "4 2 after-rename 1 1"
    )
    assert all(first == 1 for first, _ in survived[:4]), survived
    assert survived[4:8] == [[1, 0]] * 4
    assert survived[8:] == [[1, 1]] * 3


def test_from_one_file_to_shards_and_back(tmp_path: Path) -> None:
    """Both may be there for a moment; the file comes first, and is one of the two saves."""
    cases = [
        "0 2 before-rename 1",
        "0 2 after-rename 0",
        "2 0 before-rename 0",
        "2 0 after-rename 0",
    ]
    assert survive(tmp_path, *cases) == [[0, 0], [0, 0], [0, 0], [1, 0]]


def test_parts_of_experts_are_of_one_save(tmp_path: Path) -> None:
    """The old ones until all ranks have written theirs, then the new ones; never of both."""
    early = ["e2 e2 byte 0 9", "e2 e2 byte 1 80000", "2 e2 byte 1 9", "e2 2 byte 0 9"]
    early += ["e4 e2 byte 1 9", "0 e4 byte 3 9"]
    late = [
        f"{before} e2 {at}-rename {rank}"
        for before in ("e2", "e4")
        for at in WHERE
        for rank in "01"
    ]
    across = ["2 e2 before-rename 1", "2 e2 after-rename 0", "e2 2 before-rename 1"]
    again = ["e2 e2 after-rename 1 1", "e4 e2 before-rename 0 1", "2 e2 after-rename 0 1"]
    survived = survive(tmp_path, *early, *late, *across, *again)
    assert survived[: len(early)] == [[0, 0]] * len(early)
    del survived[: len(early)]
    assert survived[: len(late)] == [[1, 0]] * len(late)
    # Where parts and shards are both there for a moment, parts come first.
    assert survived[len(late) :] == [[0, 0]] * 3 + [[1, 1], [1, 1], [1, 0]]


def save_and_die(world: World, folder: Path) -> None:
    training = Training(world, spread=True)
    training.update(1)
    training.save(folder / "x.pt", sharded=True, mark="first")
    if world.rank == 1:
        store.commit = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    training.update(2)
    training.save(folder / "x.pt", sharded=True, mark="second")


def go_on(world: World, folder: Path) -> None:
    training = Training(world, spread=True, seed=77)
    training.load(folder / "x.pt")
    training.save(folder / "again.pt", sharded=True)


def test_a_rank_killed_before_it_renames(tmp_path: Path) -> None:
    with pytest.raises(DistributedError, match="rank 1"):
        run_distributed(save_and_die, 2, tmp_path, timeout=120, heartbeat=60)
    marks = {
        part: parts.own(store.load(path))["manifest"]["save"]
        for part, path in parts.part_files(tmp_path / "x.pt").items()
    }
    assert marks["shard1"] == "first"
    expected = digests(tmp_path / "x.pt")  # which reads the temporary file, if rank 0 has renamed
    run_distributed(go_on, 1, tmp_path)
    assert digests(tmp_path / "again.pt") == expected
    steps = [text for key, text in expected.items() if key.endswith(".step")]
    assert set(steps) == ({"2"} if marks["shard0"] == "second" else {"1"})
