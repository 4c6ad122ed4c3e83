"""Scorers: BLEU, chrF, TER, word error rate, … Importing the package registers those that ship."""

from fairseq_lite.scoring import bleu, optional, standard, wer
from fairseq_lite.scoring.api import SCORERS, Scorer

__all__ = ["SCORERS", "Scorer", "bleu", "optional", "standard", "wer"]
