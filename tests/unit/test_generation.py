"""The generator: against a naive search, against itself, and each of its options."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq_lite.config.core import GenerationConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.generator import SequenceGenerator
from fairseq_lite.generation.incremental import (
    RecomputingDecoder,
    TreeDecoder,
    can_cache,
    incremental_decoder,
)
from fairseq_lite.generation.reference import ReferenceScorer
from fairseq_lite.models.transformer_lm import TransformerLanguageModel
from tests.helpers.generation import (
    PlainLanguageModel,
    PlainModel,
    assert_same,
    make_dictionary,
    make_language_model,
    make_model,
    make_sample,
    one_of,
)

LENGTHS = [9, 7, 6, 4, 1]


def generator(model=None, **options):
    options.setdefault("max_len_b", 12)
    models = model if isinstance(model, list) else [make_model() if model is None else model]
    seed = options.pop("seed", 1)
    return SequenceGenerator(models, make_dictionary(), GenerationConfig(**options), seed=seed)


# -- the cache ------------------------------------------------------------------------------------


def walk(decoder, model, *, steps=40, beam=3, wrong=False):
    """Random prefixes, reordered at random, one sentence dropped on the way: all the logits."""
    source = torch.Generator().manual_seed(5)
    rows, seen, parents = 4, [], None
    for step in range(steps):
        tokens = torch.randint(4, 14, (rows, beam), generator=source)
        seen.append(decoder.step(tokens, None if wrong else parents))
        parents = torch.randint(0, beam, (rows, beam), generator=source)
        if step == 11:
            decoder.keep(torch.tensor([0, 2, 3]))
            rows, parents = 3, parents[[0, 2, 3]]
    return seen


SHAPES = {
    "post-norm": {},
    "pre-norm": {"encoder_normalize_before": True, "decoder_normalize_before": True},
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True},
    "projections": {"decoder_output_dim": 10},
    "layernorm-embedding": {"layernorm_embedding": True, "no_scale_embedding": True},
    "widths": {"encoder_embed_dim": 24},
}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_the_tree_gives_what_recomputing_gives(fields):
    model = make_model(**fields)
    inputs = make_sample([8, 5, 3, 1])["net_input"]
    source = (inputs["src_tokens"], inputs["src_lengths"])
    with torch.inference_mode():
        tree = incremental_decoder(model, *source, beam=3, max_len=50)
        assert isinstance(tree, TreeDecoder)
        ours = walk(tree, model)
        theirs = walk(RecomputingDecoder(model, *source, beam=3), model)
        bug = walk(incremental_decoder(model, *source, beam=3, max_len=50), model, wrong=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    # With the parents ignored the same comparison must fail, or it would prove nothing.
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(bug, theirs, strict=True))


def test_a_model_with_its_own_forward_pass_is_recomputed():
    assert can_cache(make_model())
    own = make_model(kind=PlainModel)
    assert not can_cache(own)
    sample = make_sample(LENGTHS)
    assert_same(generator().generate(sample), generator(own).generate(sample))


# -- the search -----------------------------------------------------------------------------------


def naive(model, sample, beam, max_len, lenpen=1.0):
    """Beam search written for one sentence, a list of prefixes and whole forward passes."""
    inputs, eos = sample["net_input"], 2
    beams, done = [([], [])], []
    for step in range(max_len + 1):
        candidates = []
        for b, (tokens, scores) in enumerate(beams):
            prev = torch.tensor([[eos, *tokens]])
            logits, _ = model(inputs["src_tokens"], inputs["src_lengths"], prev)
            logp = logits[0, -1].log_softmax(-1)
            for token, value in enumerate(logp.tolist()):
                forbidden = token == 1 or (step < 1 and token == eos)
                if step == max_len:
                    forbidden = token != eos
                if not forbidden:
                    candidates.append((sum(scores) + value, b, token, value))
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beam]
        going = []
        for place, (total, b, token, value) in enumerate(candidates):
            tokens, scores = [*beams[b][0], token], [*beams[b][1], value]
            if token != eos:
                going.append((tokens, scores))
            elif place < beam and len(done) < beam:
                done.append((total / len(tokens) ** lenpen, tokens))
        if len(done) >= beam:
            break
        beams = going[:beam]
    return sorted(done, key=lambda d: -d[0])


@pytest.mark.parametrize("seed", [10, 11])
@pytest.mark.parametrize(("beam", "lenpen", "max_len"), [(1, 1.0, 12), (3, 1.0, 12), (4, 0.3, 5)])
def test_equal_to_a_naive_search(beam, lenpen, max_len, seed):
    model, sample = make_model(seed), make_sample(LENGTHS)
    found = generator(model, beam=beam, lenpen=lenpen, max_len_b=max_len).generate(sample)
    lengths = set()
    with torch.no_grad():
        for i, ours in enumerate(found):
            theirs = naive(model, one_of(sample, i), beam, max_len, lenpen)
            assert [h.tokens.tolist() for h in ours] == [tokens for _, tokens in theirs]
            for h, (score, _) in zip(ours, theirs, strict=True):
                assert h.score == pytest.approx(score, abs=1e-5)
                lengths.add(len(h.tokens))
    assert len(lengths) > 1  # or the test would be about nothing


def test_beam_one_is_greedy():
    model, sample = make_model(3), make_sample(LENGTHS)
    found = generator(model, beam=1).generate(sample)
    inputs = sample["net_input"]
    with torch.no_grad():
        for i, (best, *rest) in enumerate(found):
            assert not rest
            one = one_of(sample, i)["net_input"]
            tokens = []
            while not tokens or tokens[-1] != 2:
                prev = torch.tensor([[2, *tokens]])
                logits = model(one["src_tokens"], one["src_lengths"], prev)[0][0, -1]
                logits[1] = -math.inf
                if not tokens:
                    logits[2] = -math.inf
                tokens.append(2 if len(tokens) == 12 else int(logits.argmax()))
            assert best.tokens.tolist() == tokens
    assert inputs["src_tokens"].size(0) == len(LENGTHS)


@pytest.mark.parametrize("options", [{}, {"sampling": True}, {"no_repeat_ngram_size": 2}])
def test_a_batch_is_its_sentences_one_by_one(options):
    sample = make_sample(LENGTHS)
    make = lambda: generator(beam=4, **options)  # noqa: E731
    together = make().generate(sample)
    alone = [make().generate(one_of(sample, i))[0] for i in range(len(LENGTHS))]
    assert_same(together, alone)


def test_the_scorer_reproduces_the_scores_of_the_search():
    model = make_model()
    sample = make_sample(LENGTHS)
    for i, hypotheses in enumerate(generator(model).generate(sample)):
        for h in hypotheses:
            one = one_of(sample, i)
            one["target"] = h.tokens[None]
            prev = torch.cat([torch.tensor([2]), h.tokens[:-1]])[None]
            one["net_input"]["prev_output_tokens"] = prev
            [[scored]] = ReferenceScorer([model], make_dictionary()).generate(one)
            assert scored.score == pytest.approx(h.score, abs=1e-5)
            assert torch.allclose(scored.positional_scores, h.positional_scores, atol=1e-5)


def test_reference_scores_ignore_padding():
    model, sample = make_model(), make_sample(LENGTHS)
    scorer = ReferenceScorer([model], make_dictionary())
    together = scorer.generate(sample)
    assert [len(h.tokens) for [h] in together] == LENGTHS
    assert_same(together, [scorer.generate(one_of(sample, i))[0] for i in range(len(LENGTHS))])


# -- options --------------------------------------------------------------------------------------


def run(lengths=LENGTHS, prefix=None, **options):
    return generator(**options).generate(make_sample(lengths), prefix)


def test_lengths():
    for hypotheses in run(min_len=5, max_len_b=7):
        assert all(6 <= len(h.tokens) <= 8 for h in hypotheses)
    longest = max(len(h.tokens) for hs in run(min_len=9, max_len_a=1.0, max_len_b=0) for h in hs)
    assert longest == max(LENGTHS) + 1
    with pytest.raises(ConfigError, match="--min-len 5 is more than the longest output allowed, 3"):
        run(min_len=5, max_len_b=3)


def test_the_models_longest_target_is_a_limit():
    found = run(max_len_b=200, min_len=63)
    assert {len(h.tokens) for hs in found for h in hs} == {64}


def test_match_source_length():
    for n, hypotheses in zip(LENGTHS, run(match_source_len=True), strict=True):
        assert len(hypotheses[0].tokens) == n + 1


def test_unknown_words_have_a_price():
    assert any(3 in h.tokens for hs in run(unkpen=-50.0) for h in hs)
    assert not any(3 in h.tokens for hs in run(unkpen=50.0) for h in hs)


def test_length_penalty_and_plain_sums():
    for h in (h for hs in run(unnormalized=True) for h in hs):
        assert h.score == pytest.approx(float(h.positional_scores.sum()), abs=1e-5)
    for h in (h for hs in run(lenpen=0.5) for h in hs):
        total = float(h.positional_scores.sum())
        assert h.score == pytest.approx(total / len(h.tokens) ** 0.5, abs=1e-5)


def test_hypotheses_are_sorted_and_different():
    for hypotheses in run(beam=5):
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(h.tokens.tolist()) for h in hypotheses}) == len(hypotheses) == 5


def test_outputs_begin_with_the_prefix():
    sample = make_sample(LENGTHS)
    prefix = sample["target"][:, :3]
    for n, wanted, hypotheses in zip(LENGTHS, prefix, run(prefix=prefix), strict=True):
        wanted = wanted[: min(n, 3)].tolist()
        assert all(h.tokens[: len(wanted)].tolist() == wanted for h in hypotheses)
        if n <= 3:  # the prefix holds the end: nothing is left to search
            assert [h.tokens.tolist() for h in hypotheses] == [wanted]


def test_no_ngram_occurs_twice():
    for size in (1, 2, 3):
        for h in (h for hs in run(no_repeat_ngram_size=size, max_len_b=9) for h in hs):
            grams = list(zip(*(h.tokens.tolist()[i:] for i in range(size)), strict=False))
            assert len(grams) == len(set(grams))


def test_a_long_search_never_ends_worse():
    for early, late in zip(run(), run(no_early_stop=True), strict=True):
        assert late[0].score >= early[0].score - 1e-6
        assert len(late) == len(early)


def test_sampling():
    assert_same(run(sampling=True, seed=4), run(sampling=True, seed=4))
    first = [hs[0].tokens.tolist() for hs in run(sampling=True, seed=4)]
    assert first != [hs[0].tokens.tolist() for hs in run(sampling=True, seed=5)]
    greedy = [hs[0].tokens.tolist() for hs in run(beam=1)]
    for options in ({"sampling_topk": 1}, {"sampling_topp": 1e-6}, {"temperature": 1e-4}):
        found = run(beam=1, sampling=True, **options)
        assert [hs[0].tokens.tolist() for hs in found] == greedy


def test_sampled_beams_all_finish():
    for hypotheses in run(sampling=True, beam=6):
        assert len(hypotheses) == 6


def test_diverse_search():
    groups = run(beam=4, diverse_beam_groups=2, diverse_beam_strength=0.5)
    assert all(len(hs) == 4 for hs in groups)
    assert_same(run(beam=4), run(beam=4, diversity_rate=0.0))
    with pytest.raises(ConfigError, match="--sampling and --diverse-beam-groups"):
        run(beam=4, sampling=True, diverse_beam_groups=2)


def test_temperature_one_changes_nothing_and_others_do():
    assert_same(run(), run(temperature=1.0))
    changed = zip(run(), run(temperature=2.0), strict=True)
    assert any(a[0].score != pytest.approx(b[0].score, abs=1e-3) for a, b in changed)


def test_ensembles_average_probabilities():
    first, second, sample = make_model(0), make_model(1), make_sample(LENGTHS)
    assert_same(generator([first, first]).generate(sample), generator(first).generate(sample))
    for hypotheses in generator([first, second], lenpen=0.0).generate(sample)[:1]:
        one = one_of(sample, 0)
        one["target"] = hypotheses[0].tokens[None]
        prev = torch.cat([torch.tensor([2]), hypotheses[0].tokens[:-1]])[None]
        one["net_input"]["prev_output_tokens"] = prev
        probs = [
            ReferenceScorer([m], make_dictionary()).generate(one)[0][0].positional_scores.exp()
            for m in (first, second)
        ]
        mean = ((probs[0] + probs[1]) / 2).log()
        assert torch.allclose(mean, hypotheses[0].positional_scores, atol=1e-5)


def test_another_end_symbol():
    index = make_dictionary().index("mat")
    assert all(h.tokens[-1] == index for hs in run(eos_token="mat") for h in hs)
    with pytest.raises(ConfigError, match="--eos-token nix"):
        run(eos_token="nix")


def test_a_beam_wider_than_the_vocabulary():
    assert all(len(hs) <= 13 for hs in run(beam=50, nbest=1, max_len_b=3))


def test_a_broken_model_still_answers_for_every_sentence():
    model = make_model()
    with torch.no_grad():
        model.decoder.output_projection.weight.fill_(math.nan)
    found = generator(model, max_len_b=4).generate(make_sample(LENGTHS))
    assert [len(hs) for hs in found] == [1] * len(LENGTHS)
    assert all(hs[0].tokens[-1] == 2 and hs[0].score == -math.inf for hs in found)


def test_bf16_and_retained_dropout_run():
    model = make_model().to(torch.bfloat16)
    for hypotheses in generator(model).generate(make_sample(LENGTHS)):
        assert hypotheses[0].positional_scores.dtype == torch.float32
    dropped = make_model(dropout=0.5, attention_dropout=0.1)
    plain = generator(dropped).generate(make_sample(LENGTHS))
    dropped.retain_dropout()
    noisy = [generator(dropped).generate(make_sample(LENGTHS)) for _ in range(2)]
    best = [[hs[0].score for hs in found] for found in (plain, *noisy)]
    assert best[0] != best[1] != best[2]


# -- a language model on top ----------------------------------------------------------------------


def fused(weight, language_model=None, sample=None, **options):
    one = generator(**options)
    one.fuse(language_model or make_language_model(), weight)
    return one.generate(make_sample(LENGTHS) if sample is None else sample)


@pytest.mark.parametrize("kind", [TransformerLanguageModel, PlainLanguageModel])
def test_a_language_model_is_added_to_every_step(kind):
    model, language_model = make_model(), make_language_model(kind=kind)
    found = fused(0.4, language_model, beam=4, lenpen=0.7)
    alone = run(beam=4, lenpen=0.7)
    assert [h[0].tokens.tolist() for h in found] != [h[0].tokens.tolist() for h in alone]
    for i, hypotheses in enumerate(found):
        one = one_of(make_sample(LENGTHS), i)["net_input"]
        for h in hypotheses:
            prev = torch.cat([torch.tensor([2]), h.tokens[:-1]])[None]
            with torch.no_grad():
                logp = model(one["src_tokens"], one["src_lengths"], prev)[0].log_softmax(-1)
                logp = logp + 0.4 * language_model(prev)[0].log_softmax(-1)
            expected = logp[0].gather(1, h.tokens[:, None])[:, 0]
            assert torch.allclose(h.positional_scores, expected, atol=1e-4)
    sample = make_sample(LENGTHS)
    each = [
        fused(0.4, language_model, one_of(sample, i), beam=4, lenpen=0.7)[0]
        for i in range(len(LENGTHS))
    ]
    assert_same(found, each)


def test_a_language_model_without_weight_changes_nothing():
    assert_same(fused(0.0), run())
    short = make_language_model()
    short.decoder.max_positions = 5  # its longest input is a limit, too
    assert max(len(h.tokens) for hs in fused(0.0, short) for h in hs) <= 5
    with pytest.raises(ConfigError, match="lm_path: flite-generate"):
        run(lm_path="lm.pt")
