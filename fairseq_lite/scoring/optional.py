"""Scorers whose packages are not installed by default: METEOR and BERTScore."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import MissingDependency
from fairseq_lite.scoring.api import SCORERS, Scorer


@SCORERS.register("meteor")
class MeteorScorer(Scorer):
    """METEOR (Banerjee & Lavie 2005), by nltk: the mean over sentences, 0 to 1."""

    def __init__(self, cfg: object = None) -> None:
        super().__init__(cfg)
        try:
            meteor_score = importlib.import_module("nltk.translate.meteor_score")
        except ImportError:
            raise MissingDependency("--scoring meteor needs nltk: pip install nltk") from None
        self._meteor = meteor_score

    def score(self) -> float:
        """The score of all pairs so far."""
        try:
            values = [
                self._meteor.single_meteor_score(r.split(), h.split())
                for r, h in zip(self.references, self.hypotheses, strict=True)
            ]
        except LookupError:
            raise MissingDependency(
                "--scoring meteor needs WordNet: python -m nltk.downloader wordnet"
            ) from None
        return sum(values) / len(values) if values else 0.0

    def result_string(self) -> str:
        """The score as the final line prints it."""
        return f"METEOR: {self.score():.4f}"


@dataclass(frozen=True)
class BertScoreConfig:
    """The language whose model compares the sentences."""

    bert_score_lang: str = flag("en", "language of the sentences")


@SCORERS.register("bert_score", config=BertScoreConfig)
class BertScoreScorer(Scorer):
    """BERTScore F1 (Zhang et al. 2020): the mean over sentences."""

    cfg: BertScoreConfig

    def __init__(self, cfg: BertScoreConfig | None = None) -> None:
        super().__init__(cfg or BertScoreConfig())
        try:
            bert_score = importlib.import_module("bert_score")
        except ImportError:
            raise MissingDependency(
                "--scoring bert_score needs bert-score: pip install bert-score"
            ) from None
        self._bert_score = bert_score

    def score(self) -> float:
        """The score of all pairs so far."""
        if not len(self):
            return 0.0
        _, _, f1 = self._bert_score.score(
            self.hypotheses, self.references, lang=self.cfg.bert_score_lang
        )
        return float(f1.mean())

    def result_string(self) -> str:
        """The score as the final line prints it."""
        return f"BERTScore: {self.score():.4f}"
