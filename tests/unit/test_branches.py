"""Continuations of shared contexts: what is computed together is what each has alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lite.generation import branch_passes, branch_plan, branches, packed
from fairseq_lite.generation.branch_plan import Branches, Tree, collect, grow, plan, shares
from fairseq_lite.generation.branches import (
    BranchReader,
    pick_ranks,
    pick_scores,
    scores_of,
)
from fairseq_lite.models.transformer_lm import TransformerLanguageModel
from tests.helpers.generation import PlainLanguageModel, make_language_model

START, PAD, UNK, WORDS = 2, 1, 3, 14


def ids(*tokens):
    return np.array(tokens, dtype=np.int64)


def text(rng, most):
    return rng.integers(4, WORDS, rng.integers(0, most + 1))


def make_requests(count, seed=0):
    """Contexts behind stems that some share, with up to seven continuations, some of them twice."""
    rng = np.random.default_rng(seed)
    short, long = rng.integers(4, WORDS, 6), rng.integers(4, WORDS, 15)
    stems = [ids(), short, np.concatenate([short, long]), np.concatenate([short[:3], long])]
    found = []
    for _ in range(count):
        context = np.concatenate([stems[rng.integers(len(stems))], text(rng, 5)])
        continuations = [text(rng, 6) for _ in range(rng.integers(0, 7))]
        found.append(Branches(context, tuple(continuations + continuations[1:2])))
    found.append(Branches(stems[2], (ids(5), ids(5, 6), ids(5, 6), ids(5, 7, 8))))
    return found


# -- the plan -------------------------------------------------------------------------------------

tokens = st.lists(st.integers(4, 6), max_size=6).map(lambda t: np.array(t, dtype=np.int64))
requests = st.lists(
    st.builds(Branches, tokens, st.lists(tokens, max_size=5).map(tuple)), min_size=1, max_size=12
)


def what_is_asked(requests, context_scores):
    """(text before it, token) -> for how many places of results it is asked."""
    found = Counter()
    distinct = {(r.context.tobytes(), c.tobytes()): (r.context, c)
                for r in requests for c in r.continuations}  # fmt: skip
    for context, continuation in distinct.values():
        whole = [START, *context.tolist(), *continuation.tolist()]
        for n in range(len(context) + 1, len(whole)):
            found[tuple(whole[:n]), whole[n]] += 1
    if context_scores:
        for context in {r.context.tobytes(): r.context for r in requests}.values():
            whole = [START, *context.tolist()]
            for n in range(1, len(whole)):
                found[tuple(whole[:n]), whole[n]] += 1
    return found


@settings(deadline=None, max_examples=60)
@given(requests, st.booleans(), st.integers(1, 30), st.integers(1, 20), st.integers(1, 6))
def test_a_plan_reads_every_token_behind_its_own_text(
    requests, context_scores, max_tokens, worth, tree_tokens
):
    units, places = collect(requests, START, context_scores=context_scores)
    steps = plan(units, max_tokens=max_tokens, worth=worth, tree_tokens=tree_tokens)
    found, into = Counter(), []
    past = []
    for step in steps:
        assert step.keep <= len(past)
        past = past[: step.keep] + step.stem[step.keep :].tolist()
        assert past == step.stem.tolist()  # what is kept of those before is what this begins with
        assert [row for batch in step.batches for row in batch] == sorted(
            step.rows, key=lambda row: row.size
        )
        for batch in step.batches:
            read = sum(row.size - len(past) for row in batch)
            assert read <= max_tokens or len(batch) == 1
        for row in step.rows:
            assert row.prefix[: len(past)].tolist() == past
            before = row.prefix.tolist()
            sight = row.tree.sight()
            assert row.tree.depths.tolist() == (sight.sum(axis=1) - 1).tolist()
            for at, target, place in zip(row.at, row.targets, row.into, strict=True):
                if at < len(before):
                    seen = before[: at + 1]
                else:
                    seen = before + row.tree.tokens[sight[at - len(before)]].tolist()
                found[tuple(seen), int(target)] += 1
                into.append(int(place))
    assert found == what_is_asked(requests, context_scores)
    assert sorted(into) == list(range(sum(unit.results for unit in units)))
    for request, place in zip(requests, places, strict=True):
        sizes = [own.stop - own.start for own in place.continuations]
        assert sizes == [len(c) for c in request.continuations]
        assert (place.context is None) != context_scores


@settings(deadline=None, max_examples=30)
@given(requests, st.randoms())
def test_the_order_of_requests_makes_no_difference(requests, random):
    order = list(range(len(requests)))
    random.shuffle(order)
    options = {"max_tokens": 9, "worth": 4, "tree_tokens": 4}
    first, places = collect(requests, START)
    second, others = collect([requests[i] for i in order], START)
    for a, b in zip(plan(first, **options), plan(second, **options), strict=True):
        assert a.keep == b.keep and a.stem.tolist() == b.stem.tolist()
        for x, y in zip(a.rows, b.rows, strict=True):
            assert x.prefix.tolist() == y.prefix.tolist() and x.into.tolist() == y.into.tolist()
    assert [places[i] for i in order] == others


def test_what_continuations_begin_with_stands_in_the_tree_once():
    tree = grow([ids(), ids(7), ids(7, 8, 9), ids(7, 8, 9, 4), ids(7, 9, 5)])
    assert tree.tokens.tolist() == [7, 8, 9, 9]
    assert tree.depths.tolist() == [0, 1, 2, 1]
    assert [path.tolist() for path in tree.paths] == [[], [], [0, 1], [0, 1, 2], [0, 3]]
    assert tree.sight().astype(int).tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1],
    ]  # fmt: skip


def tokens_read(requests, **options):
    units, _ = collect(requests, START)
    steps = plan(units, **{"max_tokens": 1000, "worth": 10, **options})
    stems = [len(step.stem) - step.keep for step in steps]
    rows = sum(row.size - len(step.stem) for step in steps for row in step.rows)
    return [n for n in stems if n], rows


def test_stems_within_stems():
    rng = np.random.default_rng(0)
    shots, paragraphs = rng.integers(4, WORDS, 40), rng.integers(4, WORDS, (3, 20))
    asked = (ids(5), ids(6))
    questions = [
        Branches(np.concatenate([shots, paragraph, [q, q, q]]), asked)
        for paragraph in paragraphs
        for q in range(4, 8)
    ]
    outsider = Branches(np.concatenate([shots[1:], paragraphs[0]]), asked)
    assert tokens_read([*questions, outsider]) == ([41, 20, 20, 20], 3 * 12 + 60)
    # Where a pass costs more, the paragraphs are not worth one each; then nothing is.
    assert tokens_read([*questions, outsider], worth=100) == ([41], 23 * 12 + 60)
    assert tokens_read([*questions, outsider], worth=1000) == ([], 64 * 12 + 60)
    # A context that others begin with.
    assert tokens_read([*questions, Branches(shots, asked)])[0] == [41, 20, 20, 20]


def test_many_continuations_of_a_context_are_several_rows_behind_it():
    rng = np.random.default_rng(0)
    many = tuple(rng.integers(4, 1000, 3) for _ in range(50))
    context = rng.integers(4, 1000, 20)
    assert tokens_read([Branches(context, many)], tree_tokens=10) == ([21], 100)
    assert tokens_read([Branches(context, many)]) == ([], 121)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_have_neighbours_and_about_as_much_to_read(size):
    found, _ = collect(make_requests(60), START)
    parts = shares(found, size)
    assert [p.first for p in parts] == [0, *(p.last for p in parts[:-1])]
    assert parts[-1].last == len(found)

    def read(part):
        steps = plan(found[part.first : part.last], max_tokens=1000, worth=1)
        return sum(len(s.stem) - s.keep + sum(r.size - len(s.stem) for r in s.rows) for s in steps)

    costs = [read(part) for part in parts]
    # No rank has more than its part, what it reads again, and a unit.
    assert max(costs) <= sum(costs) / size + 60
    assert shares([], size) == [(0, 0)] * size
    assert [last - first for first, last in shares(found[:2], 7)] == [1, 1, 0, 0, 0, 0, 0]


# -- the scores -----------------------------------------------------------------------------------


def alone(models, context, continuation):
    """Log-probabilities of a continuation and whether it is greedy, by whole forward passes."""
    whole = torch.tensor([[START, *context.tolist(), *continuation.tolist()]])
    with torch.no_grad():
        probs = [m.get_normalized_probs(m(whole[:, :-1]), log_probs=False) for m in models]
    log_probs = torch.stack(probs).mean(dim=0).log()[0, len(context) :]
    targets = whole[0, 1 + len(context) :]
    greedy = bool((log_probs.argmax(dim=1) == targets).all())
    return log_probs.gather(1, targets[:, None])[:, 0].numpy(), greedy


def read(models, requests, *, context_scores=False, max_tokens=200, known=WORDS, progress=None):
    units, places = collect(requests, START, context_scores=context_scores)
    numbers = BranchReader(models, PAD).read(
        units, pick_scores(known, UNK), max_tokens=max_tokens, progress=progress
    )
    return [scores_of(each, *numbers) for each in places]


def close(a, b):
    return np.allclose(a, b, rtol=1e-5, atol=1e-5)


def right(found, models, requests, *, context_scores=False):
    """Whether scores are those that each continuation has alone."""
    for one, request in zip(found, requests, strict=True):
        for log_probs, greedy, continuation in zip(
            one.continuations, one.greedy, request.continuations, strict=True
        ):
            expected = alone(models, request.context, continuation)
            if not close(log_probs, expected[0]) or greedy != expected[1]:
                return False
        assert (one.context is not None) == context_scores
        if context_scores and not close(one.context, alone(models, ids(), request.context)[0]):
            return False
    return True


SHAPES = {
    "post-norm": {},
    "gpt": {"decoder_normalize_before": True, "decoder_learned_pos": True},
    "tied": {"share_decoder_input_output_embed": True, "no_scale_embedding": True},
    "projections": {"decoder_input_dim": 12, "decoder_output_dim": 10},
    "normformer": {
        "scale_fc": True, "scale_attn": True, "scale_heads": True, "scale_resids": True,
    },
    "no positions": {"no_token_positional_embeddings": True, "layernorm_embedding": True},
    "experts": {"moe_freq": 1, "moe_expert_count": 3},
}  # fmt: skip


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_scores_are_those_of_each_continuation_alone(fields):
    models = [make_language_model(**fields)]
    asked = make_requests(16)
    found = read(models, asked)
    assert right(found, models, asked)
    greedy = [g for one in found for g in one.greedy]
    assert any(greedy) and not all(greedy)
    assert found[-1].continuations[0].dtype == np.float32


@pytest.mark.parametrize("context_scores", [False, True])
@pytest.mark.parametrize("worth", [1, 30, 10**6])
@pytest.mark.parametrize("max_tokens", [1, 25, 10**6])
def test_neither_batches_nor_stems_nor_the_order_move_a_score(
    context_scores, worth, max_tokens, monkeypatch
):
    monkeypatch.setattr(branch_passes, "_WORTH_ON_CPU", worth)
    monkeypatch.setattr(branch_plan, "_TREE_TOKENS", 8)
    models = [make_language_model()]
    asked = make_requests(14, seed=worth)
    options = {"context_scores": context_scores, "max_tokens": max_tokens}
    found = read(models, asked, **options)
    assert right(found, models, asked, context_scores=context_scores)
    backwards = [Branches(r.context, r.continuations[::-1]) for r in asked[::-1]]
    for a, b in zip(found, read(models, backwards, **options)[::-1], strict=True):
        assert all(map(close, a.continuations, b.continuations[::-1]))
        assert a.greedy == b.greedy[::-1]


@pytest.mark.parametrize("numbers", [1, 300, 10**6])
def test_nor_do_slices_of_what_is_asked_which_are_equal(numbers, monkeypatch):
    passes, taken, log_probs = [], branches._taken, branch_passes.States.log_probs

    def counted(self, first, last):
        found = log_probs(self, first, last)
        passes[-1].append(len(found))
        assert found.numel() <= max(numbers, found.size(1))
        return found

    def begun(asked, pick):
        passes.append([])
        return taken(asked, pick)

    monkeypatch.setattr(branches, "_SLICE_NUMBERS", numbers)
    monkeypatch.setattr(branches, "_taken", begun)
    monkeypatch.setattr(branch_passes.States, "log_probs", counted)
    models = [make_language_model()]
    asked = make_requests(14)
    found = read(models, asked, context_scores=True, max_tokens=10**6)
    assert right(found, models, asked, context_scores=True)
    assert (max(map(len, passes)) == 1) == (numbers == 10**6)
    # No slice is left over that has much fewer rows than the others of its pass.
    assert all(max(sizes) - min(sizes) < len(sizes) for sizes in passes)


@pytest.mark.parametrize("worth", [1, 10**6])
def test_rows_may_be_padded_to_blocks(worth, monkeypatch):
    monkeypatch.setattr(branch_passes, "_WORTH_ON_CPU", worth)
    together, blocks = packed._together, []

    def as_elsewhere(rows, read, width, device):
        found = together(rows, read, width, torch.device("meta"))
        blocks.extend(map(len, found))
        return found

    monkeypatch.setattr(packed, "_together", as_elsewhere)
    models = [make_language_model()]
    asked = make_requests(14)
    assert right(read(models, asked, context_scores=True), models, asked, context_scores=True)
    assert max(blocks) > 2
    monkeypatch.setattr(packed, "_BLOCK_NUMBERS", 3000)
    assert right(read(models, asked), models, asked)


def test_what_is_shared_is_computed_once():
    model = make_language_model()
    rng = np.random.default_rng(0)
    shots = rng.integers(4, WORDS, 30)
    asked = [
        Branches(np.concatenate([shots, [4 + n]]), (ids(4, 5, 6), ids(4, 7), ids(8)))
        for n in range(8)
    ]
    seen = []
    model.decoder.layers[0].fc1.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[:-1].numel())
    )
    read([model], asked)
    # Of each request: the context's last token, and 4 and 5 of the first continuation.
    assert seen == [31, 8 * 3]
    assert read([model], []) == [] and len(seen) == 2


def test_progress_counts_requests():
    done = []
    asked = make_requests(12)
    read([make_language_model()], asked, max_tokens=20, progress=done.append)
    assert done == sorted(set(done)) and len(done) > 2 and done[-1] == len(asked)
    nothing = []
    read([make_language_model()], [Branches(ids(5), ())] * 2, progress=nothing.append)
    assert nothing == [2]


# -- faults that must be noticed ------------------------------------------------------------------


def sees_the_others(monkeypatch):
    """A continuation sees those before it."""
    monkeypatch.setattr(Tree, "sight", lambda self: np.tri(len(self.tokens), dtype=np.bool_))


def counts_on(monkeypatch):
    """A continuation's places follow those of the one before it."""

    def wrong(continuations):
        tree = grow(continuations)
        return Tree(tree.tokens, np.arange(len(tree.tokens)), tree.paths)

    monkeypatch.setattr(branch_plan, "grow", wrong)


