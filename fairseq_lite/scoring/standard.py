"""The scorers that are sacrebleu's (Post 2018): BLEU, chrF and TER of detokenised text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from sacrebleu.metrics.base import Score
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import MissingDependency
from fairseq_lite.scoring.api import SCORERS, Scorer

TOKENIZERS = (
    "13a", "char", "flores101", "flores200", "intl", "ja-mecab", "ko-mecab", "none", "spBLEU-1K",
    "spm", "zh",
)  # fmt: skip


@dataclass(frozen=True)
class SacrebleuConfig:
    """How sacrebleu tokenises what it compares."""

    sacrebleu_tokenizer: str = flag("13a", "sacrebleu's tokenizer", choices=TOKENIZERS)
    sacrebleu_lowercase: bool = flag(False, "compare in lower case")
    sacrebleu_char_level: bool = flag(False, "compare characters instead of words")


def make_bleu(cfg: SacrebleuConfig) -> BLEU:
    """The BLEU of sacrebleu for a configuration.

    Raises:
        MissingDependency: the tokenizer needs a package that is not installed.
    """
    try:
        if cfg.sacrebleu_char_level:
            # The tokenizer has run by the time characters are split off: see `_characters`.
            return BLEU(tokenize="none", force=True)
        return BLEU(tokenize=cfg.sacrebleu_tokenizer, lowercase=cfg.sacrebleu_lowercase, force=True)
    except (ImportError, RuntimeError) as e:
        extra = {"ja-mecab": "[ja]", "ko-mecab": "[ko]"}.get(cfg.sacrebleu_tokenizer, "")
        raise MissingDependency(
            f"--sacrebleu-tokenizer {cfg.sacrebleu_tokenizer} needs more packages ({e}): "
            f"pip install 'sacrebleu{extra}' sentencepiece"
        ) from None


def _characters(text: str, tokenizer: BLEU, lowercase: bool) -> str:
    if lowercase:
        text = text.lower()
    # U+2581 stands for the space between words, so word boundaries count as characters.
    return " ".join(tokenizer.tokenizer(text.rstrip()).replace(" ", "▁"))


class StandardScorer(Scorer):
    """A metric of sacrebleu's over all pairs at once."""

    metric: BLEU | CHRF | TER
    name: ClassVar[str]
    _known: tuple[int, Score] | None = None

    def result(self) -> Score:
        """What sacrebleu returns for the pairs so far."""
        if self._known is None or self._known[0] != len(self):
            found = self.metric.corpus_score(self.hypotheses, [self.references])
            self._known = len(self), found
        return self._known[1]

    def score(self) -> float:
        """The metric, 0 to 100 (TER may exceed it)."""
        return float(self.result().score) if len(self) else 0.0

    def result_string(self) -> str:
        """The metric's name, value and details."""
        return str(self.result().format()) if len(self) else f"{self.name} = 0.00 (no sentences)"

    @property
    def signature(self) -> str | None:
        """The signature the `sacrebleu` command prints."""
        return self._signature()

    def _signature(self) -> str | None:
        if not len(self):
            return None
        self.result()  # sacrebleu knows the number of references only once it has seen them
        return str(self.metric.get_signature().format())


@SCORERS.register("sacrebleu", config=SacrebleuConfig)
class SacrebleuScorer(StandardScorer):
    """BLEU as the `sacrebleu` command computes it."""

    cfg: SacrebleuConfig
    name = "BLEU"

    def __init__(self, cfg: SacrebleuConfig | None = None) -> None:
        super().__init__(cfg or SacrebleuConfig())
        self.metric = make_bleu(self.cfg)
        self._words = (
            BLEU(tokenize=self.cfg.sacrebleu_tokenizer) if self.cfg.sacrebleu_char_level else None
        )

    def add(self, reference: str, hypothesis: str) -> None:
        """Take one more pair."""
        if self._words is not None:
            lowercase = self.cfg.sacrebleu_lowercase
            reference = _characters(reference, self._words, lowercase)
            hypothesis = _characters(hypothesis, self._words, lowercase)
        super().add(reference, hypothesis)

    @property
    def signature(self) -> str | None:
        """The signature the `sacrebleu` command prints; characters show in its `tok`."""
        signature = self._signature()
        if signature is not None and self.cfg.sacrebleu_char_level:
            case = "lc" if self.cfg.sacrebleu_lowercase else "mixed"
            tokenizer = f"|tok:{self.cfg.sacrebleu_tokenizer}+characters"
            signature = signature.replace("|tok:none", tokenizer)
            signature = signature.replace("case:mixed", f"case:{case}")
        return signature


@SCORERS.register("chrf")
class ChrfScorer(StandardScorer):
    """chrF2 (Popović 2015)."""

    name = "chrF2"

    def __init__(self, cfg: object = None) -> None:
        super().__init__(cfg)
        self.metric = CHRF()


@SCORERS.register("ter")
class TerScorer(StandardScorer):
    """Translation edit rate (Snover et al. 2006); lower is better."""

    name = "TER"

    def __init__(self, cfg: object = None) -> None:
        super().__init__(cfg)
        self.metric = TER()


MAX_ORDER = 4


def bleu_sums(
    hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a"
) -> dict[str, float]:
    """The counts BLEU is made of; those of several batches or ranks add up.

    Args:
        hypotheses: detokenised text.
        references: one for each.
        tokenize: sacrebleu's tokenizer, "13a", or "none" for tokenised text.
    """
    if not hypotheses:
        counts, totals, lengths = [0] * MAX_ORDER, [0] * MAX_ORDER, (0, 0)
    else:
        result = BLEU(tokenize=tokenize, force=True).corpus_score(
            list(hypotheses), [list(references)]
        )
        counts, totals, lengths = result.counts, result.totals, (result.sys_len, result.ref_len)
    sums = {"_bleu_sys_len": float(lengths[0]), "_bleu_ref_len": float(lengths[1])}
    for i in range(MAX_ORDER):
        sums[f"_bleu_counts_{i}"] = float(counts[i])
        sums[f"_bleu_totals_{i}"] = float(totals[i])
    return sums


def bleu_of_sums(sums: Mapping[str, float]) -> float:
    """BLEU from added-up `bleu_sums`, equal to sacrebleu's over all the sentences at once."""
    totals = [int(sums.get(f"_bleu_totals_{i}", 0)) for i in range(MAX_ORDER)]
    if not any(totals):
        return 0.0
    result = BLEU.compute_bleu(
        correct=[int(sums[f"_bleu_counts_{i}"]) for i in range(MAX_ORDER)],
        total=totals,
        sys_len=int(sums["_bleu_sys_len"]),
        ref_len=int(sums["_bleu_ref_len"]),
        smooth_method="exp",
    )
    return float(result.score)
