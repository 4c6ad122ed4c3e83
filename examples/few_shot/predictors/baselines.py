"""Baselines that ask no model: `random` and `majorityclass`."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np

from examples.few_shot.predictors.api import (
    PREDICTORS,
    Prediction,
    Predictor,
    ScoredCandidate,
    Trial,
)
from fairseq_lite.errors import ConfigError


def _need_candidates(trial: Trial, name: str) -> None:
    if trial.task.kind != "choice":
        raise ConfigError(
            f"--predictor-name {name}: {trial.task.name} has no candidates to choose from"
        )


@PREDICTORS.register("random")
class RandomPredictor(Predictor):
    """Draws a score for every candidate: the same for the same seed, trial and question."""

    needs_model = False
    reads_prompts = False

    def predict(self, trial: Trial) -> list[Prediction]:
        _need_candidates(trial, "random")
        found = []
        for number, sample in enumerate(trial.questions):
            key = f"{self.options.seed}/{trial.trial}/{trial.task.name}/{number}/{sample.identity}"
            digest = hashlib.sha256(key.encode()).digest()
            generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
            scores = np.log(generator.dirichlet(np.ones(len(sample.candidates))))
            candidates = zip(sample.candidates, scores.tolist(), strict=True)
            found.append(Prediction(sample, tuple(ScoredCandidate(c, s) for c, s in candidates)))
        return found


@PREDICTORS.register("majorityclass", aliases=("majority",))
class MajorityPredictor(Predictor):
    """Always the most frequent answer; of equally frequent ones the first.

    Of the samples that are evaluated, or of those of `--TASK-valid-set`. Where candidates are texts
    of their own for each sample, the most frequent place of the answer.
    """

    needs_model = False
    reads_prompts = False

    def predict(self, trial: Trial) -> list[Prediction]:
        _need_candidates(trial, "majorityclass")
        counted = trial.questions if trial.counted is None else trial.counted
        named = len({sample.candidates for sample in (*counted, *trial.questions)}) == 1
        answers = Counter(
            answer if named else sample.candidates.index(answer)
            for sample in counted
            for answer in sample.correct
        )
        total = sum(answers.values())
        found = []
        for sample in trial.questions:
            scored = [
                ScoredCandidate(c, answers[c if named else j] / max(total, 1))
                for j, c in enumerate(sample.candidates)
            ]
            found.append(Prediction(sample, tuple(scored)))
        return found
