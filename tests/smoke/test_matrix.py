"""The command lines on the CPU: each row sets up, trains, saves, tears down, resumes, generates."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from fairseq_lite.parallel.api import Machine
from tests.helpers.warm import cold_ranks
from tests.smoke.drive import drive
from tests.smoke.matrix import (
    FEATURES,
    PRECISIONS,
    UPDATE_FREQS,
    WORLD_SIZES,
    Row,
    backends,
    left_out,
    rows,
    spared,
)

CPU = Machine(cuda_devices=0)
TABLE = [(row, left_out(row, CPU) or spared(row)) for row in rows("cpu")]


@pytest.mark.parametrize("row", [row for row, reason in TABLE if reason is None], ids=str)
def test_row(row, toy_data, tmp_path, capfd):
    as_users_do = row == Row(row.backend, 2)  # one of each backend, from nothing
    with cold_ranks() if as_users_do else nullcontext():
        drive(row, toy_data, tmp_path / "checkpoints", capfd)


def test_what_cannot_run_says_why():
    reasons = {
        (row.backend, row.feature): reason for row in rows("cpu") if (reason := left_out(row, CPU))
    }
    # Without the package another line, with the same way out.
    assert reasons.pop(("fully_sharded", "fairscale")).endswith("use --fsdp-engine torch")
    assert "--zero-stage belongs to --ddp-backend" in reasons.pop(("fully_sharded", "zero"))
    assert {key: reason for key, reason in reasons.items() if key[0] == "fully_sharded"} == {
        ("fully_sharded", "adafactor"): (
            "--optimizer adafactor looks at whole parameters, and --ddp-backend fully_sharded "
            "spreads them over 2 ranks: use --optimizer adam, or --ddp-backend legacy_ddp"
        ),
    }
    assert {feature for backend, feature in reasons if backend == "legacy_ddp"} == {
        "fairscale",
        "offload",
        "shards",
        "zero",
    }
    assert (
        "--cpu-offload belongs to --ddp-backend fully_sharded" in reasons["legacy_ddp", "offload"]
    )


@pytest.mark.parametrize("backend", backends())
def test_every_value_of_every_axis_is_run(backend):
    if backend == "deepspeed_moe":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    run = [row for row, reason in TABLE if reason is None and row.backend == backend]
    others = set() if backend == "fully_sharded" else {"offload", "shards"}
    others |= set() if backend == "deepspeed_moe" else {"zero"}
    for size in WORLD_SIZES:
        of_size = [row for row in run if row.world_size == size]
        assert {row.precision for row in of_size} >= set(PRECISIONS) - {"amp"}
        assert {row.update_freq for row in of_size} == set(UPDATE_FREQS)
    assert {row.feature for row in run} == set(FEATURES) - {"fairscale"} - others
