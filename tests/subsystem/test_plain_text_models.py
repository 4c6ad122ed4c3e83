"""Models on plain text: what was recorded with the data is used to train, translate and score."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
import sacrebleu

from fairseq_lite import hub
from fairseq_lite.builtins import load_builtins
from fairseq_lite.errors import CheckpointError
from fairseq_lite.training.checkpoint import bundle, inference, parts, store
from tests.helpers import texts as plain
from tests.helpers.commands import flite
from tests.helpers.toy import ADAM, TINY_MODEL

LETTERS = "ab cd ef gh"
SHORT = ["--cpu", "--max-len-b", 12, "--beam", 2]


def _sentences(count: int) -> list[str]:
    return [f"{LETTERS[n % 11 :]}, {LETTERS[: n % 7]}: {n * 37 % 100}!" for n in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, away from where it was made, and a model; no tokenizer but theirs."""
    folder = tmp_path_factory.mktemp("plain-models")
    for split, text in (("train", _sentences(120)), ("valid", _sentences(140)[120:])):
        plain.write_lines(folder / f"{split}.en", text)
        plain.write_lines(folder / f"{split}.de", [line.upper() for line in text])
    tokenizer = folder / "tokenizer"
    both = _sentences(120) + [line.upper() for line in _sentences(120)]
    plain.byte_level(tokenizer / "tokenizer.json", both)
    words = ["--source-lang", "en", "--target-lang", "de", "--joined-dictionary", "--workers", 2]
    words += ["--trainpref", folder / "train", "--validpref", folder / "valid"]
    words += ["--bpe", "hf_tokenizer", "--hf-tokenizer", tokenizer]
    assert flite("preprocess", *words, "--destdir", folder / "made") == 0
    shutil.rmtree(tokenizer)
    (folder / "made").rename(folder / "data-bin")
    words = [folder / "data-bin", *TINY_MODEL, *ADAM, "--max-tokens", 800, "--max-update", 12]
    words += ["--save-dir", folder / "save", "--cpu", "--eval-bleu", "--log-format", "simple"]
    words += ["--eval-bleu-args", '{"beam": 2, "max_len_b": 12}', "--eval-bleu-print-samples"]
    assert flite("train", *words, "--log-file", folder / "train.log") == 0
    return folder


def _lines(printed: str, kind: str) -> dict[int, str]:
    rows = [line.split("\t") for line in printed.split("\n") if line.startswith(f"{kind}-")]
    return {int(row[0][2:]): row[-1] for row in rows}


def test_generate_prints_text_and_scores_it(trained: Path, capsys, caplog) -> None:
    words = [trained / "data-bin", "--path", trained / "save" / "checkpoint_last.pt", *SHORT]
    words += ["--gen-subset", "valid"]
    assert flite("generate", *words, "--scoring", "sacrebleu") == 0
    printed = capsys.readouterr().out
    texts = {kind: _lines(printed, kind) for kind in "STD"}
    numbers = range(20)
    raw = [(trained / f"valid.{lang}").read_text().splitlines() for lang in ("en", "de")]
    assert [texts["S"][n] for n in numbers] == raw[0]
    assert [texts["T"][n] for n in numbers] == raw[1]
    assert _lines(printed, "H") != texts["D"]  # symbols there, text here
    bleu = sacrebleu.corpus_bleu([texts["D"][n] for n in numbers], [raw[1]])
    assert f"BLEU = {bleu.score:.2f} " in printed.splitlines()[-1]
    assert not [m for m in caplog.messages if "pieces" in m]
    # How it is joined need not be said, and may be.
    assert flite("generate", *words, "--scoring", "sacrebleu", "--remove-bpe") == 0
    again = capsys.readouterr().out
    assert _lines(again, "D") == texts["D"] and again.splitlines()[-1] == printed.splitlines()[-1]


def test_bleu_of_symbols_is_said_to_be_one(trained: Path, caplog, capsys) -> None:
    words = [trained / "data-bin", "--path", trained / "save" / "checkpoint_last.pt", *SHORT]
    with caplog.at_level(logging.WARNING):
        assert flite("generate", *words, "--gen-subset", "valid", "--quiet") == 0
    warned = "\n".join(caplog.messages) + capsys.readouterr().err
    assert warned.count("BLEU is computed on the pieces of --bpe") == 1


def test_validation_scores_text(trained: Path) -> None:
    log = (trained / "train.log").read_text()
    reference = next(line for line in log.splitlines() if "example reference: " in line)
    raw = (trained / "valid.de").read_text().splitlines()
    assert reference.split("example reference: ")[1] in raw
    assert "pieces of words" not in log


