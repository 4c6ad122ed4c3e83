"""What flite-eval-lm counts: targets, contexts, words, texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.data.blocks import TokenBlocks
from fairseq_lite.data.context import ContextWindow
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import MemoryDataset
from fairseq_lite.data.monolingual import Layout, MonolingualDataset
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.generation.likelihood import TargetScorer, average
from fairseq_lite.generation.perplexity import Perplexity, Scored, TextSize
from fairseq_lite.generation.words import WordStats, joining, word_line, words_of
from fairseq_lite.training import lm_evaluation
from fairseq_lite.training.lm_evaluation import Report
from tests.helpers.generation import PlainLanguageModel, make_language_model

EOS, PAD = 2, 1


# -- targets --------------------------------------------------------------------------------------


def a_batch(rows=5, columns=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(4, 14, (rows, columns), generator=generator)
    target = torch.randint(4, 14, (rows, columns), generator=generator)
    for row in range(rows):
        source[row, columns - row :] = PAD
        target[row, columns - row :] = PAD
    return {"src_tokens": source}, target


@pytest.mark.parametrize("softmax_batch", [None, 1, 7, 1000])
def test_scores_are_those_of_the_whole_softmax(softmax_batch):
    model, (inputs, target) = make_language_model(), a_batch()
    found = TargetScorer([model], PAD, softmax_batch=softmax_batch).score(inputs, target)
    with torch.no_grad():
        logp = model(**inputs)[0].log_softmax(-1)
    expected = logp.gather(2, target[..., None])[..., 0].masked_fill(target.eq(PAD), 0.0)
    assert torch.allclose(found, expected, atol=1e-6)
    shifted = logp.gather(2, target.roll(1, 1)[..., None])[..., 0]
    assert not torch.allclose(found, shifted.masked_fill(target.eq(PAD), 0.0), atol=1e-2)


def test_models_without_a_plain_projection_and_ensembles():
    class Opaque(PlainLanguageModel):
        @property
        def output_weight(self):
            return None

    inputs, target = a_batch()
    models = [make_language_model(0), make_language_model(1, kind=Opaque)]
    single = [TargetScorer([m], PAD).score(inputs, target) for m in models]
    plain = TargetScorer([make_language_model(1)], PAD).score(inputs, target)
    assert torch.allclose(single[1], plain, atol=1e-6)
    both = TargetScorer(models, PAD).score(inputs, target)
    real = target.ne(PAD)
    mean = ((single[0].exp() + single[1].exp()) / 2).log()
    assert torch.allclose(both[real], mean[real], atol=1e-6)
    assert torch.allclose(average(single)[real], mean[real], atol=1e-6)


# -- contexts -------------------------------------------------------------------------------------


def a_text(lengths, mode="none", size=5, bos=None):
    ids = iter(range(4, 10_000))
    lines = [[*(next(ids) for _ in range(n)), EOS] for n in lengths]
    dictionary = Dictionary()
    for i in range(4, 10_000):
        dictionary.add_symbol(f"w{i}")
    blocks = TokenBlocks(MemoryDataset.of(lines), mode, size)
    return MonolingualDataset(blocks, dictionary, dictionary, Layout(PAD), bos)


def windows(dataset, window, longest):
    """fairseq's way: what the last rows read is carried from row to row."""
    rows, before = [], []
    for index in range(len(dataset)):
        source, target, _ = dataset.read(np.array([index]))
        room = max(longest - len(source), 0)
        before = before[-room:] if room else []
        rows.append(([*before, *source.tolist()], [PAD] * len(before) + target.tolist()))
        before = rows[-1][0][-window:]
    return rows


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    mode=st.sampled_from(["none", "complete", "eos"]),
    window=st.integers(1, 6),
    bos=st.sampled_from([None, (0, 0)]),
)
def test_contexts_are_fairseqs(lengths, mode, window, bos):
    dataset = a_text(lengths, mode, bos=bos)
    longest = 5 + window
    ours = ContextWindow(dataset, window, longest)
    expected = windows(dataset, window, longest)
    order = np.random.RandomState(0).permutation(len(dataset))  # any batch, in any order
    for part in np.array_split(order, 3):
        sample = ours.collate(part)
        for row, index in enumerate(part.tolist()):
            source, target = expected[index]
            assert sample["net_input"]["src_tokens"][row, : len(source)].tolist() == source
            assert sample["net_input"]["src_tokens"][row, len(source) :].eq(PAD).all()
            assert sample["target"][row, : len(target)].tolist() == target
            assert ours.sizes[index] == len(source)
        if len(part):
            assert sample["ntokens"] == sum(
                sum(t != PAD for t in expected[i][1]) for i in part.tolist()
            )


def test_batches_with_contexts_fit_and_go_in_order(caplog):
    ours = ContextWindow(a_text([3] * 20, size=6), 4, 10)
    found = ours.batches(max_tokens=25, skip_invalid=True, max_positions=10, name="test")
    assert np.concatenate(found).tolist() == list(range(len(ours)))
    assert all(len(batch) * ours.sizes[batch].max() <= 25 for batch in found)
    few = ours.batches(max_tokens=25, skip_invalid=True, max_positions=9, name="test")
    assert np.concatenate(few).tolist() == [i for i in range(len(ours)) if ours.sizes[i] <= 9]
    assert "will be skipped" in caplog.text
    with pytest.raises(DataError, match="too long"):
        ours.batches(max_tokens=25, skip_invalid=False, max_positions=9, name="test")


