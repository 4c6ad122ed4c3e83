"""The table of examples/moe, from logs of which every figure is known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fairseq_lite.errors import DataError
from tests.helpers.commands import REPOSITORY


@pytest.fixture(scope="module")
def table() -> ModuleType:
    path = REPOSITORY / "examples" / "moe" / "table.py"
    spec = importlib.util.spec_from_file_location("moe_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["moe_table"] = module  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    return module


def write_log(path: Path, bleu: dict[int, float], wps: float) -> Path:
    """A log with a line for every 10 updates and a validation for each of `bleu`."""
    lines = []
    for updates in range(10, 41, 10):
        record = {"epoch": 1, "num_updates": str(updates), "wpb": "500", "wps": str(wps)}
        if updates == 10:
            record["wps"] = "1"  # while everything warms up
        lines.append(f"2026 | INFO | train_inner | {json.dumps(record)}")
        if updates in bleu:
            valid = {"epoch": 1 + updates // 30, "valid_num_updates": str(updates)}
            valid |= {"valid_bleu": str(bleu[updates]), "valid_wps": "77", "valid_loss": "3"}
            lines.append(f"2026 | INFO | valid | {json.dumps(valid)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_row(table, tmp_path, capsys):
    dense = write_log(tmp_path / "dense.log", {20: 10.0, 30: 21.0, 40: 25.0}, 1000)
    moe = write_log(tmp_path / "moe.log", {20: 12.0, 30: 20.0, 40: 19.0}, 250)
    scores = []
    for name, score in (("d", 24.5), ("m", 19.5)):
        path = tmp_path / f"{name}.bleu"
        path.write_text(f"BLEU|nrefs:1 = {score} 50.0/…\n", encoding="utf-8")
        scores.append(str(path))
    words = ["--dense", str(dense), "--moe", str(moe), "--experts", "8", "--test", *scores]
    table.main(words)
    assert capsys.readouterr().out.splitlines() == [
        "| Metric | Dense | MoE x8 |",
        "|---|---|---|",
        "| Train ntokens/batch | 500 | 500 |",
        "| Train tokens/sec | 1,000 | 250 |",
        "| Val tokens/sec | 77 | 77 |",
        "| Best valid BLEU | 25.00 | 20.00 |",
        "| Steps to Best | 40 | 30 |",
        "| Epochs to Best | 2 | 2 |",
        "| Comparable Valid BLEU | 21.00 | 20.00 |",
        "| Steps to Comparable | 30 | 30 |",
        "| N Experts | 1 | 8 |",
        "| seconds/update | 0.500 | 2.000 |",
        "| Updates in all | 40 | 40 |",
        "| Test BLEU, best checkpoint | 24.5 | 19.5 |",
    ]


def test_a_log_without_bleu_is_refused(table, tmp_path):
    log = write_log(tmp_path / "dense.log", {}, 1000)
    with pytest.raises(DataError, match="--eval-bleu"):
        table.Run.of(log)
