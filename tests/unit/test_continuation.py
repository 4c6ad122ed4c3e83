"""Language models that go on from prefixes: a naive search agrees, a batch is its sentences."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from fairseq_lite.config.core import GenerationConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.continuation import ContinuationGenerator
from fairseq_lite.generation.incremental import (
    RecomputingLanguageModel,
    TreeDecoder,
    can_cache,
    language_model_decoder,
)
from fairseq_lite.generation.likelihood import TargetScorer
from tests.helpers.generation import (
    PlainLanguageModel,
    assert_same,
    make_dictionary,
    make_language_model,
    make_prefixes,
    prefix_of,
)

LENGTHS = [5, 0, 2, 7, 2]
EOS, PAD, UNK = 2, 1, 3


def generator(model=None, start=EOS, **options):
    options.setdefault("max_len_b", 14)
    models = model if isinstance(model, list) else [model or make_language_model()]
    seed = options.pop("seed", 1)
    cfg = GenerationConfig(**options)
    return ContinuationGenerator(models, make_dictionary(), cfg, start=start, seed=seed)


def run(lengths=LENGTHS, model=None, **options):
    return generator(model, **options).generate(make_prefixes(lengths))


# -- the cache ------------------------------------------------------------------------------------


def walk(model, tree, *, steps=20, beam=3, wrong=False):
    """Prefixes, then random tokens reordered at random, a sentence dropped on the way."""
    inputs = make_prefixes([6, 0, 3, 9])["net_input"]
    shape = {"sentences": 4, "beam": beam, "pad": PAD}
    if tree:
        decoder = language_model_decoder(model, max_len=steps, **shape)
        assert isinstance(decoder, TreeDecoder)
    else:
        decoder = RecomputingLanguageModel(model, **shape)
    lengths = inputs["src_lengths"]
    states = decoder.prefill(inputs["src_tokens"], lengths - 1 if wrong else lengths)
    real = inputs["src_tokens"].ne(PAD)
    source = torch.Generator().manual_seed(5)
    rows, parents, seen = 4, None, [decoder.project(states)[real]]
    for step in range(steps):
        tokens = torch.randint(4, 14, (rows, beam), generator=source)
        seen.append(decoder.step(tokens, parents))
        parents = torch.randint(0, beam, (rows, beam), generator=source)
        if step == 9:
            decoder.keep(torch.tensor([0, 1, 3]))
            rows, parents = 3, parents[[0, 1, 3]]
    return seen


SHAPES = {
    "post-norm": {},
    "gpt": {"decoder_normalize_before": True, "decoder_learned_pos": True},
    "tied": {"share_decoder_input_output_embed": True, "no_scale_embedding": True},
    "projections": {"decoder_input_dim": 12, "decoder_output_dim": 10},
    "normformer": {
        "scale_fc": True, "scale_attn": True, "scale_heads": True, "scale_resids": True,
    },
    "no positions": {"no_token_positional_embeddings": True, "layernorm_embedding": True},
}  # fmt: skip


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_the_tree_gives_what_recomputing_gives(fields):
    model = make_language_model(**fields)
    with torch.inference_mode():
        ours, theirs = walk(model, tree=True), walk(model, tree=False)
        bug = walk(model, tree=True, wrong=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    # With a prefix cut short the same comparison must fail, or it would prove nothing.
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(bug, theirs, strict=True))


def test_a_model_with_its_own_forward_pass_is_recomputed():
    assert can_cache(make_language_model())
    own = make_language_model(kind=PlainLanguageModel)
    assert not can_cache(own)
    assert_same(run(), run(model=own))


# -- the search -----------------------------------------------------------------------------------


def naive(model, prefix, beam, max_len, lenpen=1.0):
    """Beam search from a forced prefix, token by token, with whole forward passes."""
    beams, done = [([], [])], []
    for step in range(max_len + 1):
        candidates = []
        for b, (tokens, scores) in enumerate(beams):
            logits, _ = model(torch.tensor([[EOS, *tokens]]))
            logp = logits[0, -1].log_softmax(-1)
            for token, value in enumerate(logp.tolist()):
                forbidden = token == PAD or (step < 1 and token == EOS)
                if step == max_len:
                    forbidden = token != EOS
                elif step < len(prefix):
                    forbidden = token != prefix[step]
                if not forbidden:
                    candidates.append((sum(scores) + value, b, token, value))
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beam]
        going = []
        for place, (total, b, token, value) in enumerate(candidates):
            tokens, scores = [*beams[b][0], token], [*beams[b][1], value]
            if token != EOS:
                going.append((tokens, scores))
            elif place < beam and len(done) < beam:
                done.append((total / len(tokens) ** lenpen, tokens, scores))
        if len(done) >= beam:
            break
        beams = going[:beam]
    return sorted(done, key=lambda d: -d[0])


@pytest.mark.parametrize(("beam", "lenpen", "max_len"), [(1, 1.0, 14), (3, 1.0, 12), (4, 0.3, 8)])
def test_equal_to_a_naive_search(beam, lenpen, max_len):
    model, sample = make_language_model(), make_prefixes(LENGTHS)
    found = generator(model, beam=beam, lenpen=lenpen, max_len_b=max_len).generate(sample)
    lengths = set()
    with torch.no_grad():
        for i, ours in enumerate(found):
            prefix = prefix_of(sample, i)["net_input"]["src_tokens"][0, 1:].tolist()
            theirs = naive(model, prefix, beam, max_len, lenpen)
            assert [h.tokens.tolist() for h in ours] == [tokens for _, tokens, _ in theirs]
            for h, (score, _, positional) in zip(ours, theirs, strict=True):
                assert h.score == pytest.approx(score, abs=1e-5)
                assert h.positional_scores.tolist() == pytest.approx(positional, abs=1e-5)
                lengths.add(len(h.tokens))
    assert len(lengths) > 1  # or the test would be about nothing


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": True},
        {"sampling": True, "sampling_topp": 0.8, "temperature": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_len": 10},
        {"max_len_a": 1.0, "max_len_b": 4},
        {"diverse_beam_groups": 2},
        {"no_early_stop": True, "lenpen": 0.5},
    ],
    ids=str,
)
def test_a_batch_is_its_prefixes_one_by_one(options):
    sample = make_prefixes(LENGTHS)
    together = generator(beam=4, **options).generate(sample)
    alone = [
        generator(beam=4, **options).generate(prefix_of(sample, i))[0] for i in range(len(LENGTHS))
    ]
    assert_same(together, alone)
    for i, hypotheses in enumerate(together):
        prefix = sample["net_input"]["src_tokens"][i, 1 : 1 + LENGTHS[i]].tolist()
        assert all(h.tokens[: LENGTHS[i]].tolist() == prefix for h in hypotheses)


def test_the_scorer_reproduces_the_scores_of_the_search():
    model = make_language_model()
    for hypotheses in run(model=model):
        for h in hypotheses:
            source = torch.cat([torch.tensor([EOS]), h.tokens[:-1]])[None]
            scores = TargetScorer([model], PAD).score({"src_tokens": source}, h.tokens[None])[0]
            assert torch.allclose(scores, h.positional_scores, atol=1e-5)
            assert float(scores.sum()) / len(h.tokens) == pytest.approx(h.score, abs=1e-5)


# -- prefixes -------------------------------------------------------------------------------------


def test_prefixes_given_apart_and_prefixes_that_end():
    sample = make_prefixes(LENGTHS)
    given = torch.tensor([[5, 6, 7], [5, EOS, PAD], [8, PAD, PAD], [PAD] * 3, [9, EOS, 4]])
    found = generator(beam=3).generate(sample, given)
    assert [h.tokens.tolist() for h in found[1]] == [[5, EOS]]
    assert [h.tokens.tolist() for h in found[4]] == [[9, EOS]]
    for i, start in ((0, [5, 6, 7]), (2, [8])):
        assert len(found[i]) == 3
        assert all(h.tokens[: len(start)].tolist() == start for h in found[i])
    alone = [
        generator(beam=3).generate(prefix_of(sample, i), given[i : i + 1])[0]
        for i in range(len(given))
    ]
    assert_same(found, alone)


def test_a_source_in_the_middle_of_a_text_is_continued_as_it_is():
    sample = make_prefixes([3, 3])
    sample["net_input"]["src_tokens"][1, 0] = 7
    first, second = generator(beam=2).generate(sample)
    assert first[0].tokens[:3].tolist() == sample["net_input"]["src_tokens"][0, 1:].tolist()
    assert second[0].tokens[:4].tolist() == sample["net_input"]["src_tokens"][1].tolist()


def test_a_prefix_beyond_the_longest_output_is_cut_and_said_to(caplog):
    with caplog.at_level(logging.WARNING):
        found = run([9, 2], max_len_b=4, beam=2)
    assert [h.tokens.tolist()[-1] for h in found[0]] == [EOS]
    assert [len(h.tokens) for h in found[0]] == [5]
    assert all(len(h.tokens) <= 5 for h in found[1])
    assert [r.message.startswith("a prefix is longer") for r in caplog.records] == [True]


def test_the_models_longest_input_is_a_limit():
    found = run([3], max_len_b=200, min_len=62)
    assert {len(h.tokens) for h in found[0]} <= {63, 64}


def test_another_start_symbol():
    model = make_language_model()
    plain = generator(model).generate(make_prefixes([4]))
    begun = generator(model, start=0).generate(make_prefixes([4], start=0))
    assert begun[0][0].tokens[:4].tolist() == plain[0][0].tokens[:4].tolist()
    assert begun[0][0].positional_scores[0] != plain[0][0].positional_scores[0]


def test_unknown_words_have_a_price_in_the_prefix_too():
    sample = make_prefixes([2])
    sample["net_input"]["src_tokens"][0, 1] = UNK
    free, priced = (generator(unkpen=p).generate(sample)[0][0] for p in (0.0, 2.0))
    assert float(free.positional_scores[0] - priced.positional_scores[0]) == pytest.approx(2.0)


def test_sampling_follows_the_seed():
    assert_same(run(sampling=True, seed=4), run(sampling=True, seed=4))
    assert all(len(hypotheses) == 5 for hypotheses in run(sampling=True))
    first = [hs[0].tokens.tolist() for hs in run(sampling=True, seed=4)]
    assert first != [hs[0].tokens.tolist() for hs in run(sampling=True, seed=5)]
    greedy = [hs[0].tokens.tolist() for hs in run(beam=1)]
    found = run(beam=1, sampling=True, sampling_topk=1)
    assert [hs[0].tokens.tolist() for hs in found] == greedy


def test_ensembles_average_probabilities():
    first, second = make_language_model(0), make_language_model(1)
    assert_same(run(model=[first, first]), run(model=first))
    for hypotheses in run(model=[first, second], lenpen=0.0):
        h = hypotheses[0]
        source = {"src_tokens": torch.cat([torch.tensor([EOS]), h.tokens[:-1]])[None]}
        probs = [TargetScorer([m], PAD).score(source, h.tokens[None])[0].exp()
                 for m in (first, second)]  # fmt: skip
        mean = ((probs[0] + probs[1]) / 2).log()
        assert torch.allclose(mean, h.positional_scores, atol=1e-5)


def test_a_smaller_output_vocabulary():
    model = make_language_model()
    small = make_dictionary()
    small.symbols = small.symbols[:8]
    sample = make_prefixes([3])
    sample["net_input"]["src_tokens"][0, 2] = 12  # beyond it: read as it is, scored as unknown
    cfg = GenerationConfig(max_len_b=9)
    found = ContinuationGenerator([model], small, cfg, start=EOS).generate(sample)
    whole = generator(model, max_len_b=9).generate(sample)
    assert found[0][0].tokens[1] == 12
    assert found[0][0].positional_scores[1] != whole[0][0].positional_scores[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match_source_len": True}, "--match-source-len: a language model has no source"),
        ({"print_alignment": "hard"}, "--print-alignment: a language model has no source"),
        ({"replace_unk": "@@"}, "--replace-unk: a language model has no source"),
        ({"min_len": 20}, "--min-len 20 is more than the longest output allowed, 14"),
    ],
)
def test_one_line_for_what_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_a_broken_model_still_answers_for_every_prefix():
    model = make_language_model()
    with torch.no_grad():
        model.decoder.output_projection.weight.fill_(math.nan)
    found = run(model=model, max_len_b=9)
    assert [len(hs) for hs in found] == [1] * len(LENGTHS)
    assert all(hs[0].tokens[-1] == EOS for hs in found)


def test_bf16_and_retained_dropout_run():
    model = make_language_model().to(torch.bfloat16)
    for hypotheses in run(model=model):
        assert hypotheses[0].positional_scores.dtype == torch.float32
    dropped = make_language_model(dropout=0.5, attention_dropout=0.1)
    plain = [hs[0].score for hs in run(model=dropped)]
    dropped.retain_dropout()
    noisy = [[hs[0].score for hs in run(model=dropped)] for _ in range(2)]
    assert plain != noisy[0] != noisy[1]
