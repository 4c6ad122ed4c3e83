"""What results say of the code that made them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from examples.few_shot.evaluation import Evaluation
from examples.few_shot.metrics.api import build_metric
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.models.flite import packages_of
from examples.few_shot.results import is_complete, read_results, write_results
from examples.few_shot.settings import plan
from examples.few_shot.versions import commit_of, of_packages, versions
from tests.helpers.few_shot import write_copa


def git(folder: Path, *words: str) -> str:
    names = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *names, *words], cwd=folder, capture_output=True, text=True,
                          timeout=20, check=True)  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    return folder


def test_the_commit_of_a_clone_is_what_git_says(clone: Path) -> None:
    commit_of.cache_clear()
    assert commit_of(clone) == git(clone, "rev-parse", "HEAD")
    git(clone, "pack-refs", "--all")
    commit_of.cache_clear()
    assert commit_of(clone) == git(clone, "rev-parse", "HEAD")
    git(clone, "worktree", "add", "-q", "-b", "other", "../beside")
    git(clone, "checkout", "-q", "--detach")
    git(clone, "commit", "-q", "--allow-empty", "-m", "two")
    commit_of.cache_clear()
    assert commit_of(clone) == git(clone, "rev-parse", "HEAD")
    assert commit_of(clone.parent / "beside") == git(clone, "rev-parse", "other")
    assert commit_of(clone) != commit_of(clone.parent / "beside")


def test_what_is_no_clone_has_no_commit(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    (tmp_path / "new").mkdir()
    git(tmp_path / "new", "init", "-q")
    assert commit_of(tmp_path / "new") is None  # nothing was committed yet


def test_packages_that_are_not_there_have_no_version() -> None:
    found = versions(["torch", "no-such-package"])
    assert set(found) - {"commit"} == {"fairseq_lite", "python", "torch"}
    assert of_packages(build_metric("bleu").packages).keys() == {"sacrebleu"}
    assert not build_metric("accuracy").packages


def test_what_segments_texts_has_a_version() -> None:
    assert packages_of(["moses", "sentencepiece"]) == ("sacremoses", "sentencepiece")
    assert packages_of(["gpt2"]) == ("tokenizers",)
    assert packages_of(["space", "characters"]) == ()


class Segmenting(DummyModel):
    def packages(self) -> tuple[str, ...]:
        return ("sentencepiece",)


def test_results_name_what_made_them_and_stay_done_under_other_versions(tmp_path: Path) -> None:
    (one,) = plan(
        "dummy", tasks="copa", nb_few_shot_samples_values=0, predictor_name="dummy",
        data_dir=str(write_copa(tmp_path)), results_dir=str(tmp_path / "out"),
    )  # fmt: skip
    found = Evaluation(one, Segmenting()).run()
    assert set(found["versions"]) >= {"torch", "sentencepiece"}
    write_results(one.results_file, found | {"versions": {"commit": "0" * 40, "sacrebleu": "1"}})
    assert is_complete(one)
    again = Evaluation(one, None).recalculated()
    assert again["versions"] == {"commit": "0" * 40, "sacrebleu": "1"}  # of the predictions
    assert read_results(one.results_file)["versions"] == again["versions"]
