"""Language models in training: resumed to the last bit, several languages, real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq_lite import hub
from fairseq_lite.tasks.multilingual_language_modeling import MultilingualLanguageModelingTask
from fairseq_lite.training.checkpoint import store
from tests.helpers.commands import flite
from tests.helpers.languages import TINY_LM, binarize_languages, write_corpus, write_languages
from tests.helpers.shared import shared_dir
from tests.helpers.toy import ADAM
from tests.helpers.training import assert_same_end, updates

FLAGS = [
    *TINY_LM,
    *ADAM,
    *("--tokens-per-sample", "16", "--max-tokens", "128", "--lr-scheduler", "inverse_sqrt"),
    *("--warmup-updates", "10", "--clip-norm", "1.0", "--log-format", "json"),
    *("--log-interval", "1", "--no-epoch-checkpoints", "--seed", "5", "--cpu"),
]
MULTILINGUAL = (
    *("--task", "multilingual_language_modeling", "--multilang-sampling-alpha", 0.3),
    *("--sample-break-mode", "complete"),
)


def train(data: Path, save_dir: Path, *more: object) -> None:
    log = save_dir.with_suffix(".log")
    assert flite("train", data, *FLAGS, "--save-dir", save_dir, "--log-file", log, *more) == 0


def summaries(save_dir: Path, tag: str) -> list[dict[str, Any]]:
    """What the log says of a split, once a validation."""
    lines = save_dir.with_suffix(".log").read_text().splitlines()
    marked = [line.split(f" | {tag} | ") for line in lines]
    return [json.loads(parts[1]) for parts in marked if len(parts) == 2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train": 400, "valid": 30})


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("languages")
    return write_languages(folder, {"de": 200, "en": 60, "fi": 20})


# An epoch of the corpus has 14 to 20 updates here, one of the languages 10 to 20.
@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
def test_a_language_model_resumes(mode: str, corpus: Path, tmp_path: Path) -> None:
    more = ("--task", "language_modeling", "--sample-break-mode", mode)
    crops = ("--shorten-method", "random_crop", "--tokens-per-sample", 6)
    if mode == "eos":
        more += crops
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(corpus, whole, *more, "--max-update", 45)
    for stop in (4, 27, 45):
        train(corpus, parts, *more, "--max-update", stop)
    assert_same_end(whole, parts)


def test_a_multilingual_model_resumes(languages: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(languages, whole, *MULTILINGUAL, "--max-update", 40)
    for stop in (5, 24, 40):
        train(languages, parts, *MULTILINGUAL, "--max-update", stop)
    assert_same_end(whole, parts)
    assert float(updates(whole)["40"]["epoch"]) >= 3, "the draws of several epochs"


def test_draws_that_forget_the_epoch_are_noticed(
    languages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that draws once, at its start: what fairseq does with lengths."""
    monkeypatch.setattr(MultilingualLanguageModelingTask, "changes_with_epoch", lambda self: False)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(languages, whole, *MULTILINGUAL, "--max-update", 40)
    for stop in (24, 40):
        train(languages, parts, *MULTILINGUAL, "--max-update", stop)
    with pytest.raises(AssertionError):
        assert_same_end(whole, parts)


@pytest.mark.timeout(180)
def test_two_processes_resume(languages: Path, tmp_path: Path) -> None:
    two = (*MULTILINGUAL, "--distributed-world-size", 2, "--disable-validation")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(languages, whole, *two, "--max-update", 14)
    train(languages, parts, *two, "--max-update", 9)
    train(languages, parts, *two, "--max-update", 14)
    assert_same_end(whole, parts)


