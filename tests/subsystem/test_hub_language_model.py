"""hub.load() of a language model: one file, moved away from its data, scores and continues text."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from fairseq_lite import hub
from fairseq_lite.errors import ConfigError
from fairseq_lite.hub import language_model
from tests.helpers.commands import flite

WORDS = "the old man went down to sea and saw a ship with white sails far out on water".split()
SHAPE = "embed-dim 16 input-dim 16 output-dim 16 ffn-embed-dim 32 layers 1 attention-heads 2"


def write_text(folder: Path, seed: int = 1) -> Path:
    rng = random.Random(seed)
    for split, size in (("train", 300), ("test", 25)):
        lines = (" ".join(rng.choices(WORDS, k=rng.randrange(2, 12))) + "." for _ in range(size))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Plain text, cut into pieces by a sentencepiece model that the folder records."""
    folder = write_text(tmp_path_factory.mktemp("novel"))
    options = {"vocab_size": 60, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "train.txt"), model_prefix=str(folder / "sp"), **options
    )
    words = [
        "--only-source",
        "--trainpref",
        folder / "train.txt",
        "--testpref",
        folder / "test.txt",
    ]
    words += ["--destdir", folder / "data-bin", "--bpe", "sentencepiece"]
    words += ["--sentencepiece-model", folder / "sp.model"]
    assert flite("preprocess", *words) == 0
    return folder / "data-bin"


