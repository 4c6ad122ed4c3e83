"""What a predictor is: from the questions of a trial to predictions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.few_shot.models.api import Model, Progress
from examples.few_shot.samples import FewShotSample
from examples.few_shot.sampling import Shots
from examples.few_shot.tasks.api import FewShotTask
from examples.few_shot.templates.api import FewShotTemplate
from fairseq_lite.registry import Registry

PREDICTORS = Registry("predictor", "--predictor-name")


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate, or a written answer.

    Attributes:
        candidate: its name; what was written.
        score: the higher the better.
        meta: what else is known: plain values.
    """

    candidate: str
    score: float
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of one question.

    Attributes:
        sample: the question.
        candidates: in the order of the sample's; at least one.
        meta: what is known of it as a whole: plain values.
    """

    sample: FewShotSample
    candidates: tuple[ScoredCandidate, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> ScoredCandidate:
        """That with the highest score, of equal ones the first; one that is no number is lowest."""
        return max(self.candidates, key=lambda c: -math.inf if math.isnan(c.score) else c.score)


@dataclass(frozen=True)
class PredictorOptions:
    """What evaluations say of how to predict.

    Attributes:
        scoring: see `scoring.score`.
        calibrator: "average_option" or None.
        calibration_options: see `calibration.py`.
        train_sep: between shots.
        newline_to_end: `--replace-newline-with-eos`.
        max_positions: the most tokens of a prompt with its answer; None: the model's.
        same_number_of_shots: `--truncate-few-shot-samples-globally`.
        beam_size: of written answers, and how many tokens a ranking lists.
        add_prompt: keep prompts in the predictions; likewise the other three.
        context_scores: score the tokens of prompts too.
        seed: of predictors that draw.
    """

    scoring: str = "sum"
    calibrator: str | None = None
    calibration_options: tuple[str, ...] = ()
    train_sep: str = " "
    newline_to_end: bool = False
    max_positions: int | None = None
    same_number_of_shots: bool = False
    beam_size: int = 1
    add_prompt: bool = False
    add_calib: bool = False
    add_positional_scores: bool = False
    add_prompt_tokens: bool = False
    context_scores: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """Everything a predictor is given.

    Attributes:
        task: the task.
        template: how questions are put.
        questions: those to answer; subproblems one by one.
        shots: the shots of each question's sample.
        parents: for each question the sample it belongs to.
        counted: whose answers the majority is of, `--TASK-valid-set`; None: the questions.
        trial: its number.
        progress: is told how many questions are done.
    """

    task: FewShotTask
    template: FewShotTemplate
    questions: Sequence[FewShotSample]
    shots: Shots
    parents: Sequence[FewShotSample]
    counted: Sequence[FewShotSample] | None = None
    trial: int = 0
    progress: Progress | None = None


class Predictor(ABC):
    """Answers questions.

    Attributes:
        needs_model: whether it asks a model that is loaded here.
        reads_prompts: whether templates and what makes scores matter to it.

    Args:
        model: what it asks; None where it needs none.
        options: see `PredictorOptions`.
    """

    needs_model = True
    reads_prompts = True

    def __init__(self, model: Model | None, options: PredictorOptions) -> None:
        self.model = model
        self.options = options

    @abstractmethod
    def predict(self, trial: Trial) -> list[Prediction]:
        """Answer the questions of a trial, in their order."""


def predictor_type(name: str) -> type[Predictor]:
    """The class of a predictor.

    Raises:
        ConfigError: unknown.
    """
    found: Any = PREDICTORS.get(name).factory
    return found  # type: ignore[no-any-return]
