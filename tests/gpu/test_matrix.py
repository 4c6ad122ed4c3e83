"""The rows of the smoke tier on CUDA; a row that cannot run on this machine says why."""

from __future__ import annotations

import pytest
import torch

from fairseq_lite.parallel.api import Machine
from tests.smoke.drive import drive
from tests.smoke.matrix import left_out, rows

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)


@pytest.mark.parametrize("row", rows("cuda"), ids=str)
def test_row(row, toy_data, tmp_path, capfd):
    reason = left_out(row, Machine(cuda_devices=torch.cuda.device_count()))
    if reason is not None:
        pytest.skip(reason)
    drive(row, toy_data, tmp_path / "checkpoints", capfd)
