"""From hypotheses to the lines that are printed: texts, alignments, unknown words, warnings."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from fairseq_lite.config.core import CommonConfig, GenerationConfig
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.generation import alignment
from fairseq_lite.generation.evaluate import (
    AlignmentOptions,
    PieceWatch,
    Texts,
    base2,
    hypotheses_and_references,
    render,
)
from fairseq_lite.generation.generator import Hypothesis, SequenceGenerator
from fairseq_lite.generation.output import lines
from fairseq_lite.generation.session import Session, place
from tests.helpers.generation import PlainModel, make_dictionary, make_model, make_sample

PAD, EOS, UNK = 1, 2, 3


def sample_of(source, target):
    return {
        "id": torch.tensor([7]),
        "net_input": {"src_tokens": torch.tensor([source])},
        "target": None if target is None else torch.tensor([target]),
    }


def ids(dictionary, text):
    return [dictionary.index(word) for word in text.split()] + [EOS]


def test_lines_as_fairseq_prints_them():
    d = make_dictionary()
    sample = sample_of([PAD, *ids(d, "the cat sat")], [*ids(d, "a <unk> mat"), PAD])
    scores = torch.tensor([-0.5, -1.0, -0.25])
    found = [[Hypothesis(torch.tensor(ids(d, "a dog")), float(scores.sum()) / 3, scores)]]
    texts = Texts(d, d, decode=str.upper)
    [one] = render(found, sample, texts, ignored={EOS})
    score = base2(-1.75 / 3)
    assert list(lines(one)) == [
        "S-7\tTHE CAT SAT",
        "T-7\tA <<UNK>> MAT",
        f"H-7\t{score}\ta dog",
        f"D-7\t{score}\tA DOG",
        "P-7\t-0.7213 -1.4427 -0.3607",
    ]
    # Single precision, shown with all the digits of a double.
    assert score == float(torch.tensor(-1.75 / 3) / math.log(2))
    assert len(str(score)) > 15


def test_without_references_there_is_no_t_line():
    d = make_dictionary()
    hypothesis = Hypothesis(torch.tensor([EOS]), 0.0, torch.zeros(1))
    [one] = render([[hypothesis]], sample_of(ids(d, "cat"), None), Texts(d, d), ignored={EOS})
    assert [line[0] for line in lines(one)] == list("SHDP")
    assert one.outputs[0].text == ""


def test_alignment_counts_words_only():
    source = torch.tensor([PAD, PAD, 8, 9, EOS])
    tokens = torch.tensor([5, 6, EOS])
    attention = torch.tensor([[0.3, 0.2, 0.1, 0.2, 0.2], [0, 0.1, 0.2, 0.1, 0.6], [0, 0, 0, 0, 1]])
    assert alignment.hard(attention, source, tokens, pad=PAD, eos=EOS) == [(1, 0), (0, 1)]
    rows = alignment.soft(attention, source, tokens, pad=PAD)
    assert [len(row) for row in rows] == [3, 3, 3]
    assert alignment.hard(attention[:1], source[-1:], tokens[:1], pad=PAD, eos=EOS) == []


def test_unknown_words_are_replaced(tmp_path):
    pairs = [(1, 0), (0, 1), (5, 2)]
    words = ["<unk>", "<unk>", "<unk>", "x"]
    found = alignment.replace_unknown(words, "<unk>", ["Anna", "Bert"], pairs, {"Anna": "Anne"})
    assert found == ["Bert", "Anne", "<unk>", "x"]
    assert alignment.load_dictionary(None) is None
    assert alignment.load_dictionary("@@") == {}
    file = tmp_path / "dict"
    file.write_text("Anna Anne\nBert Bertram\n")
    assert alignment.load_dictionary(str(file)) == {"Anna": "Anne", "Bert": "Bertram"}
    file.write_text("Anna\n")
    with pytest.raises(DataError, match="line 1"):
        alignment.load_dictionary(str(file))


def test_attention_comes_from_the_model():
    model, d, sample = make_model(), make_dictionary(), make_sample([6, 4])
    generator = SequenceGenerator([model], d, GenerationConfig(max_len_b=6))
    results = generator.generate(sample)
    options = AlignmentOptions([model, model], print_alignment="soft", replacements={})
    found = render(results, sample, Texts(d, d), ignored={EOS}, nbest=2, options=options)
    for one, hypotheses in zip(found, results, strict=True):
        for output, h in zip(one.outputs, hypotheses, strict=False):
            rows = [[float(x) for x in row.split(",")] for row in output.alignment.split()]
            assert len(rows) == len(h.tokens)
            assert all(sum(row) == pytest.approx(1.0, abs=1e-4) for row in rows)


def test_a_model_without_attention_says_so():
    class Blind(PlainModel):
        def forward(self, src_tokens, src_lengths, prev_output_tokens, features_only=False):
            return super().forward(src_tokens, src_lengths, prev_output_tokens)

    model, d, sample = make_model(kind=Blind), make_dictionary(), make_sample([3])
    results = SequenceGenerator([model], d, GenerationConfig(max_len_b=3)).generate(sample)
    options = AlignmentOptions([model], print_alignment="hard")
    with pytest.raises(ConfigError, match="leave out --print-alignment"):
        render(results, sample, Texts(d, d), ignored={EOS}, options=options)


def test_validation_and_generate_take_the_same_sentences():
    model, d, sample = make_model(), make_dictionary(), make_sample([6, 4, 2])
    cfg = GenerationConfig(max_len_b=6)
    texts = Texts(d, d, decode=str.title)
    hypotheses, references = hypotheses_and_references(
        SequenceGenerator([model], d, cfg), sample, texts
    )
    session = Session(SequenceGenerator([model], d, cfg), [model], texts, cfg)
    found = session.translate(sample)
    assert [one.outputs[0].detokenised for one in found] == hypotheses
    assert [one.reference.title() for one in found] == references
    assert session.sentences == 3
    assert session.summary().startswith("Translated 3 sentences (")


@pytest.mark.parametrize(
    ("text", "warns"), [("a b@@ c", True), ("▁a b", True), ("a b c", False), ("a@b", False)]
)
def test_a_warning_when_pieces_are_scored(caplog, text, warns):
    watch = PieceWatch()
    with caplog.at_level(logging.WARNING):
        watch.look("fine", text)
        watch.look(text, text)
    assert len(caplog.records) == warns


@pytest.mark.parametrize(
    ("text", "said"),
    [("▁a b", "type --eval-bleu-remove-bpe sentencepiece"), ("a@@ b", "--eval-bleu-remove-bpe")],
)
def test_the_warning_says_what_to_type_for_these_pieces(caplog, text, said):
    with caplog.at_level(logging.WARNING):
        PieceWatch("--eval-bleu-remove-bpe", also="").look(text, text)
    assert caplog.messages[0].endswith(said)


def test_precision_of_generation():
    model = make_model()
    assert str(place([model], CommonConfig(cpu=True, bf16=True), GenerationConfig())) == "cpu"
    assert model.decoder.output_projection.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="use --bf16"):
        place([model], CommonConfig(cpu=True, fp16=True), GenerationConfig())
