"""flite-preprocess: the reference folders byte for byte, and every flag and failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_lite.config.core import PreprocessConfig
from fairseq_lite.data import preprocess, texts
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedDataset
from fairseq_lite.errors import ConfigError, DataError
from tests.helpers.shared import shared_dir

_MT = {
    "source_lang": "en",
    "target_lang": "de",
    "trainpref": "mt/text/train",
    "validpref": "mt/text/valid",
}


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("mt/data-bin", {**_MT, "testpref": "mt/text/test", "joined_dictionary": True}),
        (
            "mt/data-bin-separate",
            {
                **_MT,
                "validpref": "mt/text/valid,mt/text/test",
                "thresholdsrc": 2,
                "thresholdtgt": 2,
                "nwordssrc": 1500,
                "nwordstgt": 1200,
            },
        ),
        (
            "lm/data-bin",
            {
                "only_source": True,
                "trainpref": "lm/text/train.txt",
                "validpref": "lm/text/valid.txt",
                "testpref": "lm/text/test.txt",
                "nwordssrc": 4000,
            },
        ),
    ],
)
def test_same_bytes_as_fairseq(tmp_path, monkeypatch, folder, options, workers) -> None:
    reference = shared_dir("reference")
    monkeypatch.chdir(reference)
    monkeypatch.setattr(texts, "_MIN_SPAN", 1)  # small as these files are, cut them up
    out = tmp_path / "out"
    preprocess.run(PreprocessConfig(destdir=str(out), workers=workers, **options))
    expected = {p.name: p.read_bytes() for p in (reference / folder).iterdir()}
    found = {p.name: p.read_bytes() for p in out.iterdir()}
    assert sorted(found) == sorted(expected)
    log, expected_log = (f.pop("preprocess.log").decode() for f in (found, expected))
    assert [name for name in found if found[name] != expected[name]] == []
    expected_log = expected_log.replace(f"data to {folder}", f"data to {out}")
    assert log.splitlines()[1:] == expected_log.splitlines()[1:]
    assert log.startswith("Namespace(")


def _write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_bytes(text.encode())


def _config(folder: Path, **options) -> PreprocessConfig:
    defaults = {
        "source_lang": "en",
        "target_lang": "de",
        "trainpref": str(folder / "train"),
        "destdir": str(folder / "out"),
    }
    return PreprocessConfig(**{**defaults, **options})


@pytest.fixture
def corpus(tmp_path) -> Path:
    _write(
        tmp_path,
        train__en="a b\u00a0c\r\n\r\na\u2028<unk> x\ra </s> a",
        train__de="A\n\nB\u0085B\u3000 C\nD E",
        valid__en="a q\n",
        valid__de="Q\n",
    )
    return tmp_path


def _items(path: Path) -> list[list[int]]:
    data = IndexedDataset(path)
    return [data[i].tolist() for i in range(len(data))]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_lines_and_words(corpus, monkeypatch, workers) -> None:
    monkeypatch.setattr(texts, "_MIN_SPAN", 1)
    preprocess.run(_config(corpus, workers=workers, validpref=str(corpus / "valid")))
    out = corpus / "out"
    english = Dictionary.load(out / "dict.en.txt")
    assert english.symbols[4:8] == ["a", "b", "c", "x"] and english.count[4:8] == [4, 1, 1, 1]
    assert _items(out / "train.en-de.en") == [[4, 5, 6, 2], [2], [4, 3, 7, 2], [4, 2, 4, 2]]
    assert _items(out / "valid.en-de.en") == [[4, 3, 2]]
    log = (out / "preprocess.log").read_text()
    # the literal <unk> of the training text is not a word that was replaced
    assert f"[en] {corpus}/train.en: 4 sents, 13 tokens, 0.0% replaced (by <unk>)\n" in log
    assert f"[en] {corpus}/valid.en: 1 sents, 3 tokens, 33.3% replaced (by <unk>)\n" in log
    assert f"[de] {corpus}/valid.de: 1 sents, 2 tokens, 50.0% replaced (by <unk>)\n" in log


def test_given_dictionary_is_saved_as_it_is(corpus) -> None:
    text = "a 9\nz 3\n"
    _write(corpus, d=text)
    preprocess.run(
        _config(
            corpus,
            srcdict=str(corpus / "d"),
            joined_dictionary=True,
            trainpref=None,
            validpref=str(corpus / "valid"),
        )
    )
    out = corpus / "out"
    assert (out / "dict.en.txt").read_text() == (out / "dict.de.txt").read_text() == text
    assert _items(out / "valid.en-de.en") == [[4, 3, 2]]
    assert not (out / "train.en-de.en.idx").exists()


def test_dict_only_and_padding(corpus) -> None:
    preprocess.run(_config(corpus, dict_only=True, padding_factor=1))
    names = sorted(p.name for p in (corpus / "out").iterdir())
    assert names == ["dict.de.txt", "dict.en.txt", "preprocess.log"]
    assert (corpus / "out" / "dict.de.txt").read_text() == "B 2\nA 1\nC 1\nD 1\nE 1\n"


def test_raw(corpus) -> None:
    preprocess.run(_config(corpus, dataset_impl="raw", validpref=str(corpus / "valid")))
    out = corpus / "out"
    for split in ("train", "valid"):
        for lang in ("en", "de"):
            copy = out / f"{split}.en-de.{lang}"
            assert copy.read_bytes() == (corpus / f"{split}.{lang}").read_bytes()
    with pytest.raises(ConfigError, match="expected mmap or raw"):
        preprocess.run(_config(corpus, dataset_impl="lazy"))


def test_only_source_with_a_language(corpus) -> None:
    preprocess.run(_config(corpus, only_source=True, target_lang=None))
    names = sorted(p.name for p in (corpus / "out").iterdir())
    assert names == [
        "dict.en.txt",
        "preprocess.log",
        "train.en-None.en.bin",
        "train.en-None.en.idx",
    ]


def test_alignments(corpus) -> None:
    _write(corpus, train__align="0-0 1-0\n\n0-1\n0-0 2-1\n")
    preprocess.run(_config(corpus, align_suffix="align", alignfile=str(corpus / "train.align")))
    out = corpus / "out"
    assert _items(out / "train.align.en-de") == [[0, 0, 1, 0], [], [0, 1], [0, 0, 2, 1]]
    assert IndexedDataset(out / "train.align.en-de").dtype.itemsize == 4
    assert (out / "alignment.en-de.txt").read_text() == "a A\nb A\n"


def _leftovers(corpus: Path) -> list[str]:
    return sorted(p.name for p in corpus.rglob("*") if "out" in p.parts or p.name == "out")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train__de": "A\nB\n"}, "line 3 of .*train.en has no counterpart"),
        ({"valid__en": "a\nb\n"}, "valid.en has 2 lines, .*valid.de has 1"),
    ],
)
def test_unequal_line_counts(corpus, change, says, workers) -> None:
    _write(corpus, **change)
    with pytest.raises(DataError, match=says):
        preprocess.run(_config(corpus, validpref=str(corpus / "valid"), workers=workers))
    assert _leftovers(corpus) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_undecodable_bytes(tmp_path, monkeypatch, workers) -> None:
    monkeypatch.setattr(texts, "_MIN_SPAN", 1)
    lines = [b"line\r\n"] * 50 + [b"broken \xff here\n"] + [b"line\r"] * 50
    (tmp_path / "train.en").write_bytes(b"".join(lines))
    (tmp_path / "train.de").write_bytes(b"x\n" * 101)
    with pytest.raises(DataError, match=r"train.en:51: not UTF-8 \(byte 0xff") as e:
        preprocess.run(_config(tmp_path, workers=workers))
    assert "\n" not in str(e.value)
    assert _leftovers(tmp_path) == []


def test_missing_text_and_existing_dictionary(corpus) -> None:
    with pytest.raises(DataError, match="nope.en: no such text file"):
        preprocess.run(_config(corpus, testpref=str(corpus / "nope")))
    assert _leftovers(corpus) == []
    preprocess.run(_config(corpus))
    before = {p.name: p.read_bytes() for p in (corpus / "out").iterdir()}
    with pytest.raises(DataError, match="dict.en.txt exists"):
        preprocess.run(_config(corpus))
    assert {p.name: p.read_bytes() for p in (corpus / "out").iterdir()} == before
    given = {
        f"{s}dict": str(corpus / "out" / f"dict.{lang}.txt")
        for s, lang in (("src", "en"), ("tgt", "de"))
    }
    preprocess.run(_config(corpus, **given))
    assert {p.name for p in (corpus / "out").iterdir()} == set(before)


def test_a_folder_that_cannot_be_written(corpus) -> None:
    (corpus / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        preprocess.run(_config(corpus, destdir=str(corpus / "file" / "out")))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(corpus, monkeypatch, workers) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(texts, "_MIN_SPAN", 1)
    monkeypatch.setattr(preprocess.IndexedWriter, "finalize", full)
    with pytest.raises(DataError, match="No space left on device; nothing was left behind"):
        preprocess.run(_config(corpus, workers=workers))
    assert _leftovers(corpus) == []


def test_a_worker_that_dies_ends_the_run(corpus, monkeypatch) -> None:
    monkeypatch.setattr(texts, "_MIN_SPAN", 1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="a worker process ended unexpectedly"):
        preprocess.run(_config(corpus, workers=2))
    assert _leftovers(corpus) == []


def test_the_command(corpus) -> None:
    command = [sys.executable, "-m", "fairseq_lite_cli.preprocess"]
    out = corpus / "out"
    flags = ["-s", "en", "-t", "de", "--trainpref", str(corpus / "train"), "--destdir", str(out)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "| [en] Dictionary: 8 types\n" in done.stdout
    assert (out / "train.en-de.de.idx").exists()
    again = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert again.stderr.startswith("flite-preprocess: error: ") and again.stderr.count("\n") == 1