def asks_too_early(monkeypatch):
    """What comes first behind a stem is asked for one token before its end."""
    states = branch_passes._Reading._states

    def wrong(self, wanted, packed, *, keep=False):
        if keep:
            wanted = np.append(wanted[:-1], max(int(wanted[-1]) - 1, 0))
        return states(self, wanted, packed, keep=keep)

    monkeypatch.setattr(branch_passes._Reading, "_states", wrong)


def forgets_nothing(monkeypatch):
    """Another stem is read behind the one before it."""

    def wrong(self, length):
        if length == 0:
            right(self, length)

    right = branch_passes._Reading.forget
    monkeypatch.setattr(branch_passes._Reading, "forget", wrong)


@pytest.mark.parametrize("fault", [sees_the_others, counts_on, asks_too_early, forgets_nothing])
def test_a_fault_is_noticed(fault, monkeypatch):
    monkeypatch.setattr(branch_passes, "_WORTH_ON_CPU", 10)
    models = [make_language_model()]
    asked = make_requests(16)
    assert right(read(models, asked), models, asked)
    fault(monkeypatch)
    assert not right(read(models, asked), models, asked)


# -- other models ---------------------------------------------------------------------------------


class Unusual(TransformerLanguageModel):
    """Its logits are no plain product, and its forward pass is its own."""

    @property
    def output_weight(self):
        return None

    def forward(self, src_tokens, src_lengths=None, features_only=False):
        logits, extra = super().forward(src_tokens, src_lengths)
        return logits * 1.5, extra


