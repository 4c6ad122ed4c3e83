"""The sample plugin works from a copy outside the repository, in one process and in two."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY, flite_process

SAMPLE = REPOSITORY / "examples" / "plugin"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The plugin under another name, in a folder that is on no path."""
    return Path(shutil.copytree(SAMPLE, tmp_path / "my extension", ignore=_caches))


def _caches(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_trains_and_generates_from_a_copy(copy, toy_data, tmp_path, world_size):
    plugin = ["--user-dir", copy, "--task", "noisy_translation", "--cpu"]
    save = tmp_path / "checkpoints"
    training = flite_process(
        *("train", toy_data, *plugin, "--word-noise", "0.2"),
        *("--arch", "attentive_gru", "--hidden-size", "16"),
        *("--criterion", "focal_loss", "--focal-gamma", "1.5"),
        *("--optimizer", "adam", "--lr", "1e-2", "--batch-size", "16", "--max-update", "4"),
        *("--distributed-world-size", world_size, "--num-workers", "1"),
        *("--save-dir", save, "--log-format", "simple", "--log-interval", "1"),
    )
    assert training.returncode == 0, training.stderr
    assert "nll_loss" in training.stdout
    generated = flite_process(
        "generate", toy_data, *plugin, "--path", save / "checkpoint_last.pt", "--max-len-b", 10
    )
    assert generated.returncode == 0, generated.stderr
    assert sum(line.startswith("H-") for line in generated.stdout.splitlines()) == 20


@pytest.mark.parametrize("module", ["attentive_gru", "focal_loss", "noisy_translation"])
def test_each_part_is_short(module):
    lines = (SAMPLE / f"{module}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40


def test_two_copies_that_register_the_same_name_are_refused_in_one_line(copy, toy_data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "__init__.py").write_text(
        "from fairseq_lite.criteria.api import CRITERIA, Criterion\n"
        "@CRITERIA.register('cross_entropy')\n"
        "class Mine(Criterion):\n    pass\n",
        encoding="utf-8",
    )
    refused = flite_process(
        *("train", toy_data, "--user-dir", other, "--arch", "transformer_tiny"),
        *("--optimizer", "adam", "--batch-size", "8"),
    )
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cross_entropy" in refused.stderr
    assert "already registered" in refused.stderr


def test_a_criterion_of_an_absent_plugin_asks_for_its_user_dir(copy, toy_data, tmp_path):
    save = tmp_path / "checkpoints"
    trained = flite_process(
        *("train", toy_data, "--user-dir", copy, "--criterion", "focal_loss", "--cpu"),
        *("--arch", "transformer_tiny", "--optimizer", "adam", "--lr", "1e-3"),
        *("--batch-size", "16", "--max-update", "1", "--disable-validation", "--save-dir", save),
    )
    assert trained.returncode == 0, trained.stderr
    path = save / "checkpoint_last.pt"
    refused = flite_process("validate", toy_data, "--path", path, "--batch-size", 16, "--cpu")
    assert refused.returncode == 2
    assert "--criterion focal_loss, which is not known here: give the --user-dir" in refused.stderr
