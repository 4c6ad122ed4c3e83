"""Public tasks under lm-evaluation-harness and in `gpt3_eval`: the same prompts, the same numbers.

Prompts go from the one to the other as texts. The harness cuts them into tokens by itself, asks our
checkpoint through our adapter and a model of transformers through its own, and decides what is
right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
import torch
from tokenizers import ByteLevelBPETokenizer

from examples.few_shot import results
from fairseq_lite import hub
from tests.helpers import harness
from tests.helpers.commands import flite
from tests.helpers.few_shot import evaluate, train_language_model
from tests.helpers.shared import shared_dir

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")

Encode = Callable[[str], Sequence[int]]

ROWS = 8
# Further words of gpt3_eval; tasks whose mask is in mid-sentence are scored behind it.
BEHIND = ("--scoring", "suffix")
EVALUATED: dict[str, tuple[object, ...]] = {
    "copa": ("--nshot", 2, "--num-trials", 1),
    "xcopa": ("--xcopa-languages", "it"),
    "piqa": (),
    "hellaswag": (),
    "boolq": (),
    "cb": (),
    "rte": (),
    "arceasy": ("--arceasy-eval-set", "test"),
    "openbookqa": ("--openbookqa-eval-set", "test"),
    "blimp__wh_island": (),
    "winograd": BEHIND,
    "winogrande": BEHIND,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    harness.reference_tasks(folder, list(harness.REFERENCE), ROWS)
    return folder


@pytest.fixture(scope="module")
def lines(tasks) -> list[str]:
    """The texts of all rows."""

    def strings(value: Any) -> list[str]:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list):
            return [text for each in value for text in strings(each)]
        return [" ".join(value.split())] if isinstance(value, str) else []

    rows = [line for path in tasks.glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    return [text for row in rows for text in strings(json.loads(row)) if text]


@pytest.fixture(scope="module")
def checkpoint(lines, tmp_path_factory) -> Path:
    """A model that has read the rows once, in pieces of their words."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "train.txt").write_text("\n".join(lines) + "\n", "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "train.txt"),
        model_prefix=str(folder / "sp"),
        vocab_size=800,
        model_type="bpe",
        character_coverage=1.0,
        minloglevel=2,
    )
    words = ["--only-source", "--trainpref", folder / "train.txt", "--destdir", folder / "data"]
    words += ["--bpe", "sentencepiece", "--sentencepiece-model", folder / "sp.model"]
    assert flite("preprocess", *words) == 0
    return train_language_model(folder / "data", folder / "run", updates=20)


@pytest.fixture(scope="module")
def adapter(checkpoint):
    from fairseq_lite.hub.lm_eval import FairseqLiteLM

    return FairseqLiteLM(path=str(checkpoint), device="cpu", batch_size="auto")


def test_the_harness_asks_what_the_model_says(tasks, checkpoint, adapter):
    names = list(harness.REFERENCE)
    assert len(names) == 13
    found = harness.evaluate(tasks, names, adapter)
    model = hub.load(checkpoint, device="cpu")
    for name in names:
        samples = found[name].samples
        assert len(samples) == ROWS
        pairs = [pair for sample in samples for pair in sample.pairs]
        plain = model.score([text for _, text in pairs], [context for context, _ in pairs])
        scores = [score for sample in samples for score in sample.log_probs]
        assert scores == pytest.approx([one.total for one in plain], abs=1e-4), name
        assert len(set(scores)) > ROWS


