"""From a batch to texts and their scores: the one path of flite-generate and of validation's BLEU.

A task that validates with BLEU does, for every batch::

    texts = Texts(task.target_dictionary, post_process="@@ ", decode=detokenizer.decode)
    hypotheses, references = hypotheses_and_references(generator, sample, texts)
    sums |= bleu_sums(hypotheses, references)                  # fairseq_lite.scoring.standard

and at the end `bleu_of_sums(sums)`. It gives the same sentences as flite-generate's D and T lines.
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.text.postprocess import post_process
from fairseq_lite.generation import alignment
from fairseq_lite.generation.generator import Hypothesis
from fairseq_lite.models.api import Model
from fairseq_lite.scoring.api import Scorer

logger = logging.getLogger(__name__)

# What shows that words are still in pieces, subword-nmt's and sentencepiece's marks, and what to
# type after --remove-bpe.
PIECE_MARKS = {"@@": "", "▁": " sentencepiece"}


class Generator(Protocol):
    """`SequenceGenerator`, `ReferenceScorer`, or a task's own."""

    @property
    def ignored_symbols(self) -> set[int]:
        """What is left out when an output is printed, besides what always is."""
        ...

    def generate(
        self, sample: dict[str, Any], prefix_tokens: Tensor | None = None
    ) -> list[list[Hypothesis]]:
        """Hypotheses of each sentence, best first."""
        ...


def _same(text: str) -> str:
    return text


@dataclass(frozen=True)
class Texts:
    """How ids become text.

    Attributes:
        tgt_dict: the target dictionary.
        src_dict: the source dictionary, where sources are printed.
        post_process: how subwords are joined; see `data.text.postprocess`.
        decode: undoes the remaining segmentation: `--bpe`'s decoder, then `--tokenizer`'s.
        decode_symbols: whether `decode` begins with a `--bpe`, which joins symbols by itself: it
            gets them as they are, not what `post_process` made of them.
    """

    tgt_dict: Dictionary
    src_dict: Dictionary | None = None
    post_process: str | None = None
    decode: Callable[[str], str] = _same
    decode_symbols: bool = False

    def source(self, tokens: Tensor) -> str:
        """The line a source came from, as symbols."""
        assert self.src_dict is not None
        return self.src_dict.string(_unpadded(tokens, self.src_dict.pad()))

    def reference(self, tokens: Tensor, ignored: set[int] | None = None) -> str:
        """A reference, as symbols; an unknown one is written `<<unk>>`, as in no output."""
        ids = _unpadded(tokens, self.tgt_dict.pad())
        return self.tgt_dict.string(ids, escape_unk=True, extra_symbols_to_ignore=ignored)

    def pieces(self, tokens: Tensor, ignored: set[int] | None = None) -> list[str]:
        """The symbols of an output, before anything is joined."""
        line = self.tgt_dict.string(tokens.tolist(), extra_symbols_to_ignore=ignored)
        return line.split(" ") if line else []

    def joined(self, symbols: str) -> str:
        """Symbols as a line of words."""
        return post_process(symbols, self.post_process)

    def detokenised(self, symbols: str) -> str:
        """Symbols as text."""
        return self.decode(symbols if self.decode_symbols else self.joined(symbols))


def _unpadded(tokens: Tensor, pad: int) -> list[int]:
    return [i for i in tokens.tolist() if i != pad]


@dataclass
class Output:
    """One hypothesis as it is printed.

    Attributes:
        text: the H line.
        detokenised: the D line.
        score: in base 2.
        positional_scores: of each token, in base 2.
        alignment: the A line, where asked for.
        length: number of tokens, the end symbol included.
    """

    text: str
    detokenised: str
    score: float
    positional_scores: list[float]
    alignment: str | None = None
    length: int = 0


@dataclass
class Translated:
    """A sentence with its outputs, best first.

    Attributes:
        id: its number in the split, from 0.
        source: words of the source, where there is a source dictionary.
        reference: words of the reference, where there is one.
        outputs: at most --nbest.
        source_text: the source detokenised: the S line.
        reference_text: the reference detokenised: the T line.
    """

    id: int
    source: str | None
    reference: str | None
    outputs: list[Output] = field(default_factory=list)
    source_text: str | None = None
    reference_text: str | None = None


@dataclass(frozen=True)
class AlignmentOptions:
    """What is read from attention.

    Attributes:
        models: the models that translated.
        print_alignment: "hard", "soft" or None.
        replacements: of unknown words; None: leave them.
        source_line: the text of sentence n before unknown words were replaced, where it is known.
    """

    models: Sequence[Model]
    print_alignment: str | None = None
    replacements: dict[str, str] | None = None
    source_line: Callable[[int], str | None] = lambda n: None

    @property
    def wanted(self) -> bool:
        """Whether attention is needed at all."""
        return self.print_alignment is not None or self.replacements is not None


def base2(score: float) -> float:
    """A natural logarithm in base 2, in single precision as fairseq computes and prints it."""
    return float(np.float32(score) / np.float32(math.log(2)))


def prefix_of(sample: dict[str, Any], size: int) -> Tensor | None:
    """The first tokens of the references (`--prefix-size`), or None."""
    target: Tensor | None = sample.get("target")
    return target[:, :size] if size > 0 and target is not None else None


