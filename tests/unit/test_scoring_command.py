"""flite-score."""

from __future__ import annotations

import pytest

from tests.helpers.commands import flite


@pytest.fixture
def files(tmp_path):
    # U+2028 is a character of the first line, not the end of it.
    (tmp_path / "ref").write_text("the cat sat on the mat\u2028 .\nA dog ran far away .\n", "utf-8")
    (tmp_path / "sys").write_text("the cat sat on a mat\u2028 .\na dog ran far away .\n", "utf-8")
    return ["--sys", tmp_path / "sys", "--ref", tmp_path / "ref"]


def test_a_file(files, capsys):
    assert flite("score", *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("BLEU4 = ")
    assert flite("score", *files, "--ignore-case", "--order", "1") == 0
    assert "BLEU1 = 92.31, 92.3 (" in capsys.readouterr().out


def test_sentence_by_sentence(files, capsys):
    assert flite("score", *files, "--sentence-bleu", "--ignore-case") == 0
    assert "\n1 BLEU4 = 100.00, " in capsys.readouterr().out


def test_sacrebleu(files, capsys):
    assert flite("score", *files, "--sacrebleu") == 0
    out = capsys.readouterr().out
    assert "BLEU = " in out
    assert "signature: nrefs:1|" in out
    assert flite("score", *files, "--sacrebleu", "--order", "2") == 2


def test_unequal_lengths(files, capsys):
    files[1].write_text("one line\n")
    assert flite("score", *files) == 2
    assert "1 lines" in capsys.readouterr().err