# -- words ----------------------------------------------------------------------------------------

SYMBOLS = ["un@@", "like@@", "ly", "it", "is"]
SCORES = np.array([-1.0, -2.0, -3.0, -0.5, -0.25, -4.0], dtype=np.float32)


def pieces(symbols=SYMBOLS):
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


def test_pieces_make_words():
    dictionary = pieces()
    tokens = np.array([4, 5, 6, 7, 8, EOS])
    join = joining(dictionary, "@@ ")
    words = words_of(tokens, SCORES, dictionary, join)
    assert words == [
        ("unlikely", -6.0, True), ("it", -0.5, False), ("is", -0.25, False), ("</s>", -4.0, False),
    ]  # fmt: skip
    assert word_line(7, words[:2]) == "7 unlikely [-6.000000]\tit [-0.500000]"
    sums = Perplexity(join)
    sums.add(Scored(0, tokens, SCORES))
    assert (sums.units, sums.bits) == (4, pytest.approx(10.75 / math.log(2)))
    plain = Perplexity()
    plain.add(Scored(0, tokens, SCORES))
    assert (plain.units, plain.bits) == (6, sums.bits)
    # A piece at the end of a block has nothing to be joined to: it is a word, as in fairseq.
    assert words_of(tokens[:2], SCORES[:2], dictionary, join) == [("unlike@@", -3.0, True)]


def test_beginnings_mark_words_too():
    dictionary = pieces(["▁un", "like", "▁it", "ly", "▁"])
    join = joining(dictionary, "sentencepiece")
    tokens = np.array([4, 5, 7, 6, 3, EOS])
    words = words_of(tokens, SCORES, dictionary, join)
    assert [w.text for w in words] == ["unlikely", "it", "<unk>", "</s>"]
    assert [w.text for w in words_of(tokens, SCORES, dictionary, None)] == [
        "▁un", "like", "ly", "▁it", "<unk>", "</s>",
    ]  # fmt: skip
    # The first word of a line need not be marked.
    tokens = np.array([EOS, 5, 7, 6, 5, EOS])
    words = words_of(tokens, SCORES, dictionary, join)
    assert [w.text for w in words] == ["</s>", "likely", "itlike", "</s>"]
    with pytest.raises(ConfigError, match="--post-process letter"):
        joining(dictionary, "letter")


def test_statistics_of_words():
    dictionary = pieces()
    join = joining(dictionary, "@@ ")
    stats = WordStats()
    stats.add(words_of(np.array([4, 5, 6, 7]), SCORES[:4], dictionary, join))
    stats.add(words_of(np.array([7, 8]), SCORES[:2], dictionary, join))
    assert list(stats.lines()) == [
        "it\t2\t-1.5\tFalse\t-2.0\t1",
        "unlikely\t1\t-6.0\tTrue\t-0.5\t1",
        "is\t1\t-2.0\tFalse\t0.0\t0",
    ]


# -- texts ----------------------------------------------------------------------------------------


def size_of(blocks, decode=lambda line: line.replace("@@ ", "")):
    size = TextSize(pieces(), decode)
    for number, tokens in blocks.items():
        size.add(Scored(number, np.array(tokens), np.zeros(len(tokens), np.float32)))
    return size.count()


def test_words_and_bytes_are_those_of_the_text():
    whole = [4, 5, 6, 7, 8, EOS, 7, EOS]  # "unlikely it is", "it"
    expected = (4, len("unlikely it is\nit\n"))
    assert size_of({0: whole}) == expected
    # Blocks come in any order and end within words.
    assert size_of({2: whole[6:], 0: whole[:1], 1: whole[1:6]}) == expected
    # A missing block cuts a word in two.
    assert size_of({0: [4], 2: [6, 7, 8, EOS]})[0] == 4
    # With more shards than batches, one has none.
    assert size_of({}) == (0, 0)


def test_a_perplexity_of_words_without_spaces_is_a_short_number():
    report = Report("test", 9, 6.0, 64.0, 2, 4.8e100, 30, 3.0)
    assert next(report.lines()).startswith("Word-level perplexity: 4.800e+100 (2 words), bits per")


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 30), max_size=5), seed=st.integers(0, 99))
def test_where_blocks_end_changes_nothing(cuts, seed):
    tokens = np.random.RandomState(seed).choice([EOS, 4, 5, 6, 7, 8], 31)
    parts = np.split(tokens, sorted(cuts))
    assert size_of(dict(enumerate(parts))) == size_of({0: tokens})


@pytest.mark.parametrize(
    ("flags", "pieces"),
    [
        ("--bpe characters", "a b \u2581 c d"),
        ("--bpe characters --remove-bpe sentencepiece", "a b \u2581 c d"),
        ("--remove-bpe letter", "a b | c d"),
    ],
)
def test_pieces_are_joined_once(flags, pieces):
    """Joined twice, words would be joined as well, and a text would be one long word."""
    run = parse("flite-eval-lm", ["bin", "--path", "m.pt", *flags.split()], load_builtins())
    assert lm_evaluation._decoder(run)(pieces) == "ab cd"