def render(
    results: Sequence[Sequence[Hypothesis]],
    sample: dict[str, Any],
    texts: Texts,
    *,
    ignored: set[int],
    nbest: int = 1,
    options: AlignmentOptions | None = None,
) -> list[Translated]:
    """Turn a batch's hypotheses into text.

    Args:
        results: what the generator returned.
        sample: the batch.
        texts: how ids become text.
        ignored: the generator's `ignored_symbols`.
        nbest: outputs of each sentence.
        options: alignments and unknown words.
    """
    if options is not None and options.wanted:
        pad, eos = texts.tgt_dict.pad(), texts.tgt_dict.eos()
        alignment.add_attention(options.models, sample, results, nbest=nbest, pad=pad, eos=eos)
    sources, targets = sample["net_input"]["src_tokens"].cpu(), sample.get("target")
    if targets is not None:
        targets = targets.cpu()
    translated = []
    for i, number in enumerate(sample["id"].tolist()):
        source = None if texts.src_dict is None else texts.source(sources[i])
        reference = None if targets is None else texts.reference(targets[i], ignored)
        one = Translated(
            id=number,
            source=None if source is None else texts.joined(source),
            reference=None if reference is None else texts.joined(reference),
            source_text=None if source is None else texts.detokenised(source),
            reference_text=None if reference is None else texts.detokenised(reference),
        )
        for hypothesis in results[i][:nbest]:
            one.outputs.append(_output(hypothesis, sources[i], number, texts, ignored, options))
        translated.append(one)
    return translated


def _output(
    hypothesis: Hypothesis,
    source: Tensor,
    number: int,
    texts: Texts,
    ignored: set[int],
    options: AlignmentOptions | None,
) -> Output:
    pieces = texts.pieces(hypothesis.tokens, ignored)
    printed: str | None = None
    attention = hypothesis.attention
    if options is not None and attention is not None:
        pad, eos = texts.tgt_dict.pad(), texts.tgt_dict.eos()
        pairs = alignment.hard(attention, source, hypothesis.tokens, pad=pad, eos=eos)
        if options.replacements is not None:
            line = options.source_line(number)
            if line is None and texts.src_dict is not None:
                line = texts.src_dict.string(_unpadded(source, pad))
            pieces = alignment.replace_unknown(
                pieces,
                texts.tgt_dict.unk_string(),
                (line or "").split(),
                pairs,
                options.replacements,
            )
        if options.print_alignment == "hard":
            printed = " ".join(f"{s}-{t}" for s, t in pairs)
        elif options.print_alignment == "soft":
            rows = alignment.soft(attention, source, hypothesis.tokens, pad=pad)
            printed = " ".join(",".join(f"{p:.6f}" for p in row) for row in rows)
    symbols = " ".join(pieces)
    positional = (hypothesis.positional_scores.numpy() / np.float32(math.log(2))).tolist()
    return Output(
        text=texts.joined(symbols),
        detokenised=texts.detokenised(symbols),
        score=base2(hypothesis.score),
        positional_scores=positional,
        alignment=printed,
        length=len(hypothesis.tokens),
    )


def pair_to_score(one: Translated, detokenised: bool) -> tuple[str, str]:
    """(reference, hypothesis) of a sentence as a scorer takes them; the best output counts."""
    assert one.reference is not None and one.reference_text is not None
    best = one.outputs[0] if one.outputs else None
    if detokenised:
        return one.reference_text, best.detokenised if best else ""
    return one.reference, best.text if best else ""


def hypotheses_and_references(
    generator: Generator,
    sample: dict[str, Any],
    texts: Texts,
    *,
    prefix_size: int = 0,
    detokenised: bool = True,
) -> tuple[list[str], list[str]]:
    """Translate a batch; its best outputs and its references as text, in the batch's order."""
    results = generator.generate(sample, prefix_of(sample, prefix_size))
    ignored = generator.ignored_symbols
    sentences = render(results, sample, texts, ignored=ignored)
    pairs = [pair_to_score(one, detokenised) for one in sentences]
    return [hypothesis for _, hypothesis in pairs], [reference for reference, _ in pairs]


class PieceWatch:
    """Warns once when what is scored still consists of pieces of words.

    Args:
        flag: that puts them together.
        also: another way, after what to type.
    """

    def __init__(
        self, flag: str = "--remove-bpe", also: str = ", or --bpe with its decoder"
    ) -> None:
        self.flag = flag
        self.also = also
        self.warned = False

    def look(self, reference: str, hypothesis: str) -> None:
        """Look at one pair."""
        if self.warned:
            return
        for mark, value in PIECE_MARKS.items():
            if mark in reference or mark in hypothesis:
                self.warned = True
                logger.warning(
                    "pieces of words (marked %s) remain in what is scored, such as %r: the score"
                    " is of pieces, not of words, and cannot be compared; type %s%s%s",
                    mark,
                    textwrap.shorten(hypothesis if mark in hypothesis else reference, 60),
                    self.flag,
                    value,
                    self.also,
                )
                return


def add_to(scorer: Scorer, one: Translated, texts: Texts, watch: PieceWatch | None = None) -> None:
    """Give a sentence to a scorer; without a reference nothing happens.

    A scorer of tokens gets the symbols of the dictionary, or with --post-process the words of the
    detokenised text, as in fairseq.
    """
    if one.reference is None:
        return
    detokenised = scorer.detokenised or texts.post_process is not None
    reference, hypothesis = pair_to_score(one, detokenised)
    if watch is not None:
        watch.look(reference, hypothesis)
    scorer.add(reference, hypothesis)