# -- gpt3_eval ------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What `gpt3_eval` found of a task's rows.

    Attributes:
        accuracy: of all, in percent.
        right: whether it was right, row by row.
        rows: what is to be asked of the harness instead.
        scored: context and log-probabilities of whole prompts, option by option.
    """

    accuracy: float
    right: list[bool]
    rows: list[harness.Row]
    scored: list[list[tuple[str, list[float]]]]


def answers_of(model: object, names: Sequence[str], folder: Path) -> dict[str, Answers]:
    """Evaluate tasks; what was cut to fit is left out, as the harness leaves a token more."""
    common = (
        *("--nshot", 0, "--n", ROWS, "--cpu", "--data-dir", shared_dir("data", "fewshot")),
        *("--results-dir", folder, "--add-prompt-to-meta", "--add-positional-scores-to-meta"),
    )
    found: dict[str, Answers] = {}
    # The same words for many tasks at once: a model is loaded for each call.
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        groups.setdefault(EVALUATED[name], []).append(name)
    for words, group in groups.items():
        for one in evaluate(model, *common, "--tasks", *group, *words):
            lines = results.read_rows(folder / one["predictions"][0])
            lines = [line for line in lines if not line["pred_meta"]["tokens_cut"]]
            asked = [_asked(line["candidates"], words == BEHIND) for line in lines]
            right = [any(s["gold"] and s["best"] for _, s in each["candidates"]) for each in lines]
            rows, scored = [list(each) for each in zip(*asked, strict=True)]
            found[one["task"]] = Answers(one["accuracy"]["mean"], right, rows, scored)
    return found


def _asked(
    candidates: Sequence[tuple[str, dict]], behind: bool
) -> tuple[harness.Row, list[tuple[str, list[float]]]]:
    """A row for the harness out of a prediction, and what it has to find.

    Args:
        candidates: of the prediction, with their prompts.
        behind: the answers stand in mid-sentence, and what is scored comes behind them.
    """
    metas = [said["meta"] for _, said in candidates]
    prompts = [meta["prompt"] for meta in metas]
    gold = [said["gold"] for _, said in candidates].index(True)
    if behind:
        rest = _common_end(prompts)
        contexts = [text.removesuffix(rest) for text in prompts]
        row = {"context_options": contexts, "continuation": rest, "gold": gold}
    else:
        contexts = [t[: len(t) - m["characters"]] for t, m in zip(prompts, metas, strict=True)]
        answers = [t[len(c) :] for t, c in zip(prompts, contexts, strict=True)]
        assert len(set(contexts)) == 1
        row = {"query": contexts[0], "choices": answers, "gold": gold}
    scores = [meta["positional_scores"] for meta in metas]
    return row, list(zip(contexts, scores, strict=True))


def _common_end(texts: Sequence[str]) -> str:
    """What all texts end with, from a space on."""
    places = range(min(map(len, texts)))
    same = takewhile(lambda i: len({text[-1 - i] for text in texts}) == 1, places)
    end = texts[0][len(texts[0]) - len(list(same)) :]
    return end[end.index(" ") :]


def assert_alike(
    ours: Mapping[str, Answers], encode: Encode, lm: Any, folder: Path, **more: Any
) -> None:
    """The harness finds the same of the same prompts: log-probabilities and what is right."""
    for name, found in ours.items():
        config = harness.CONTEXTS if EVALUATED[name] == BEHIND else harness.CHOICE
        harness.write_task(folder, name, found.rows, {**config, "target_delimiter": ""})
    theirs = harness.evaluate(folder, list(ours), lm, **more)
    for name, found in ours.items():
        assert len(found.right) >= ROWS // 2
        for sample, scored in zip(theirs[name].samples, found.scored, strict=True):
            expected = [math.fsum(scores[len(encode(c.rstrip())) :]) for c, scores in scored]
            assert sample.log_probs == pytest.approx(expected, abs=1e-4), name
        assert [bool(s.metrics["acc"]) for s in theirs[name].samples] == found.right, name
        if len(found.right) == ROWS:
            assert 100 * theirs[name].accuracy == pytest.approx(found.accuracy)


def test_prompts_of_the_evaluator_score_alike(checkpoint, adapter, tmp_path):
    ours = answers_of(checkpoint, list(EVALUATED), tmp_path / "results")
    assert set(ours) == set(EVALUATED) and len(ours) == 12
    assert_alike(ours, adapter.tok_encode, adapter, tmp_path / "tasks")
    # Shots stand in the prompts.
    assert ours["copa"].rows[0]["query"].count(".") >= 2


def test_transformers_scores_them_alike(lines, tmp_path):
    """A model of transformers: our predictor, and the harness's own adapter."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="the harness's own adapter needs accelerate")
    torch.manual_seed(1)
    sizes = {"n_positions": 512, "n_embd": 16, "n_layer": 2, "n_head": 2}
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator(lines, vocab_size=600, special_tokens=["<|endoftext|>"])
    config = transformers.GPT2Config(
        vocab_size=tokens.get_vocab_size(), bos_token_id=0, eos_token_id=0, **sizes
    )
    model = transformers.GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():  # scores that differ by more than a little
        if parameter.dim() == 2:
            parameter.data *= 8 if "wte" in name else 2
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    ours = answers_of(tmp_path / "gpt2", list(EVALUATED), tmp_path / "results")
    assert len(ours) == 12
    args = {"pretrained": str(tmp_path / "gpt2"), "dtype": "float32", "device": "cpu"}

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert_alike(ours, encode, "hf", tmp_path / "tasks", model_args=args, batch_size=8)
