"""hub.load(): one checkpoint file, moved away from its data, translates raw text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fairseq_lite import hub
from fairseq_lite.errors import CheckpointError, ConfigError
from tests.helpers.commands import flite
from tests.helpers.toy import ADAM, TINY_MODEL


@pytest.fixture(scope="module")
def moved(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    words = [*TINY_MODEL, *ADAM, "--max-tokens", 400, "--max-update", 30, "--cpu"]
    words.append("--disable-validation")
    assert flite("train", toy_data, *words, "--save-dir", folder / "run") == 0
    (folder / "elsewhere").mkdir()
    return Path(shutil.move(folder / "run" / "checkpoint_last.pt", folder / "elsewhere" / "m.pt"))


def test_one_file_is_enough(moved: Path, toy_data: Path, tmp_path: Path, capsys):
    translator = hub.load(moved, device="cpu")
    lines = ["a b c", "", "b a"]
    single = [translator.translate(line, max_len_b=8) for line in lines]
    assert translator.translate(lines, max_len_b=8) == single  # batches do not change a result

    (tmp_path / "input").write_text("\n".join(lines) + "\n")
    words = [toy_data, "--path", moved, "--max-len-b", 8, "--input", tmp_path / "input", "--cpu"]
    assert flite("interactive", *words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [row.split("\t")[2] for row in printed if row.startswith("D-")] == single


def test_records_hold_scores_and_nbest(moved: Path):
    (record,) = hub.load(moved, device="cpu").records(["a b"], beam=3, nbest=3, max_len_b=8)
    scores = [output.score for output in record.outputs]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_errors_are_one_line(moved: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds neither checkpoint_best.pt"):
        hub.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        hub.load(tmp_path / "none.pt")
    with pytest.raises(ConfigError, match="unknown option 'beams'"):
        hub.load(moved, device="cpu").translate("a", beams=3)
    with pytest.raises(ConfigError, match="retain_dropout is for flite-generate"):
        hub.load(moved, device="cpu").translate("a", retain_dropout=True)
    with pytest.raises(ConfigError, match="expected 'cpu' or 'cuda'"):
        hub.load(moved, device="tpu")
