"""Curves are read from logs as flite-train writes them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fairseq_lite.errors import DataError
from tests.helpers.commands import REPOSITORY

LOG = """\
2026-01-01 00:00:00 | INFO | fairseq_lite.training.run | {"common": {"seed": 1}}
2026-01-01 00:00:01 | INFO | train_inner | {"epoch": 1, "loss": "9.5", "ppl": "724.08", "num_updates": "10"}
2026-01-01 00:00:02 | INFO | train_inner | {"epoch": 1, "loss": "8", "ppl": "256", "num_updates": "20"}
2026-01-01 00:00:03 | INFO | valid | {"epoch": 1, "valid_loss": "7", "valid_ppl": "128", "valid_num_updates": "20"}
2026-01-01 00:00:03 | INFO | valid1 | {"epoch": 1, "valid1_loss": "6", "valid1_ppl": "64", "valid1_num_updates": "20"}
2026-01-01 00:00:04 | INFO | train | {"epoch": 1, "train_loss": "8.75", "train_ppl": "430", "train_num_updates": "20"}
2026-01-01 00:00:05 | INFO | train_inner | {"epoch": 2, "loss": "7", "ppl": "inf", "num_updates": "30"}
{"epoch": 2, "loss": "7.5", "ppl": "181", "num_updates": "30"}
2026-01-01 00:00:06 | INFO | train_inner | {"epoch": 2, "loss": "7", "num_upd
"""  # noqa: E501


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_log", REPOSITORY / "scripts/plot_log.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plot_log"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_records_are_found(script: ModuleType) -> None:
    log = script.read(LOG.splitlines())
    assert {u: r["loss"] for u, r in log.inner.items()} == {10: 9.5, 20: 8.0, 30: 7.5}
    assert log.inner[30]["ppl"] == 181.0, "what was logged again after a restart counts"
    assert log.epochs[20]["loss"] == 8.75
    assert {name: r[20]["ppl"] for name, r in log.valid.items()} == {"valid": 128, "valid1": 64}


def test_table(script: ModuleType) -> None:
    lines = script.table(script.read(LOG.splitlines())).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 8
    assert lines[2:] == ["| 1 | 20 | 8.75 | 7.00 | 128.00 | 6.00 | 64.00 |"]


def test_a_file_without_records_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("epoch 001: 10 / 20 loss=3\n")
    with pytest.raises(DataError, match="--log-format json"):
        script.main([str(tmp_path / "x.log")])


def test_a_picture(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log, out = tmp_path / "a.log", tmp_path / "curve.png"
    log.write_text(LOG)
    script.main([str(log), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="bleu"):
        script.main([str(log), "--key", "bleu", "--out", str(out)])
