"""--lm-path: a language model over the target dictionary is added to translations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import flite
from tests.helpers.toy import ADAM, LETTERS, TINY_MODEL

LM = "--task language_modeling --arch transformer_lm --tokens-per-sample 32 --max-tokens 400 --cpu"
SHAPE = "embed-dim input-dim output-dim".split()


@pytest.fixture(scope="module")
def models(toy_data, tmp_path_factory) -> tuple[Path, Path]:
    """A translation model that knows nothing, and a language model that has learned one line."""
    folder = tmp_path_factory.mktemp("fusion")
    words = [*TINY_MODEL, *ADAM, "--max-tokens", 400, "--max-update", 1, "--cpu"]
    words += ["--disable-validation", "--save-dir", folder / "mt"]
    assert flite("train", toy_data, *words) == 0
    (folder / "text").write_text((" ".join(LETTERS[:5]) + "\n") * 200, "utf-8")
    words = ["--only-source", "--srcdict", toy_data / "dict.tgt.txt", "--trainpref"]
    words += [folder / "text", "--destdir", folder / "lm-bin"]
    assert flite("preprocess", *words) == 0
    shape = [word for name in SHAPE for word in (f"--decoder-{name}", 16)]
    words = [*LM.split(), *shape, "--decoder-layers", 1, "--decoder-ffn-embed-dim", 32]
    words += ["--sample-break-mode", "eos", *ADAM[:2], "--lr", "2e-2", "--max-update", 60]
    words += ["--disable-validation", "--save-dir", folder / "lm"]
    assert flite("train", folder / "lm-bin", *words) == 0
    return folder / "mt" / "checkpoint_last.pt", folder / "lm" / "checkpoint_last.pt"


@pytest.fixture
def generate(toy_data, models, capfd):
    def run(*args, status=0):
        words = ["--path", models[0], "--max-len-b", 12, "--max-tokens", 400, "--cpu", *args]
        assert flite("generate", toy_data, *words) == status
        captured = capfd.readouterr()
        if status:
            return captured.err.splitlines()[-1]
        lines = captured.out.splitlines()
        return [line.split("\t")[2] for line in lines if line.startswith("H-")]

    return run


def test_the_language_model_decides_where_it_weighs_more(generate, models, toy_data, capfd):
    learned = " ".join(LETTERS[:5])
    assert learned not in generate()
    assert set(generate("--lm-path", models[1], "--lm-weight", 5)) == {learned}
    assert generate("--lm-path", models[1], "--lm-weight", 0) == generate()

    (folder := models[1].parent / "in").write_text("a b\nc\n", "utf-8")
    words = [toy_data, "--path", models[0], "--input", folder, "--max-len-b", 12, "--cpu"]
    assert flite("interactive", *words, "--lm-path", models[1], "--lm-weight", 5) == 0
    out = [line.split("\t")[2] for line in capfd.readouterr().out.splitlines() if line[:2] == "H-"]
    assert out == [learned, learned]


def test_what_cannot_be_added_is_one_line(generate, models, tmp_path):
    assert "this is no language model" in generate("--lm-path", models[0], status=2)
    assert "added to translations only" in generate(
        "--lm-path", models[1], "--score-reference", status=2
    )
    assert "no such checkpoint" in generate("--lm-path", tmp_path / "nix.pt", status=2)


def test_another_dictionary_is_refused(generate, models, toy_data, tmp_path):
    (tmp_path / "text").write_text("x y z\n" * 50, "utf-8")
    words = ["--only-source", "--trainpref", tmp_path / "text", "--destdir", tmp_path / "bin"]
    assert flite("preprocess", *words) == 0
    words = [*LM.split(), *ADAM, "--max-update", 1, "--disable-validation", "--decoder-layers", 1]
    assert flite("train", tmp_path / "bin", *words, "--save-dir", tmp_path / "lm") == 0
    shutil.rmtree(tmp_path / "bin")
    message = generate("--lm-path", tmp_path / "lm" / "checkpoint_last.pt", status=2)
    assert "its dictionary is not the target dictionary" in message
