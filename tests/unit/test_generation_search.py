"""Search strategies as functions of tensors."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq_lite.generation import search


def random_logp(b=3, k=4, v=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, k, v, generator=generator) * 2
    return logits.log_softmax(-1), -torch.rand(b, k, generator=generator) * 3


def test_beam_search_finds_the_best_of_all_continuations():
    logp, scores = random_logp()
    found = search.BeamSearch().step(False, logp, scores)
    total = (logp + scores[..., None]).flatten(1)
    best, where = total.sort(dim=1, descending=True)
    assert torch.equal(found.scores, best[:, :8])
    assert torch.equal(found.beams * 11 + found.tokens, where[:, :8])


def test_the_first_step_looks_at_one_beam_only():
    logp, _ = random_logp()
    logp = logp[:, :1].expand(-1, 4, -1)
    found = search.BeamSearch().step(True, logp, torch.zeros(3, 4))
    assert not found.beams.any()
    assert all(len(set(row)) == 8 for row in found.tokens.tolist())


def test_a_small_vocabulary_limits_the_candidates():
    logp, _ = random_logp(k=4, v=6)
    assert search.BeamSearch().step(True, logp, torch.zeros(3, 4)).scores.shape == (3, 5)


def test_diverse_groups_without_strength_search_apart():
    logp, scores = random_logp()
    found = search.DiverseBeamSearch(2, 0.0).step(False, logp, scores)
    for g in range(2):
        own = search.BeamSearch().step(False, logp[:, g::2], scores[:, g::2])
        assert torch.equal(found.tokens[:, g::2], own.tokens)
        assert torch.equal(found.beams[:, g::2], own.beams * 2 + g)


def test_diverse_groups_avoid_what_earlier_groups_chose():
    logp, _ = random_logp()
    logp = logp[:, :1].expand(-1, 4, -1)
    found = search.DiverseBeamSearch(4, 1e3).step(True, logp, torch.zeros(3, 4))
    first = found.tokens[:, :4]
    assert all(len(set(row)) == 4 for row in first.tolist())


def test_siblings_without_a_price_are_plain_beam_search():
    logp, scores = random_logp()
    plain = search.BeamSearch().step(False, logp, scores)
    siblings = search.DiverseSiblingsSearch(0.0).step(False, logp, scores)
    assert all(torch.equal(a, b) for a, b in zip(plain, siblings, strict=True))
    priced = search.DiverseSiblingsSearch(100.0).step(False, logp, scores)
    assert all(set(row) == {0, 1, 2, 3} for row in priced.beams[:, :4].tolist())


def test_sampling_follows_the_distribution():
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2])
    strategy = search.Sampling(seed=3)
    strategy.begin(range(1))
    logp = weights.log().expand(1, 4000, -1)
    found = strategy.step(False, logp, torch.zeros(1, 4000))
    share = torch.bincount(found.tokens[0], minlength=4) / 4000
    assert share[1] == 0
    assert torch.allclose(share, weights, atol=0.03)
    assert torch.equal(found.scores[0], logp[0, 0][found.tokens[0]])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"topk": 2}, {0, 2}), ({"topp": 0.6}, {0, 2}), ({"topp": 0.4}, {0}), ({"topk": 1}, {0})],
)
def test_sampling_from_the_likeliest(options, allowed):
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2])
    strategy = search.Sampling(**options)
    strategy.begin(range(1))
    found = strategy.step(False, weights.log().expand(1, 200, -1), torch.zeros(1, 200))
    assert set(found.tokens[0].tolist()) == allowed


def test_sampling_does_not_depend_on_the_other_sentences():
    logp, scores = random_logp(b=3)
    together = search.Sampling(seed=7)
    together.begin([10, 11, 12])
    expected = [together.step(False, logp, scores) for _ in range(2)]
    alone = search.Sampling(seed=7)
    alone.begin([11])
    for step in range(2):
        assert torch.equal(
            alone.step(False, logp[1:2], scores[1:2]).tokens, expected[step].tokens[1:2]
        )
    together.keep(torch.tensor([1, 2]))
    third = alone.step(False, logp[1:2], scores[1:2]).tokens
    assert torch.equal(together.step(False, logp[1:], scores[1:]).tokens[:1], third)


def test_repeated_ngrams():
    prefix = torch.tensor([[[5, 6, 7, 5, 6]]])
    tokens, banned = search.repeated(prefix, 3)
    assert tokens[banned].tolist() == [7]
    tokens, banned = search.repeated(prefix, 2)
    assert tokens[banned].tolist() == [7]
    tokens, banned = search.repeated(prefix, 1)
    assert sorted(tokens[banned].tolist()) == [5, 5, 6, 6, 7]
    assert not search.repeated(prefix, 6)[1].any()


def test_dead_beams_are_never_preferred():
    logp, scores = random_logp()
    scores[:, 1:] = -math.inf
    found = search.BeamSearch().step(False, logp, scores)
    assert not found.beams.any()