def test_raw_text_in_raw_text_out(trained: Path, tmp_path, capsys) -> None:
    """By the data folder's record; without data by what the checkpoint carries; from Python."""
    lines = ["ab cd, ef!", "", " gh  12\u00a0x"]
    source = plain.write_lines(tmp_path / "input", lines)
    model = shutil.copy(trained / "save" / "checkpoint_last.pt", tmp_path / "model.pt")
    bare = tmp_path / "bare"
    bare.mkdir()
    for lang in ("en", "de"):
        shutil.copy(trained / "data-bin" / f"dict.{lang}.txt", bare)
    found = []
    for data in (trained / "data-bin", bare):
        words = [data, "--path", model, *SHORT, "--input", source, "-s", "en", "-t", "de"]
        assert flite("interactive", *words) == 0
        found.append(list(_lines(capsys.readouterr().out, "D").values()))
    translator = hub.load(model, device="cpu")
    found.append([translator.translate(line, max_len_b=12, beam=2) for line in lines])
    assert found[0] == found[1] == found[2] and len(found[0]) == 3
    assert "Ġ" not in "".join(found[0])


def test_the_checkpoint_carries_the_folder(trained: Path) -> None:
    name = "hf_tokenizer/tokenizer.json"
    recorded = trained / "data-bin" / "segmentation" / name
    assert (trained / "save" / name).read_bytes() == recorded.read_bytes()
    path = trained / "save" / "checkpoint_last.pt"
    carried = bundle.read(store.load(path), path)
    assert carried.files[name] == recorded.read_bytes()
    assert carried.fields == {"bpe.hf_tokenizer": "hf_tokenizer"}
    ensemble = inference.load_models(str(path), load_builtins())
    config = ensemble.configs[0].bpe.config
    assert Path(config.hf_tokenizer, "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def unrecorded(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data as fairseq makes it: segmented by somebody else, and nothing says how."""
    folder = tmp_path_factory.mktemp("unrecorded") / "data-bin"
    shutil.copytree(trained / "data-bin", folder, ignore=shutil.ignore_patterns("segmentation*"))
    return folder


def test_a_folder_without_a_record_is_printed_as_fairseq_does(
    trained: Path, unrecorded: Path, capsys, caplog
) -> None:
    words = ["--path", trained / "save" / "checkpoint_last.pt", *SHORT, "--gen-subset", "valid"]
    with caplog.at_level(logging.INFO):
        assert flite("generate", unrecorded, *words) == 0
    printed, said = capsys.readouterr()
    assert _lines(printed, "D") == _lines(printed, "H")
    assert "type --bpe hf_tokenizer for text" in said + "\n".join(caplog.messages)
    # That is all there is to type: the model carries the files and settings.
    assert flite("generate", unrecorded, *words, "--bpe", "hf_tokenizer") == 0
    text = capsys.readouterr().out
    assert flite("generate", trained / "data-bin", *words) == 0
    assert text == capsys.readouterr().out != printed


def test_lines_segmented_beforehand_are_joined_as_typed(
    trained: Path, unrecorded: Path, tmp_path, capsys
) -> None:
    """fairseq's way: `segment < text | fairseq-interactive … --remove-bpe`."""
    words = [unrecorded, "--path", trained / "save" / "checkpoint_last.pt", *SHORT]
    plain.write_lines(tmp_path / "plain", ["ab cd"])
    assert flite("interactive", *words, "--input", tmp_path / "plain") == 0
    found = capsys.readouterr().out
    plain.write_lines(tmp_path / "segmented", [_lines(found, "S")[0]])
    assert flite("interactive", *words, "--input", tmp_path / "segmented", "--remove-bpe") == 0
    again = capsys.readouterr().out
    assert _lines(again, "H") == _lines(found, "H") and _lines(again, "S") == _lines(found, "S")


def test_validation_scores_what_it_scored_in_training(
    trained: Path, unrecorded: Path, tmp_path
) -> None:
    scores = []
    for name, data in (("recorded", trained / "data-bin"), ("unrecorded", unrecorded)):
        log = tmp_path / name
        words = [data, "--path", trained / "save" / "checkpoint_last.pt", "--max-tokens", 800]
        assert flite("validate", *words, "--cpu", "--log-file", log) == 0
        scores.append(re.findall(r"example reference: .*|bleu \S+", log.read_text()))
    assert scores[0] == scores[1]
    assert scores[0][-1] in (trained / "train.log").read_text()


@pytest.mark.parametrize("command", ["train", "validate", "generate", "interactive"])
def test_a_model_that_is_missing_is_named(trained: Path, unrecorded: Path, command, capsys) -> None:
    path = trained / "save" / "checkpoint_last.pt"
    flags = {
        "train": [*TINY_MODEL, *ADAM, "--max-tokens", 800, "--max-update", 1, "--no-save"],
        "validate": ["--path", path, "--max-tokens", 800],
        "generate": ["--path", path, "--gen-subset", "valid"],
        "interactive": ["--path", path],
    }[command]
    words = [unrecorded, *flags, "--cpu", "--bpe", "sentencepiece", "--sentencepiece-model", "no"]
    capsys.readouterr()
    assert flite(command, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"flite-{command}: error: --sentencepiece-model no: no such file"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "a\\x", "", "."])
def test_no_name_leads_out_of_the_folder(name) -> None:
    evil = bundle.Bundle({name: b"x"}).to_state()
    with pytest.raises(CheckpointError, match="not unpacked"):
        bundle.read({parts.OWN_KEY: {"bundle": evil}}, "evil.pt")
