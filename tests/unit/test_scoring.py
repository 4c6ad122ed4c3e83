"""Scorers: fairseq's numbers and strings, sacrebleu's numbers, sums that add up over batches."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite.scoring import SCORERS
from fairseq_lite.scoring.bleu import BleuScorer
from fairseq_lite.scoring.standard import (
    ChrfScorer,
    SacrebleuConfig,
    SacrebleuScorer,
    TerScorer,
    bleu_of_sums,
    bleu_sums,
)
from fairseq_lite.scoring.wer import WerConfig, WerScorer, edit_distance

REFERENCES = [
    "the cat sat on the mat .",
    "a small dog runs through the snow .",
    "two men are talking , smiling and drinking coffee .",
]
HYPOTHESES = [
    "the cat sat on a mat .",
    "a small dog is running through snow .",
    "two men are talking and drinking coffee .",
]


def filled(scorer, references=REFERENCES, hypotheses=HYPOTHESES):
    for pair in zip(references, hypotheses, strict=True):
        scorer.add(*pair)
    return scorer


def test_bleu_prints_as_fairseq_does():
    line = filled(BleuScorer()).result_string()
    # Counted by hand: 20 of 23 unigrams, 13 of 20 bigrams, 7 of 17, 3 of 14; 23 tokens for 25.
    assert line == (
        "BLEU4 = 43.32, 87.0/65.0/41.2/21.4 (BP=0.917, ratio=0.920, syslen=23, reflen=25)"
    )


def test_bleu_agrees_with_sacrebleu_on_tokens():
    theirs = filled(SacrebleuScorer(SacrebleuConfig(sacrebleu_tokenizer="none"))).score()
    assert filled(BleuScorer()).score() == pytest.approx(theirs, abs=1e-9)


def test_an_unknown_reference_word_matches_nothing():
    scorer = filled(BleuScorer(order=1), ["a <unk> b"], ["a <unk> b"])
    assert scorer.score() == pytest.approx(200 / 3)


@pytest.mark.parametrize("hypothesis", ["", "x"])
def test_bleu_of_nothing_right_is_zero(hypothesis):
    assert filled(BleuScorer(), ["a b"], [hypothesis]).result_string().startswith("BLEU4 = 0.00, ")


def test_bleu_of_no_sentences():
    assert "syslen=0, reflen=0" in BleuScorer().result_string()


def test_bleu_order_and_case():
    assert filled(BleuScorer(ignore_case=True), ["A b c d"], ["a B c d"]).score() == pytest.approx(
        100.0
    )
    assert filled(BleuScorer(order=2)).result_string().startswith("BLEU2 = ")
    with pytest.raises(ConfigError, match="--order 0"):
        BleuScorer(order=0)


@pytest.mark.parametrize(
    ("scorer", "options"),
    [
        (SacrebleuScorer(), []),
        (SacrebleuScorer(SacrebleuConfig(sacrebleu_lowercase=True)), ["-lc"]),
        (SacrebleuScorer(SacrebleuConfig(sacrebleu_tokenizer="intl")), ["--tokenize", "intl"]),
        (ChrfScorer(), ["-m", "chrf"]),
        (TerScorer(), ["-m", "ter"]),
    ],
    ids=["bleu", "lowercase", "intl", "chrf", "ter"],
)
def test_equal_to_the_sacrebleu_command(tmp_path, scorer, options):
    references = [r.replace("the", "The") for r in REFERENCES]
    filled(scorer, references)
    (tmp_path / "ref").write_text("\n".join(references) + "\n")
    (tmp_path / "hyp").write_text("\n".join(HYPOTHESES) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-b", "-w", "6", *options]
    out = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert scorer.score() == pytest.approx(float(out.stdout), abs=1e-6)
    assert "version:" in scorer.signature


def test_sacrebleu_prints_as_fairseq_does():
    line = filled(SacrebleuScorer()).result_string()
    assert line == (
        "BLEU = 43.32 87.0/65.0/41.2/21.4 (BP = 0.917 ratio = 0.920 hyp_len = 23 ref_len = 25)"
    )


def test_character_level_bleu_counts_characters_and_spaces():
    scorer = filled(SacrebleuScorer(SacrebleuConfig(sacrebleu_char_level=True)), ["ab c"], ["ab c"])
    assert scorer.result().ref_len == 4
    assert "tok:13a+characters" in scorer.signature


def test_sums_of_batches_give_the_bleu_of_the_whole():
    parts = [bleu_sums(HYPOTHESES[:1], REFERENCES[:1]), bleu_sums(HYPOTHESES[1:], REFERENCES[1:])]
    total = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    assert bleu_of_sums(total) == pytest.approx(filled(SacrebleuScorer()).score(), abs=1e-9)
    assert bleu_of_sums(bleu_sums([], [])) == 0.0


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3


def test_wer():
    assert filled(WerScorer(), ["a b c d"], ["a x c"]).result_string() == "WER: 50.00"
    plain = WerConfig(wer_remove_punct=True, wer_lowercase=True)
    assert filled(WerScorer(plain), ["A b ."], ["a b"]).score() == 0.0
    characters = WerScorer(WerConfig(wer_char_level=True))
    assert filled(characters, ["ab c"], ["ab d"]).score() == 25.0


@pytest.mark.parametrize(("name", "package"), [("meteor", "nltk"), ("bert_score", "bert-score")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    for module in ("nltk", "nltk.translate", "bert_score"):
        monkeypatch.setitem(sys.modules, module, None)
    entry = SCORERS.get(name)
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        entry.factory(entry.config())


def test_every_scorer_reports_no_sentences():
    for name in ("bleu", "sacrebleu", "chrf", "ter", "wer"):
        scorer = SCORERS.get(name).factory(SCORERS.get(name).config())
        assert scorer.score() == 0.0
        assert scorer.result_string()
