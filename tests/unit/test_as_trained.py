"""What a command that reads a language model takes over from its training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import Choice
from fairseq_lite.config.parse import parse
from fairseq_lite.tasks.language_modeling import LanguageModelingConfig
from fairseq_lite.tasks.multilingual_language_modeling import MultilingualLanguageModelingConfig
from fairseq_lite.tasks.translation import TranslationConfig
from fairseq_lite.training import evaluation

REGISTRIES = load_builtins()


def adopted(monkeypatch, trained, *typed):
    saved = SimpleNamespace(task=Choice("any", trained))
    monkeypatch.setattr(evaluation.inference, "config_for", lambda run, registries: saved)
    run = parse("flite-eval-lm", ["bin", "--path", "m.pt", *typed], REGISTRIES)
    return evaluation.as_trained(run, REGISTRIES).task.config


TRAINED = LanguageModelingConfig(
    data="other",
    tokens_per_sample=128,
    add_bos_token=True,
    output_dictionary_size=500,
    sample_break_mode="eos",
)


def test_what_the_weights_were_made_for_is_taken_over(monkeypatch):
    found = adopted(monkeypatch, TRAINED)
    assert (found.tokens_per_sample, found.output_dictionary_size) == (128, 500)
    assert found.add_bos_token
    # Where blocks end, and which data, is a matter of the command line.
    assert (found.sample_break_mode, found.data) == ("none", "bin")


def test_what_is_typed_counts(monkeypatch):
    typed = ("--tokens-per-sample", "64", "--output-dictionary-size", "90")
    found = adopted(monkeypatch, TRAINED, *typed)
    assert (found.tokens_per_sample, found.output_dictionary_size) == (64, 90)
    longer = LanguageModelingConfig(data="other", tokens_per_sample=4096)
    assert adopted(monkeypatch, longer).tokens_per_sample == 1024  # as fairseq measures it


def test_the_symbols_of_languages_belong_to_the_vocabulary(monkeypatch):
    trained = MultilingualLanguageModelingConfig(data="o", add_bos_token=True, langs="de,en")
    task = ("--task", "multilingual_language_modeling")
    assert adopted(monkeypatch, trained, *task).langs == "de,en"
    plain = MultilingualLanguageModelingConfig(data="o", langs="de,en")
    assert adopted(monkeypatch, plain, *task).langs == ""


@pytest.mark.parametrize("trained", [TranslationConfig(data="o"), TRAINED])
def test_other_tasks_stay_as_they_are(monkeypatch, trained):
    command = ("--task", "translation", "-s", "de", "-t", "en")
    found = adopted(monkeypatch, trained, *command)
    assert found == TranslationConfig(data="bin", source_lang="de", target_lang="en")