def test_every_language_is_validated(languages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    train(languages, folder, *MULTILINGUAL, "--max-epoch", 2)
    loss = {}
    for tag in ("valid", "valid_de", "valid_en", "valid_fi"):
        records = summaries(folder, tag)
        assert [record["epoch"] for record in records] == [1, 2]
        loss[tag] = float(records[-1][f"{tag}_loss"])
    parts = list(loss)[1:]
    assert all(loss[part] > 0 for part in parts)
    assert min(loss[p] for p in parts) <= loss["valid"] <= max(loss[p] for p in parts)
    best = store.load(folder / "checkpoint_last.pt")["extra_state"]["best"]
    assert best == pytest.approx(min(float(r["valid_loss"]) for r in summaries(folder, "valid")),
                                 abs=1e-3), "the whole split decides"  # fmt: skip


def test_fixed_shapes_change_nothing_that_is_learned(corpus: Path, tmp_path: Path) -> None:
    """Rows and columns of padding have no loss and no gradient."""
    base = ("--task", "language_modeling", "--sample-break-mode", "eos", "--dropout", 0,
            "--batch-size", 8, "--required-batch-size-multiple", 1, "--max-update", 6,
            "--disable-validation", "--no-save")  # fmt: skip
    plain, fixed = tmp_path / "plain", tmp_path / "fixed"
    train(corpus, plain, *base)
    train(corpus, fixed, *base, "--pad-to-fixed-length", "--pad-to-fixed-bsz")
    for one, other in zip(updates(plain).values(), updates(fixed).values(), strict=True):
        assert one["wpb"] == other["wpb"]
        for key in ("loss", "gnorm"):
            assert float(one[key]) == pytest.approx(float(other[key]), abs=2e-3)


def test_a_smaller_output_dictionary(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    flags = ("--task", "language_modeling", "--output-dictionary-size", 12, "--max-update", 3)
    words = [word for word in FLAGS if word != "--share-decoder-input-output-embed"]
    log = folder.with_suffix(".log")
    assert flite("train", corpus, *words, *flags, "--save-dir", folder, "--log-file", log) == 0
    weights = store.load(folder / "checkpoint_last.pt")["model"]
    assert weights["decoder.embed_tokens.weight"].shape[0] == 24
    assert weights["decoder.output_projection.weight"].shape[0] == 12


def test_a_bos_before_full_blocks_has_a_position(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    bos = ("--task", "language_modeling", "--add-bos-token", "--decoder-learned-pos")
    train(corpus, folder, *bos, "--max-update", 3)
    positions = store.load(folder / "checkpoint_last.pt")["model"]["decoder.embed_positions.weight"]
    assert positions.shape[0] == 16 + 1 + 2, "the block, the bos, and what padding takes"
    assert updates(folder)["1"]["wpb"] == str(8 * 17)
    # So has it when the model is read again.
    path = folder / "checkpoint_last.pt"
    for command, flags in (("eval_lm", ["--gen-subset", "valid"]), ("validate", [])):
        words = [corpus, "--path", path, "--batch-size", 8, *flags, *bos[:2], "--cpu"]
        assert flite(command, *words) == 0
    model = hub.load(path, device="cpu")
    ids = np.full(model.max_tokens, 7)
    assert model.max_tokens == 16 and len(model.score_tokens([ids])[0][1]) == 16


@pytest.mark.timeout(180)
def test_symbols_of_languages_are_learned(languages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    train(languages, folder, *MULTILINGUAL, "--add-bos-token", "--max-update", 3)
    state = store.load(folder / "checkpoint_last.pt")
    assert state["model"]["decoder.embed_tokens.weight"].shape[0] == 24 + 3
    assert state["cfg"]["task"]["langs"] == "de,en,fi"
    args = ("--path", folder / "checkpoint_last.pt", "--max-tokens", 128, "--cpu", "--task",
            "multilingual_language_modeling")  # fmt: skip
    assert flite("validate", languages, *args, "--valid-subset", "valid_fi") == 0


def test_declarations_of_human_rights(tmp_path: Path) -> None:
    """Real languages, small ones sampled up; what is learned of one is measured by itself."""
    source = shared_dir("data", "lm", "udhr2")
    texts = {}
    for language, lines in {"eng": 120, "fin": 60, "swe": 60, "tur": 25}.items():
        text = (source / f"{language}.txt").read_text(encoding="utf-8").lower()
        kept = [line.strip() for line in text.split("\n") if line.strip()][:lines]
        texts[language] = [" ".join(line.replace(" ", "_")) for line in kept]  # characters
    data = binarize_languages(texts, tmp_path / "udhr2", held_out=10)
    folder = tmp_path / "checkpoints"
    more = ("--task", "multilingual_language_modeling", "--multilang-sampling-alpha", 0.5)
    lengths = ("--tokens-per-sample", 64, "--max-tokens", 1024, "--lr", 0.01, "--dropout", 0)
    train(data, folder, *more, *lengths, "--max-epoch", 4, "--langs", "eng,fin,tur")
    log = folder.with_suffix(".log").read_text()
    assert "training on 3 languages: eng, fin, tur" in log
    for language in ("eng", "fin", "tur"):
        losses = [
            float(r[f"valid_{language}_loss"]) for r in summaries(folder, f"valid_{language}")
        ]
        assert losses[-1] < losses[0]
    weights = store.load(folder / "checkpoint_last.pt")["model"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