@pytest.fixture(scope="module")
def moved(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub-lm")
    pairs = SHAPE.split()
    shape = [w for k, v in zip(pairs[::2], pairs[1::2], strict=True) for w in (f"--decoder-{k}", v)]
    words = ["--task", "language_modeling", "--arch", "transformer_lm", *shape, "--cpu"]
    words += ["--tokens-per-sample", 64, "--sample-break-mode", "eos", "--max-tokens", 800]
    words += ["--optimizer", "adam", "--lr", "1e-2", "--max-update", 60, "--disable-validation"]
    assert flite("train", data, *words, "--save-dir", folder / "run") == 0
    (folder / "elsewhere").mkdir()
    return Path(shutil.move(folder / "run" / "checkpoint_last.pt", folder / "elsewhere" / "m.pt"))


@pytest.fixture(scope="module")
def model(moved) -> hub.LanguageModel:
    loaded = hub.load(moved, device="cpu")
    assert isinstance(loaded, hub.LanguageModel)
    return loaded


TEXTS = ["the old man went to sea.", "", "a ship.", "white sails far out on the water and the sea."]


def test_scores_keep_their_order_and_do_not_depend_on_batches(model):
    together = model.score(TEXTS)
    for text, one in zip(TEXTS, together, strict=True):
        alone = model.score(text)
        assert alone.text == one.text == text
        assert alone.tokens == one.tokens
        assert alone.log_probs == pytest.approx(one.log_probs, abs=1e-5)
        assert one.total == pytest.approx(sum(one.log_probs))
    assert together[1].tokens == [] and math.isnan(together[1].perplexity)
    assert together[0].tokens[0].startswith("▁")
    assert model.score("a ship.", end=True).tokens[-1] == "</s>"


def test_the_command_gives_the_same_perplexity(model, moved, data, capfd):
    options = ["--sample-break-mode", "eos", "--cpu", "--log-format", "json"]
    assert flite("eval_lm", data, "--path", moved, *options) == 0
    lines = [line.split(" | ", 3)[-1] for line in capfd.readouterr().out.splitlines()]
    printed = json.loads(lines[-1])
    texts = (data.parent / "test.txt").read_text("utf-8").splitlines()
    scored = model.score(texts, end=True)
    nats = -sum(one.total for one in scored)
    count = sum(len(one.tokens) for one in scored)
    words, size = sum(len(t.split()) for t in texts), sum(len(t) + 1 for t in texts)
    assert (printed["tokens"], printed["words"], printed["bytes"]) == (count, words, size)
    assert printed["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert printed["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert printed["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    # The line before it is fairseq's. Lengths that are not typed are those of training.
    assert lines[-2].startswith("Loss (base 2): ")
    assert any(line == "--tokens-per-sample: 64, as in training" for line in lines)
    # Words are joined in what is printed of them, not in the loss.
    assert flite("eval_lm", data, "--path", moved, *options[:3], "--output-word-stats") == 0
    stats = [line for line in capfd.readouterr().out.splitlines() if line.count("\t") == 5]
    found = {line.split(" | ", 3)[-1].split("\t")[0] for line in stats}
    assert set(WORDS) & found and not any("▁" in word for word in found)


def test_texts_behind_prompts(model):
    prompt, texts = "the old man went", [" down to the sea.", " out.", ""]
    whole, start = model.score([prompt + t for t in texts]), model.score(prompt)
    for one, all_of_it in zip(model.score(texts, prompt), whole, strict=True):
        assert one.total == pytest.approx(all_of_it.total - start.total, abs=1e-4)
        assert all_of_it.tokens == start.tokens + one.tokens
    # One prompt for each; a piece that reaches over the end of the prompt counts as text.
    (cut,) = model.score(["ld man went."], ["the o"])
    assert "".join(cut.tokens).replace("▁", " ").endswith("ld man went.")
    assert len(cut.tokens) > len(model.encode("man went."))
    with pytest.raises(ConfigError, match="2 texts and 1 prompts"):
        model.score(["a", "b"], ["c"])


def test_samples_go_on_from_the_text(model):
    prompts = ["the old man", "", "white sails"]
    options = {"sampling": True, "max_len_b": 20, "seed": 7}
    found = model.sample(prompts, **options)
    assert found == model.sample(prompts, **options)
    assert found != model.sample(prompts, **{**options, "seed": 8})
    assert all(text.startswith(p) for p, text in zip(prompts, found, strict=True))
    behind = model.sample(prompts, echo=False, **options)
    assert [p + text for p, text in zip(prompts, behind, strict=True)] == found
    greedy = [model.sample(p, max_len_b=20) for p in prompts]
    assert model.sample(prompts, max_len_b=20) == greedy
    assert model.sample(prompts[0], start="</s>", max_len_b=20) == greedy[0]


def test_records_hold_scores_and_nbest(model):
    (record,) = model.records(["the old man"], beam=3, nbest=3, max_len_b=20)
    scores = [output.score for output in record.outputs]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    best = model.score(record.outputs[0].detokenised, end=True)
    if best.tokens[:-1] == record.outputs[0].text.split():  # not cut anew into other pieces
        assert best.total / math.log(2) / len(best.tokens) == pytest.approx(scores[0], abs=1e-4)


def test_completions_of_ids(model, monkeypatch):
    texts = ["the old man", "", "white sails on the"]
    prompts = [model.encode(text) for text in texts]
    # What ends an output by itself is a symbol that none has: outputs are long.
    options = {"max_new_tokens": 24, "eos_token": "<unk>"}
    whole = model.complete(prompts, **options)
    ids = model.continue_tokens(prompts, **options)
    assert [model.decode(i).strip() for i in ids] == [text.strip() for text in whole]
    longest = 24 + len(prompts[0])
    assert whole[0] == model.sample(texts[0], echo=False, max_len_b=longest, eos_token="<unk>")
    # A string ends an output early, and what it is does not depend on the rounds this takes.
    for stop in (". a", "a", "."):
        expected = [text.split(stop)[0] for text in whole]
        assert expected != whole
        for first in (1, 3, 32):
            monkeypatch.setattr(language_model, "_FIRST_ROUND", first)
            assert model.complete(prompts, until=["", stop], **options) == expected
    drawn = {"sampling": True, "seed": 5, **options}
    assert [t.split("a")[0] for t in model.complete(prompts, **drawn)] == model.complete(
        prompts, until=["a"], **drawn
    )
    words = model.complete(prompts[:1] * 16, **{**drawn, "max_new_tokens": 2})
    assert any(text.startswith(" ") for text in words)  # as it follows the prompt's
    # The model's longest input ends an output, and so does the end symbol, which is no part of it.
    (long,) = model.continue_tokens([np.tile(prompts[0], 40)[:60]], **options)
    assert len(long) == 63 - 60
    ended = model.continue_tokens(prompts, max_new_tokens=24)
    assert all(len(found) < 24 and model.dictionary.eos() not in found for found in ended)
    texts = [text.strip() for text in model.complete(prompts, until=["zzz"], max_new_tokens=24)]
    assert texts == [model.decode(found).strip() for found in ended]
    assert model.complete(prompts[:1], max_new_tokens=0) == [""] and model.complete([]) == []
    with pytest.raises(ConfigError, match="max_len_b has no use here"):
        model.complete(prompts, max_len_b=3)
    with pytest.raises(ConfigError, match="the model takes 63"):
        model.complete([np.tile(prompts[0], 40)[:64]])


def test_interactive_reads_plain_text(model, moved, data, tmp_path, capfd):
    (tmp_path / "in").write_text("the old man\nwhite sails\n", "utf-8")
    words = ["--task", "language_modeling", "--path", moved, "--input", tmp_path / "in", "--cpu"]
    assert flite("interactive", data, *words, "--beam", "1", "--max-len-b", "20") == 0
    out = capfd.readouterr().out.splitlines()
    printed = [line.split("\t")[2] for line in out if line.startswith("D-")]
    assert printed == model.sample(["the old man", "white sails"], max_len_b=20)


def test_errors_are_one_line(model):
    long = "sea " * 100
    with pytest.raises(ConfigError, match="text 1 has .* tokens; the model takes 63"):
        model.score(["a", long])
    with pytest.raises(ConfigError, match="leaves no room: max_len_b=3"):
        model.sample("the old man went to sea", max_len_b=3)
    with pytest.raises(ConfigError, match="unknown option 'beams'"):
        model.sample("a", beams=2)
    with pytest.raises(ConfigError, match="start='<de>'"):
        model.score("a", start="<de>")
    with pytest.raises(ConfigError, match="need references"):
        model.sample("a", prefix_size=1)
