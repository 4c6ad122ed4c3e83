"""Our language models under lm-evaluation-harness, and what it finds of the same model elsewhere.

The reference is a model that transformers runs and the harness's own adapter asks: OPT is fairseq's
transformer, so its weights can be ours.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fairseq_lite import hub
from tests.helpers import harness
from tests.helpers.commands import flite

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")

WORDS = "the old man went down to sea and saw a ship with white sails far out on water".split()
POSITIONS = 24
SHAPE = "embed-dim 16 input-dim 16 output-dim 16 ffn-embed-dim 32 layers 2 attention-heads 2"
# What makes the model one that OPT can be: learned positions and no factor before them.
LIKE_OPT = ["--decoder-learned-pos", "--no-scale-embedding", "--decoder-normalize-before"]


def sentence(rng: random.Random, low: int, high: int) -> str:
    """Mostly each word's own successors, so that there is something to be learned."""
    found = [rng.randrange(len(WORDS))]
    for _ in range(rng.randint(low, high) - 1):
        found.append((found[-1] * 2 + rng.choice((1, 1, 1, 2, 5))) % len(WORDS))
    return " ".join(WORDS[i] for i in found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of words, trained for a moment."""
    folder = tmp_path_factory.mktemp("harness")
    rng = random.Random(3)
    text = "\n".join(sentence(rng, 4, 20) for _ in range(200)) + "\n"
    (folder / "train.txt").write_text(text, "utf-8")
    words = ["--only-source", "--trainpref", folder / "train.txt", "--destdir", folder / "data"]
    assert flite("preprocess", *words) == 0
    pairs = SHAPE.split()
    shape = [w for k, v in zip(pairs[::2], pairs[1::2], strict=True) for w in (f"--decoder-{k}", v)]
    options = ["--task", "language_modeling", "--arch", "transformer_lm", *shape, *LIKE_OPT]
    options += ["--share-decoder-input-output-embed", "--tokens-per-sample", POSITIONS]
    options += ["--sample-break-mode", "eos", "--max-tokens", 800, "--optimizer", "adam"]
    options += ["--lr", "2e-2", "--max-update", 40, "--disable-validation", "--cpu"]
    assert flite("train", folder / "data", *options, "--save-dir", folder / "run") == 0
    return folder


@pytest.fixture(scope="module")
def model(run) -> hub.LanguageModel:
    found = hub.load(run / "run" / "checkpoint_last.pt", device="cpu")
    assert isinstance(found, hub.LanguageModel)
    return found


@pytest.fixture(scope="module")
def adapter(run):
    from fairseq_lite.hub.lm_eval import FairseqLiteLM

    return FairseqLiteLM(path=str(run / "run" / "checkpoint_last.pt"), device="cpu")


@pytest.fixture(scope="module")
def opt(run, model) -> dict:
    """Arguments of the harness's `hf` for the same model as transformers has it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    (ours,) = model.models
    symbols, folder = [model.dictionary[i] for i in range(len(model.dictionary))], run / "opt"
    config = transformers.OPTConfig(
        vocab_size=len(symbols),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    theirs = transformers.OPTForCausalLM(config)
    weights = {
        "model." + name.replace("decoder.layer_norm", "decoder.final_layer_norm"): value
        for name, value in ours.state_dict().items()
        if name in _weights(theirs)
    }
    missing = theirs.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    theirs.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}


def _weights(theirs) -> set[str]:
    """Names of ours that theirs has."""
    names = {name.removeprefix("model.") for name in theirs.state_dict()}
    return {n.replace("decoder.final_layer_norm", "decoder.layer_norm") for n in names}


# -- against transformers and the harness's own adapter --------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """One task of each kind that the harness has."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(5)

    def options(low: int, high: int) -> list[str]:
        return [sentence(rng, low, high) for _ in range(3)]

    rows = [
        {"query": sentence(rng, 2, 9), "choices": options(1, 6), "gold": i % 3} for i in range(12)
    ]
    harness.write_task(folder, "choices", rows)
    empty = [{"query": "", "choices": options(3, 12), "gold": 0} for _ in range(4)]
    harness.write_task(folder, "empty", empty)
    partial = [
        {"context_options": options(2, 8), "continuation": sentence(rng, 1, 5), "gold": i % 3}
        for i in range(6)
    ]
    harness.write_task(folder, "contexts", partial, harness.CONTEXTS)
    texts = [{"text": sentence(rng, n, n)} for n in (1, 20, 23, 24, 25, 47, 60, 100)]
    harness.write_task(folder, "texts", texts, harness.TEXTS)
    prompts = [{"text": sentence(rng, n, n), "answer": "ship"} for n in (1, 3, 9, 15, 20)]
    harness.write_task(folder, "answers", prompts, harness.ANSWERS)
    return folder


def equal(ours: harness.Evaluated, theirs: harness.Evaluated, tolerance: float = 1e-4) -> None:
    """The same of everything, row for row."""
    for mine, other in zip(ours.samples, theirs.samples, strict=True):
        assert mine.pairs == other.pairs
        assert mine.log_probs == pytest.approx(other.log_probs, abs=tolerance)
        assert mine.greedy == other.greedy
        assert mine.metrics == pytest.approx(other.metrics, abs=tolerance)
    assert ours.metrics == pytest.approx(theirs.metrics, abs=tolerance)


def test_scores_are_those_of_transformers(tasks, adapter, opt):
    names = ["choices", "empty", "contexts"]
    theirs = harness.evaluate(tasks, names, "hf", {**opt, "add_bos_token": True}, batch_size=4)
    ours = harness.evaluate(tasks, names, adapter)
    for name in names:
        equal(ours[name], theirs[name])
    found = [greedy for name in names for s in ours[name].samples for greedy in s.greedy]
    assert len(found) == 66 and len({round(s) for s in ours["choices"].samples[0].log_probs}) > 1


def test_windows_of_whole_texts_are_the_harness_own(tasks, adapter, opt):
    # With it, the harness's adapter scores the start symbol as a token of the text.
    theirs = harness.evaluate(tasks, ["texts"], "hf", {**opt, "add_bos_token": False})["texts"]
    ours = harness.evaluate(tasks, ["texts"], adapter)["texts"]
    equal(ours, theirs)
    assert ours.metrics["word_perplexity"] > 2


def test_outputs_are_those_of_transformers(tasks, adapter, opt):
    theirs = harness.evaluate(tasks, ["answers"], "hf", {**opt, "add_bos_token": True})["answers"]
    ours = harness.evaluate(tasks, ["answers"], adapter)["answers"]
    outputs = [sample.output.split() for sample in ours.samples]
    assert outputs == [sample.output.split() for sample in theirs.samples]
    assert any(outputs) and all("ship" not in found for found in outputs)
