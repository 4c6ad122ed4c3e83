"""`--ddp-backend deepspeed_moe`: any ranks at any stage train as one process; bugs are noticed.

Processes take longer to start than to train, so each number of ranks is started once and goes
through all its cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor, nn

from fairseq_lite.parallel.experts import expert_parameters
from fairseq_lite.parallel.local import norm_of
from fairseq_lite.parallel.world import World
from tests.helpers import moe
from tests.helpers.distributed import run_distributed
from tests.helpers.moe import Case, Trained, assert_alike
from tests.helpers.parity import DEALT
from tests.helpers.toy import ADAM

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.timeout(300)

FP16 = ("--fp16", "--fp16-init-scale", "4")
AVERAGE = ("--store-ema", "--ema-decay", "0.9")
DROP = ("--decoder-layerdrop", "0.5")


@dataclass(frozen=True)
class Row:
    """A case, how long it is trained, how close it must come, and a fault put in."""

    case: Case
    updates: int = 3
    tolerance: float = 1e-5
    bug: str = ""

    @property
    def reference(self) -> Row:
        """What one process trains."""
        return replace(self, case=self.case.reference, bug="")


GRID = [Row(Case(experts=e, top=k)) for e, k in itertools.product((2, 4, 8), (1, 2))]
LONG = Row(Case(4), updates=len(DEALT))
SPECIAL = [
    LONG,
    Row(Case(4, training=(*ADAM, *AVERAGE))),
    Row(Case(4, model="lm")),
    Row(Case(4, training=(*ADAM, "--bf16")), tolerance=2e-2),
    Row(Case(4, training=(*ADAM, *FP16)), tolerance=2e-3),
    Row(Case(4, training=(*ADAM, "--fp16", "--fp16-init-scale", str(2**22))), 10, 2e-3),
    Row(Case(4, training=(*moe.TRAINING, "--moe-normalize-expert-grad", "sqrt_world_size"))),
]


def at_stages(rows: Sequence[Row], stages: Sequence[int] = (0, 1, 2)) -> list[Row]:
    """Rows at some stages of ZeRO."""
    return [
        replace(row, case=replace(row.case, backend=f"zero{stage}"))
        for row in rows
        for stage in stages
    ]


# -- backends with one fault each -------------------------------------------------------------


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Trainers made inside have a backend with a fault."""
    from fairseq_lite.parallel.deepspeed_moe import backends

    class Undivided(backends.ZeroSharded):
        """Expert gradients are summed over the ranks, and not divided by their number."""

        def _expert_groups(self, model: nn.Module) -> dict[nn.Parameter, tuple[str, float]]:
            found = super()._expert_groups(model)
            return {p: (name, float(self.world.size)) for p, (name, _) in found.items()}

    class NormOfShared(backends.ZeroSharded):
        """The norm leaves out the experts."""

        def grad_norm(self, model: nn.Module) -> Tensor:
            own = {id(param) for param, _ in expert_parameters(model)}
            parts = [f.tensor for f in self.partition.fragments.values() if id(f.param) not in own]
            grads = [part.grad for part in parts if part.grad is not None]
            square = norm_of(grads, self.world.device).double().square()
            return self.world.all_reduce(square).sqrt().float()

    class GateAsExpert(backends.ZeroSharded):
        """The gate counts as an expert's, so ranks of an exchange group do not share gradients."""

        def _expert_groups(self, model: nn.Module) -> dict[nn.Parameter, tuple[str, float]]:
            found = super()._expert_groups(model)
            for name, param in model.named_parameters():
                if ".gate." in name:
                    (found[param],) = set(found.values())
                    param.allreduce, param.group_name = False, found[param][0]
            return found

    class Ungathered(backends.ZeroSharded):
        """Nobody fetches what other ranks have updated."""

        def adapt_optimizer(self, model: nn.Module, optimizer: Any) -> Any:
            with patch.object(self.partition, "gather", lambda: None):
                return super().adapt_optimizer(model, optimizer)

    faulty = {kind.__name__: kind for kind in (Undivided, NormOfShared, GateAsExpert, Ungathered)}
    with patch.object(backends, "ZeroSharded", faulty[bug]):
        yield


BUGS = ("Undivided", "NormOfShared", "GateAsExpert", "Ungathered")


# -- running ----------------------------------------------------------------------------------


def train_all(world: World, data: Path, lm_data: Path, rows: Sequence[Row]) -> list[Trained]:
    done = []
    for row in rows:
        with planted(row.bug) if row.bug else nullcontext():
            folder = lm_data if row.case.model == "lm" else data
            done.append(moe.train(world, folder, row.case.flags, updates=row.updates))
    world.close()
    return done


Ran = Callable[[int], dict[Row, list[Trained]]]


def rows_of(ranks: int) -> list[Row]:
    if ranks == 0:
        return [*GRID, *SPECIAL]
    if ranks == 2:
        bugs = [replace(row, bug=bug) for bug in BUGS for row in at_stages([LONG], (1, 2))]
        return [*at_stages([*GRID, *SPECIAL]), *bugs]
    return at_stages(GRID if ranks == 4 else [GRID[2], *SPECIAL[:2]])


@pytest.fixture(scope="module")
def ran(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Ranks -> row -> what each rank saw; 0 ranks are one process on legacy_ddp."""
    lm_data = moe.make_lm_data(tmp_path_factory.mktemp("lm"))
    done: dict[int, dict[Row, list[Trained]]] = {}

    def run(ranks: int) -> dict[Row, list[Trained]]:
        if ranks not in done:
            rows = rows_of(ranks)
            found = run_distributed(
                train_all, max(1, ranks), toy_data, lm_data, rows, timeout=240.0
            )
            done[ranks] = {row: list(each) for row, *each in zip(rows, *found, strict=True)}
        return done[ranks]

    return run


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_train_as_one_process(ran: Ran, ranks: int) -> None:
    references, found = ran(0), ran(ranks)
    for row in rows_of(ranks):
        if not row.bug:
            (one,) = references[row.reference]
            try:
                assert_alike(one, found[row], tolerance=row.tolerance)
            except AssertionError as e:
                raise AssertionError(f"{row.case} {row.case.training}: {e}") from e
            assert all(rank.scales == one.scales for rank in found[row]), row.case


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_bugs_are_noticed(ran: Ran, bug: str, stage: str) -> None:
    (one,) = ran(0)[LONG]
    row = replace(LONG, case=replace(LONG.case, backend=stage), bug=bug)
    with pytest.raises(AssertionError):
        assert_alike(one, ran(2)[row])
