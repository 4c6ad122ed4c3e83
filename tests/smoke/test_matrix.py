"""The command lines on the CPU: each row sets up, trains, saves, tears down, resumes, generates."""

from __future__ import annotations

import pytest

from fairseq_lite.parallel.api import Machine
from tests.smoke.drive import drive
from tests.smoke.matrix import FEATURES, PRECISIONS, UPDATE_FREQS, WORLD_SIZES, left_out, rows

CPU = Machine(cuda_devices=0)
TABLE = [(row, left_out(row, CPU)) for row in rows("cpu")]


@pytest.mark.parametrize("row", [row for row, reason in TABLE if reason is None], ids=str)
def test_row(row, toy_data, tmp_path, capfd):
    drive(row, toy_data, tmp_path / "checkpoints", capfd)


def test_only_fp16_is_left_out():
    reasons = {(row.precision, reason) for row, reason in TABLE if reason is not None}
    assert {precision for precision, _ in reasons} == {"fp16"}
    assert all("--fp16 needs a GPU" in reason for _, reason in reasons)


def test_every_value_of_every_axis_is_run():
    run = [row for row, reason in TABLE if reason is None]
    assert {row.world_size for row in run} == set(WORLD_SIZES)
    assert {row.precision for row in run} == set(PRECISIONS) - {"fp16"}
    assert {row.update_freq for row in run} == set(UPDATE_FREQS)
    assert {row.feature for row in run} == set(FEATURES)