@pytest.mark.parametrize("context_scores", [False, True])
@pytest.mark.parametrize("kinds", [[PlainLanguageModel], [Unusual, PlainLanguageModel]], ids=str)
def test_a_model_with_its_own_forward_pass(kinds, context_scores):
    models = [make_language_model(seed, kind) for seed, kind in enumerate(kinds)]
    assert not BranchReader(models, PAD).packs
    asked = [*make_requests(6), Branches(ids(4, 5), ()), Branches(ids(4), (ids(),))]
    for max_tokens in (1, 40):
        found = read(models, asked, context_scores=context_scores, max_tokens=max_tokens)
        assert right(found, models, asked, context_scores=context_scores)


@pytest.mark.parametrize("first", [TransformerLanguageModel, PlainLanguageModel])
def test_ensembles_average_probabilities(first):
    models = [make_language_model(0, first), make_language_model(1, decoder_layers=1)]
    assert BranchReader(models, PAD).packs == (first is TransformerLanguageModel)
    asked = make_requests(8)
    found = read(models, asked, context_scores=True)
    assert right(found, models, asked, context_scores=True)
    assert not right(found, models[:1], asked, context_scores=True)


def test_bf16():
    model = make_language_model()
    asked = make_requests(8)
    expected = read([model], asked)
    for one, other in zip(read([model.to(torch.bfloat16)], asked), expected, strict=True):
        for a, b in zip(one.continuations, other.continuations, strict=True):
            assert a.dtype == np.float32
            assert np.allclose(a, b, atol=0.3)


