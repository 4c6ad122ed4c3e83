"""hub.load() in one process and in several: branches of shared contexts, ranks of tokens, texts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from fairseq_lite import hub
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation import branch_passes
from fairseq_lite.parallel.experts import expert_modules
from fairseq_lite.parallel.world import SingleWorld, World
from tests.helpers.distributed import run_distributed
from tests.helpers.evaluating import language_model

pytestmark = pytest.mark.timeout(300)

MOE = ("--moe-freq", 1, "--moe-expert-count", 5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    work = tmp_path_factory.mktemp("models")
    _, dense = language_model(work / "dense")
    _, moe = language_model(work / "moe", *MOE)
    return {"dense": str(dense), "moe": str(moe), "both": f"{dense}:{moe}"}


def load(path: str, world: World | None = None, **options: Any) -> hub.LanguageModel:
    model = hub.load(path, device="cpu", world=world, **options)
    assert isinstance(model, hub.LanguageModel)
    return model


@pytest.fixture(scope="module")
def dense(checkpoints: dict[str, str]) -> hub.LanguageModel:
    return load(checkpoints["dense"])


def make_requests(model: hub.LanguageModel, count: int = 30) -> list[hub.Branches]:
    """Questions behind examples, of which most have the same, with answers in common."""
    rng = np.random.default_rng(3)
    words = len(model.dictionary)

    def ids(least: int, most: int) -> np.ndarray:
        return rng.integers(4, words, rng.integers(least, most + 1))

    shots, answers = ids(8, 8), tuple(ids(1, 3) for _ in range(3))
    found = []
    for n in range(count):
        own = shots if n % 4 else ids(0, 8)
        branches = answers if n % 3 else tuple(ids(0, 4) for _ in range(n % 6))
        found.append(hub.Branches(np.concatenate([own, ids(0, 6)]), branches))
    return found


def flat(found: list[hub.BranchScores]) -> list[float]:
    """All numbers, one after another."""
    arrays = [a for one in found for a in (one.context, *one.continuations) if a is not None]
    return np.concatenate(arrays).tolist() + [float(g) for one in found for g in one.greedy]


@pytest.mark.parametrize("kind", ["dense", "moe", "both"])
def test_branches_are_scored_as_whole_texts_are(checkpoints: dict[str, str], kind: str) -> None:
    model = load(checkpoints[kind])
    requests = make_requests(model)
    found = model.score_branches(requests, context_scores=True)
    for one, request in zip(found, requests, strict=True):
        whole = [np.concatenate([request.context, c]) for c in request.continuations]
        for scores, ids in zip(one.continuations, whole, strict=True):
            ((tokens, expected),) = model.score_tokens([ids], [len(request.context)])
            assert len(tokens) == len(scores)
            assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        ((_, expected),) = model.score_tokens([request.context])
        assert one.context is not None
        assert one.context.tolist() == pytest.approx(expected, abs=1e-5)
    small = model.score_branches(requests, context_scores=True, max_tokens=1)
    assert flat(small) == pytest.approx(flat(found), abs=1e-5)


def test_greedy_is_what_the_model_goes_on_with(dense: hub.LanguageModel) -> None:
    prompts = [request.context for request in make_requests(dense, 12)]
    likeliest = dense.continue_tokens(prompts, max_new_tokens=4)
    going = [(prompt, ids) for prompt, ids in zip(prompts, likeliest, strict=True) if ids]
    requests = []
    for prompt, ids in going:
        other = [*ids[:-1], 4 if ids[-1] != 4 else 5]
        branches = [np.array(each, dtype=np.int64) for each in (ids, other, [])]
        requests.append(hub.Branches(prompt, tuple(branches)))
    assert len(requests) > 3
    assert {one.greedy for one in dense.score_branches(requests)} == {(True, False, True)}


def test_ranks_of_tokens(dense: hub.LanguageModel) -> None:
    contexts = [request.context for request in make_requests(dense, 8)]
    everything = range(len(dense.dictionary))
    wanted = [4 + n for n in range(len(contexts))]
    found = dense.rank_tokens(contexts, wanted, top=3)
    few = dense.rank_tokens(contexts, wanted, among=[6, 5, 6])
    for context, token, one, other in zip(contexts, wanted, found, few, strict=True):
        branches = tuple(np.array([i], dtype=np.int64) for i in everything)
        (scores,) = dense.score_branches([hub.Branches(context, branches)])
        each = np.concatenate(scores.continuations)
        assert one.log_prob == other.log_prob == pytest.approx(float(each[token]), abs=1e-5)
        assert one.top == tuple(np.argsort(-each, kind="stable")[:3].tolist())
        assert one.rank == 1 + int((each > each[token]).sum())
        assert other.top == ((5, 6) if each[5] > each[6] else (6, 5))
        assert other.rank == 1 + sum(bool(each[i] > each[token]) for i in (5, 6))
    assert dense.rank_tokens([], []) == []


def test_another_start_symbol(dense: hub.LanguageModel) -> None:
    (request, *_) = make_requests(dense, 1)
    bos = dense.dictionary.bos()
    assert dense.start_token() == dense.dictionary.eos()
    assert dense.start_token("<s>") == dense.start_token(bos) == bos
    plain, named, numbered = (
        flat(dense.score_branches([request], context_scores=True, start=start))
        for start in (None, "<s>", bos)
    )
    assert named == numbered != plain
    ((_, scores),) = dense.score_tokens([request.context], start="<s>")
    assert named[: len(scores)] == pytest.approx(scores, abs=1e-5)


def test_errors_are_one_line(dense: hub.LanguageModel, tmp_path: Path) -> None:
    longest = dense.max_tokens + 1  # the last token is predicted, not read
    ids = np.full(longest, 5)
    (one,) = dense.score_branches([hub.Branches(ids[3:], (ids[:3],))])
    assert len(one.continuations[0]) == 3
    (one,) = dense.score_branches([hub.Branches(ids, ())], context_scores=True)
    assert one.context is not None and len(one.context) == longest
    with pytest.raises(ConfigError, match=f"request 1 has {longest} tokens of context and 1 beh"):
        dense.score_branches([hub.Branches(ids[:2], ()), hub.Branches(ids, (ids[:1],))])
    with pytest.raises(ConfigError, match=f"request 0 .* the model takes {longest} together"):
        dense.rank_tokens([ids], [5])
    with pytest.raises(ConfigError, match="1 contexts, 2 tokens"):
        dense.rank_tokens([ids[:3]], [5, 6])
    with pytest.raises(ConfigError, match="top=0"):
        dense.rank_tokens([ids[:3]], [5], top=0)
    with pytest.raises(ConfigError, match="max_tokens=0: expected 1 or more"):
        dense.score_branches([hub.Branches(ids[:3], (ids[:1],))], max_tokens=0)
    for start in (-1, len(dense.dictionary), "<de>"):
        with pytest.raises(ConfigError, match=f"start={start!r}: not in the model's dictionary"):
            dense.score_branches([], start=start)
    with pytest.raises(ConfigError, match="device 'cuda': the world computes on cpu"):
        hub.load(tmp_path, device="cuda", world=SingleWorld())


# -- several ranks --------------------------------------------------------------------------------


def everything(world: World, path: str, how: str = "") -> dict[str, Any]:
    """What every method gives on this rank."""
    if how == "another order":
        gather = world.gather_objects
        world.gather_objects = lambda obj: gather(obj)[::-1]  # type: ignore[method-assign]
    # So few tokens are read apart only where that is cheap.
    with patch.object(branch_passes, "_WORTH_ON_CPU", 8):
        return _everything(world, path)


def _everything(world: World, path: str) -> dict[str, Any]:
    model = load(path, world)
    requests = make_requests(model)
    done: list[int] = []
    prompts = [request.context for request in requests[:9]]
    lines = [model.decode(ids) for ids in prompts]
    drawn = {"sampling": True, "max_len_b": 30, "seed": 5}
    found = {
        "branches": flat(
            model.score_branches(
                requests, context_scores=True, max_tokens=40, progress=done.append
            )
        ),
        "one": flat(model.score_branches(requests[1:2])),
        "none": model.score_branches([hub.Branches(prompts[0], ())]),
        "ranks": [(r.rank, *r.top, r.log_prob) for r in model.rank_tokens(prompts, range(4, 13))],
        "tokens": [score for _, scores in model.score_tokens(prompts) for score in scores],
        "samples": model.sample(lines, **drawn),
        "records": [o.score for r in model.records(lines, beam=2, nbest=2, max_len_b=30)
                    for o in r.outputs],
        "continued": model.continue_tokens(prompts, max_new_tokens=5),
        "complete": model.complete(prompts, until=["a"], max_new_tokens=8),
        "nothing": [model.score_branches([]), model.sample([]), model.score_tokens([])],
    }  # fmt: skip
    assert done == sorted(set(done)) and done[-1] == len(requests)
    held = {shard.expert for m in model.models for _, _, shard in expert_modules(m)}
    return {**found, "held": len(held)}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(
        np.allclose(found[name], value, rtol=1e-5, atol=1e-5)
        if name in ("branches", "one", "ranks", "tokens", "records")
        else found[name] == value
        for name, value in expected.items()
        if name != "held"
    )


@pytest.mark.parametrize("kind", ["dense", "moe", "both"])
def test_ranks_share_the_work_and_have_all_results(checkpoints: dict[str, str], kind: str) -> None:
    path = checkpoints[kind]
    (alone,) = run_distributed(everything, 1, path)
    assert len(set(alone["samples"])) > 3
    for size in (2, 3) if kind == "moe" else (2,):
        found = run_distributed(everything, size, path, timeout=200)
        assert all(same(each, alone) for each in found)
        if kind != "dense":
            assert alone["held"] == 5 and max(each["held"] for each in found) < 5


def test_results_in_another_order_are_noticed(checkpoints: dict[str, str]) -> None:
    (alone,) = run_distributed(everything, 1, checkpoints["dense"])
    for found in run_distributed(everything, 2, checkpoints["dense"], "another order"):
        assert not same({"branches": found["branches"]}, {"branches": alone["branches"]})


def test_a_translation_model_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(task=None, folder="files that it carries")
    monkeypatch.setattr(hub, "load_models", lambda *args, **kwargs: found)
    world = SingleWorld()
    world.size = 2
    with pytest.raises(ConfigError, match="world: a translation model is used by one process"):
        hub.load(Path("m.pt"), world=world)
