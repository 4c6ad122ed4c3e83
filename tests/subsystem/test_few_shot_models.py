"""Models that answer requests of few-shot evaluation: ours, and Hugging Face's of any architecture.

Whatever is shared and batched, each answer is that of the model which reads this one text alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.few_shot.models import causal, stems
from examples.few_shot.models.api import GenerateRequest, Model, Ranked, ScoreRequest, Scores
from examples.few_shot.models.causal import CausalReader, Limits
from examples.few_shot.models.flite import FliteModel
from fairseq_lite import hub
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.parallel.world import World
from fairseq_lite.training.checkpoint import store
from tests.helpers.distributed import run_distributed
from tests.helpers.few_shot import (
    EXPERTS,
    WORDS,
    evaluate,
    train_language_model,
    write_copa,
    write_language_data,
)
from tests.helpers.huggingface import ARCHITECTURES, VOCABULARY, save, tiny_model, tokenizer

pytest.importorskip("transformers", reason="transformers is not installed")

from examples.few_shot.models.huggingface import HuggingFaceModel

Ids = np.ndarray[Any, np.dtype[np.int64]]


def some_requests(seed: int = 1) -> list[ScoreRequest]:
    """Contexts that begin alike and do not, also none; equal ones, and one inside another."""
    random = np.random.default_rng(seed)

    def tokens(count: int) -> Ids:
        return random.integers(3, VOCABULARY, count)

    shots, question = tokens(40), tokens(36)
    contexts = [
        np.concatenate([shots, tokens(3)]),
        np.concatenate([shots, question, tokens(2)]),
        np.concatenate([shots, question]),
        np.concatenate([shots, question, tokens(2)]),
        np.concatenate([shots, tokens(3)]),
        tokens(5),
        tokens(0),
        tokens(1),
    ]
    contexts.append(contexts[0])
    return [
        ScoreRequest(context, tuple(tokens(n) for n in (1, 3, 2)[: 1 + number % 3]), number == 7)
        for number, context in enumerate(contexts)
    ]


def assert_same(found: list[Scores], expected: list[Scores]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.greedy == other.greedy
        assert (one.context is None) == (other.context is None)
        if one.context is not None:
            assert one.context == pytest.approx(other.context, abs=1e-5)
        for mine, its in zip(one.continuations, other.continuations, strict=True):
            assert mine == pytest.approx(its, abs=1e-5)


# -- any architecture -----------------------------------------------------------------------------


@torch.inference_mode()
def alone(model: Any, request: ScoreRequest, start: list[int], prefix: int) -> Scores:
    """What the model says that reads each text from its beginning."""

    def log_probs(ids: Ids) -> torch.Tensor:
        found = model(input_ids=torch.tensor(ids)[None], attention_mask=torch.ones(1, len(ids)))
        return found.logits[0].log_softmax(-1)

    first = start or ([prefix] if request.unprompted or not len(request.context) else [])
    n = len(request.context)
    rows, greedy = [], []
    for continuation in request.continuations:
        text = np.concatenate([first, request.context, continuation]).astype(np.int64)
        table = log_probs(text)
        own = [table[i - 1, text[i]].item() for i in range(1, len(text))]
        if not first:
            own = [log_probs(np.array([prefix]))[0, text[0]].item(), *own]
        rows.append(own)
        best = table.argmax(-1)
        places = range(len(text) - len(continuation), len(text))
        greedy.append(all(best[i - 1] == text[i] for i in places))
    return Scores(
        np.array(rows[0][:n], dtype=np.float32),
        tuple(np.array(row[n:], dtype=np.float32) for row in rows),
        tuple(greedy),
    )


LIMITS = [Limits(), Limits(50), Limits(1), Limits(4096, 1)]


@pytest.mark.parametrize("begins", [False, True], ids=["no_start", "start"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_each_text_by_itself(
    architecture: str, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny_model(architecture), tokenizer(begins=begins)
    requests = some_requests()
    expected = [alone(model, each, [0] if begins else [], 0) for each in requests]
    # A greedy continuation, too.
    best = best_next(model, requests[0].context, 3, [0] if begins else [])
    requests.append(ScoreRequest(requests[0].context, (best,)))
    expected.append(alone(model, requests[-1], [0] if begins else [], 0))
    assert expected[-1].greedy == (True,)
    for limits in LIMITS:
        if limits.tokens == 50:  # logits in pieces
            monkeypatch.setattr(causal, "_LOGITS", 4 * VOCABULARY)
        given = HuggingFaceModel(model, text, limits=limits)
        assert given.reader.caches == (architecture != "state_space")
        assert given.reader.pads == (architecture in ("gpt2", "llama"))
        assert_same(given.score(requests, context_scores=True), expected)
        without = [Scores(None, each.continuations, each.greedy) for each in expected]
        assert_same(given.score(requests), without)


@torch.inference_mode()
def best_next(model: Any, context: Ids, count: int, start: list[int]) -> Ids:
    """The likeliest tokens one after another."""
    ids = [*start, *context.tolist()]
    for _ in range(count):
        mask = torch.ones(1, len(ids))
        out = model(input_ids=torch.tensor(ids)[None], attention_mask=mask)
        ids.append(int(out.logits[0, -1].argmax()))
    return np.array(ids[-count:])


def of_the_first_row(cache: Any, rows: torch.Tensor) -> Any:
    return _selected(cache, torch.zeros_like(rows))


def as_it_is(cache: Any, rows: torch.Tensor) -> Any:
    """Layers that the next batch behind the same stem finds longer."""
    if cache is not None:
        cache.batch_select_indices(rows)
    return cache


def deeper(sequences: Any, **_: int) -> stems.Stem:
    """Stems of texts that do not begin alike."""
    return stems.Stem(0, (), (stems.Stem(1, tuple(range(len(sequences))), (), 0),), 0)


_selected = causal._selected


@pytest.mark.parametrize(
    ("name", "fault"),
    [("_selected", of_the_first_row), ("_selected", as_it_is), ("grow", deeper)],
)
def test_the_comparison_sees_faults(
    name: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    requests = [each for each in some_requests() if len(each.context) > 1]
    expected = [alone(model, each, [], 0) for each in requests]
    given = HuggingFaceModel(model, tokenizer())
    assert_same(given.score(requests, context_scores=True), expected)
    monkeypatch.setattr(causal, name, fault)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        assert_same(given.score(requests, context_scores=True), expected)


def test_what_texts_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("llama"), some_requests()
    reader = CausalReader(model, Limits())
    read = 0
    forward = model.forward

    def counted(*, input_ids: Any, **more: Any) -> Any:
        nonlocal read
        read += input_ids.numel()
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "forward", counted)
    contexts = [each.context for each in requests if len(each.context) > 40]
    for _ in reader.read(contexts):
        pass
    # The shots, then the question; and of every text what it has alone, padded to three tokens.
    assert read == 40 + 35 + 3 * 3 + 3 * 3 and sum(map(len, contexts)) == 361


# -- Hugging Face's models ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hf") / "llama")


def load(path: Path, **options: Any) -> HuggingFaceModel:
    return HuggingFaceModel.load(str(path), **options)


def prompts(model: Model, *lengths: int) -> list[Ids]:
    random = np.random.default_rng(3)
    return [model.encode(" ".join(random.choice(WORDS, n).tolist())) for n in lengths]


def test_a_folder_is_read_and_known_again(theirs: Path, tmp_path: Path) -> None:
    model = load(theirs)
    assert model.max_tokens == 512
    text = "the old man, 3 ships & naïve water"
    ids = model.encode(text)
    assert model.tokenizer.decode(ids) == text and len(model.symbols(ids)) == len(ids)
    assert model.end == model.tokenizer.eos_token_id == 0
    known = model.identity()
    names = [each["name"] for each in known["files"]]
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(names)
    json.dumps(known)
    copy = Path(shutil.copytree(theirs, tmp_path / "copy"))
    assert load(copy).identity() == known
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert load(copy).identity()["sha256"] != known["sha256"]


def test_a_model_of_the_cache_goes_by_its_name(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="`hf download org/name`") as caught:
        HuggingFaceModel.load("huggingface_org=name")
    assert "\n" not in str(caught.value)
    there = tmp_path / "models--org--name"
    shutil.copytree(theirs, there / "snapshots" / "0123abc")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("0123abc")
    for name in ("huggingface_org=name", "org/name"):
        assert HuggingFaceModel.load(name).identity() == load(theirs).identity()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def of_translation(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("harm", [cut, of_translation, without_tokenizer, without_config])
def test_what_cannot_be_read_is_one_line(
    harm: Callable[[Path], None], theirs: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(theirs, tmp_path / "model"))
    harm(folder)
    with pytest.raises(CheckpointError, match=str(folder)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_what_is_written_is_likeliest_and_ends_where_it_should(theirs: Path) -> None:
    model = load(theirs)
    given = prompts(model, 4, 9, 4, 9, 2)
    whole = model.generate([GenerateRequest(each, 9) for each in given])
    for prompt, text in zip(given, whole, strict=True):
        best = best_next(model.model, prompt, 9, []).tolist()
        best = best[: best.index(0)] if 0 in best else best
        head = model.tokenizer.decode(prompt)
        assert head + text == model.tokenizer.decode([*prompt.tolist(), *best])
    # One of them is stopped by a string in its middle.
    number = max(range(len(whole)), key=lambda n: len(whole[n]))
    stop = whole[number][len(whole[number]) // 2 :][:2]
    stopped = model.generate([GenerateRequest(each, 9, ("", stop, "never")) for each in given])
    assert stopped[number] == whole[number].partition(stop)[0] != whole[number]
    assert stopped == [text.partition(stop)[0] for text in whole]
    assert model.generate([GenerateRequest(given[0], 0)]) == [""]


def test_beams_are_those_of_each_prompt_by_itself(theirs: Path) -> None:
    model = load(theirs, limits=Limits(20))
    given = prompts(model, 3, 5, 8, 3, 5)
    found = model.generate([GenerateRequest(each, 6) for each in given], beam=4)
    for prompt, text in zip(given, found, strict=True):
        (best,) = model.model.generate(
            torch.tensor(prompt)[None], max_new_tokens=6, num_beams=4, do_sample=False,
            attention_mask=torch.ones(1, len(prompt)),
        )  # fmt: skip
        head = model.tokenizer.decode(prompt)
        assert head + text == model.tokenizer.decode(best, skip_special_tokens=True)
    assert found != model.generate([GenerateRequest(each, 6) for each in given])


def test_a_prompt_that_fills_the_model(theirs: Path) -> None:
    model = load(theirs)
    ids = np.full(model.max_tokens, 5)
    (text,) = model.generate([GenerateRequest(ids, 50)])
    assert text in ("", model.tokenizer.decode(best_next(model.model, ids, 1, [])))
    (found,) = model.score([ScoreRequest(ids[:-1], (ids[:1],))])
    assert np.isfinite(found.continuations[0]).all()


@pytest.mark.parametrize("among", [None, (7, 9, 9, 11, 3)])
def test_ranks_are_places_among_all_that_could_follow(theirs: Path, among: Any) -> None:
    model = load(theirs, limits=Limits(16))
    contexts = [each.context for each in some_requests()]
    wanted = [int(each.continuations[0][0]) for each in some_requests()]
    found = model.rank(contexts, wanted, top=3, among=among)
    for context, token, one in zip(contexts, wanted, found, strict=True):
        ids = torch.tensor(context if len(context) else np.array([0]))[None]
        with torch.inference_mode():
            table = model.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        counted = sorted(set(range(VOCABULARY) if among is None else among))
        order = sorted(counted, key=lambda t: -table[t].item())
        assert one.log_prob == pytest.approx(table[token].item(), abs=1e-5)
        assert one.rank == 1 + sum(table[t] > table[token] for t in counted)
        assert one.top == tuple(order[:3])


def answers(model: Model) -> tuple[list[Scores], list[str], list[Ranked]]:
    """All that a model can be asked."""
    requests = some_requests()
    most = 100  # tokens that every model here has
    requests = [
        ScoreRequest(each.context % most, tuple(c % most for c in each.continuations))
        for each in requests
    ]
    contexts = [each.context for each in requests]
    texts = model.generate(
        [GenerateRequest(each, 3 + len(each) % 2, ("e",)) for each in prompts(model, 2, 5, 2, 7)]
    )
    return (
        model.score(requests, context_scores=True),
        texts,
        model.rank(contexts, [5] * len(contexts), top=2),
    )


def assert_same_answers(found: Any, expected: Any) -> None:
    assert_same(found[0], expected[0])
    assert found[1] == expected[1]
    for one, other in zip(found[2], expected[2], strict=True):
        assert (one.rank, one.top) == (other.rank, other.top)
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)


def their_answers(world: World, path: Path) -> Any:
    model = load(path, world=world)
    assert model.agree(world.rank) == 0
    seen: list[int] = []
    model.score(some_requests(), progress=seen.append)
    assert seen == sorted(seen) and seen[-1] <= len(some_requests())
    return answers(model), model.identity()


def test_processes_share_the_work(theirs: Path) -> None:
    (expected, known), *_ = run_distributed(their_answers, 1, theirs)
    for found, said in run_distributed(their_answers, 2, theirs):
        assert_same_answers(found, expected)
        assert said == known


def test_the_command_with_hugging_faces_models(theirs: Path, tmp_path: Path) -> None:
    tasks = write_copa(tmp_path / "data")
    words = ["--tasks", "copa", "--nshot", 0, 2, "--num-trials", 1, "--data-dir", tasks]
    one = evaluate(theirs, *words, "--results-dir", tmp_path / "one", "--batch-size", 1)
    named = ["--predictor-name", "clmpromptinghuggingface", "--results-dir", tmp_path / "two"]
    two = evaluate(theirs, *words, *named, "--max-tokens", 60)
    for a, b in zip(one, two, strict=True):
        assert a["accuracy"] == b["accuracy"]
        key = "ppl_full_selected_candidate"
        assert a[key]["mean"] == pytest.approx(b[key]["mean"], rel=1e-5)
        assert a["model"]["kind"] == "huggingface"
        assert {"torch", "transformers", "tokenizers"} <= a["versions"].keys()
        assert not {"gguf", "sentencepiece", "sacrebleu"} & a["versions"].keys()


# -- ours -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_data(tmp_path_factory.mktemp("few-shot-text") / "text")


@pytest.fixture(scope="module")
def ours(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("few-shot-ours")
    sharded = ["--ddp-backend", "fully_sharded", "--use-sharded-state", "--min-params-to-wrap", 0,
               "--distributed-world-size", 2]  # fmt: skip
    return {
        "dense": train_language_model(
            data, folder / "dense", "--save-interval-updates", 2, updates=4
        ),
        "moe": train_language_model(data, folder / "moe", *EXPERTS, updates=4),
        "sharded": train_language_model(data, folder / "sharded", *sharded, updates=3),
    }


def our_answers(world: World, path: Path, options: dict[str, Any]) -> Any:
    model = FliteModel(str(path), world=world, **options)
    assert model.agree(world.rank) == 0
    return answers(model)


@pytest.mark.parametrize("kind", ["dense", "moe", "sharded"])
def test_limits_and_processes_change_nothing(kind: str, ours: dict[str, Path]) -> None:
    path = ours[kind]
    (expected,) = run_distributed(our_answers, 1, path, {})
    for options in ({"max_prompts": 1}, {"max_prompts": 4, "max_tokens": 30}):
        (found,) = run_distributed(our_answers, 1, path, options)
        assert_same_answers(found, expected)
    for found in run_distributed(our_answers, 2, path, {"max_prompts": 3}):
        assert_same_answers(found, expected)


def test_scores_are_those_of_the_hub(ours: dict[str, Path]) -> None:
    model, lm = FliteModel(str(ours["dense"])), hub.load(ours["dense"])
    assert isinstance(lm, hub.LanguageModel)
    text, more = "the old man", " went down"
    ids, whole = model.encode(text), model.encode(text + more)
    (found,) = model.score([ScoreRequest(ids, (whole[len(ids) :],))], context_scores=True)
    assert found.context is not None
    scores = [*found.context.tolist(), *found.continuations[0].tolist()]
    assert scores == pytest.approx(lm.score(text + more).log_probs, abs=1e-5)
    assert model.end == lm.dictionary.eos()
    with pytest.raises(ConfigError, match="<xx>"):
        FliteModel(str(ours["dense"]), start="<xx>")


def test_the_checkpoint_of_an_update(ours: dict[str, Path], tmp_path: Path) -> None:
    tasks = write_copa(tmp_path / "data")
    words = ["--tasks", "copa", "--nshot", 0, "--data-dir", tasks, "--results-dir", tmp_path]
    (found,) = evaluate(ours["dense"].parent, *words, "--num-training-updates", 2)
    assert [each["name"] for each in found["model"]["files"]] == ["checkpoint_1_2.pt"]
    assert {"torch", "sentencepiece"} <= found["versions"].keys()
    assert "transformers" not in found["versions"]


@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_that_carries_no_files_segments_with_those_beside_it(
    there: bool, data: Path, ours: dict[str, Path], tmp_path: Path
) -> None:
    state = store.load(ours["dense"])
    own = state["fairseq_lite"]
    files = own.pop("files", None) or own.pop("bundle")
    assert files
    for section in ("bpe", "tokenizer"):
        state["cfg"][section] = None
    path = tmp_path / "model.pt"
    torch.save(state, path)
    shutil.copy(data / "dict.txt", tmp_path)
    if there:
        shutil.copy(data.parent / "sp.model", tmp_path / "sentencepiece.bpe.model")
    text = "the old man went down"
    expected = FliteModel(str(ours["dense"])).encode(text)
    assert np.array_equal(FliteModel(str(path)).encode(text), expected) == there