def test_tokens_that_cannot_be_predicted_are_unknown():
    model = make_language_model()
    asked = [Branches(ids(5, 12), (ids(12), ids(UNK), ids(6, 12)))]
    (found,) = read([model], asked, known=8)
    scores = found.continuations
    assert scores[0] == scores[1]
    assert not found.greedy[0] and not found.greedy[2]
    # They are read as they are.
    assert not close(scores[2], read([model], [Branches(ids(5, 7), (ids(6, 12),))], known=8)[0]
                     .continuations[0])  # fmt: skip


# -- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("among", [None, [13, 4, 9]])
@pytest.mark.parametrize("kind", [TransformerLanguageModel, PlainLanguageModel])
def test_ranks(kind, among):
    model = make_language_model(kind=kind)
    contexts = [request.context for request in make_requests(6)]
    asked = [Branches(c, (ids(4 + n),)) for n, c in enumerate(contexts)]
    units, places = collect(asked, START)
    pick = pick_ranks(WORDS, UNK, top=4, among=None if among is None else torch.tensor(among))
    log_probs, ranks, best = BranchReader([model], PAD).read(units, pick, max_tokens=20)
    for n, (context, place) in enumerate(zip(contexts, places, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([[START, *context.tolist()]]))[0][0, -1]
        expected = logits.log_softmax(0).tolist()
        at = place.continuations[0].start
        assert log_probs[at] == pytest.approx(expected[4 + n], abs=1e-5)
        counted = range(WORDS) if among is None else among
        ordered = sorted(counted, key=lambda token: -expected[token])
        assert best[at].tolist() == ordered[:4]
        assert ranks[at] == 1 + sum(expected[t] > expected[4 + n] for t in counted)
