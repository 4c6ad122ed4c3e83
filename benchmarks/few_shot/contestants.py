"""The two evaluators, each in a process of its own: seconds for all candidates of questions."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.few_shot import twins
from benchmarks.timing import wait
from examples.few_shot import prompting, sampling
from examples.few_shot.builtins import load_builtins
from examples.few_shot.evaluation import Evaluation
from examples.few_shot.models.api import Model
from examples.few_shot.models.flite import FliteModel
from examples.few_shot.models.huggingface import HuggingFaceModel
from examples.few_shot.predictors.api import PredictorOptions, Trial
from examples.few_shot.predictors.prompting import CLMPrompting
from examples.few_shot.settings import PlannedEvaluation
from fairseq_lite.training.allocator import keep_freed_memory


@dataclass(frozen=True)
class Cell:
    """Questions of one task behind so many shots.

    Attributes:
        planned: which.
        questions: how many.
    """

    planned: PlannedEvaluation
    questions: int

    @property
    def label(self) -> str:
        """Of a row of results."""
        return f"{self.planned.task} k={self.planned.k}"

    def trial(self) -> Trial:
        """The questions, read from their files."""
        evaluation = Evaluation(self.planned, None)
        chosen = evaluation.questions[: self.questions]
        shots = sampling.draw(
            evaluation.pool, self.planned.k, seed=0, trial=0, task=self.planned.task
        )
        samples = [question.sample for question in chosen]
        parents = [question.parent for question in chosen]
        return Trial(evaluation.task, evaluation.template, samples, shots, parents)


@dataclass(frozen=True)
class Answer:
    """What a contestant says of a cell.

    Attributes:
        seconds: that it took.
        scores: of every question those of its candidates, less that of its first one: what
            candidates begin with in common may or may not have been scored.
    """

    seconds: float
    scores: list[list[float]]


def _less_first(scores: Sequence[float]) -> list[float]:
    return [each - scores[0] for each in scores]


@dataclass(frozen=True)
class Way:
    """How to measure.

    Attributes:
        threads: of the processor.
        clock: "wall", or "cpu" for the processor's time of the process.
        device: "cpu" or "cuda".
    """

    threads: int
    clock: str
    device: str = "cpu"

    def begin(self) -> None:
        """Set the process up."""
        load_builtins()
        torch.set_num_threads(self.threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        keep_freed_memory()  # as our commands do, for all contestants
        logging.getLogger().setLevel(logging.ERROR)

    def seconds(self) -> float:
        """What the clock says."""
        wait(self.device)
        return time.process_time() if self.clock == "cpu" else time.perf_counter()


def ours(path: Path, cells: Sequence[Cell], way: Way, context_scores: bool) -> Callable[[], Answer]:
    """Our evaluator: prompts are put together, taken apart into tokens, and scored.

    Args:
        path: the checkpoint.
        cells: answered one after another, one a call, again and again.
        way: how to measure.
        context_scores: score the tokens of prompts, too, as gpt3_eval does by default.
    """
    way.begin()
    model = FliteModel(str(path), options={"device": way.device})
    options = PredictorOptions(context_scores=context_scores)
    trials = itertools.cycle([cell.trial() for cell in cells])

    def work() -> Answer:
        trial = next(trials)
        start = way.seconds()
        predictions = CLMPrompting(model, options).predict(trial)
        seconds = way.seconds() - start
        return Answer(
            seconds,
            [
                _less_first([sum(c.meta["tail_scores"]) for c in prediction.candidates])
                for prediction in predictions
            ],
        )

    return work


def harness(
    path: Path, shape: twins.Shape, cells: Sequence[Cell], way: Way, batch_size: int
) -> Callable[[], Answer]:
    """lm-evaluation-harness: the same texts, put together beforehand, as its requests.

    Args:
        path: our checkpoint, whose weights its model has.
        shape: of it.
        cells: as for `ours`.
        way: how to measure.
        batch_size: of the harness.
    """
    way.begin()
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = twins.twin(path, shape)
    model = model.to(way.device)
    lm = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=way.device,
        max_length=shape.length,
    )  # fmt: skip
    reader = HuggingFaceModel(model, tokenizer)
    prompts = [list(_texts(cell.trial(), reader)) for cell in cells]
    requests = itertools.cycle(
        [
            [Instance("loglikelihood", {}, pair, number) for number, pair in pairs]
            for pairs in prompts
        ]
    )

    def work() -> Answer:
        asked = next(requests)
        start = way.seconds()
        found = lm.loglikelihood(asked, disable_tqdm=True)
        seconds = way.seconds() - start
        scores: dict[int, list[float]] = {}
        for request, (score, _) in zip(asked, found, strict=True):
            scores.setdefault(request.idx, []).append(float(score))
        return Answer(seconds, [_less_first(each) for each in scores.values()])

    return work


def _texts(trial: Trial, model: Model) -> Iterator[tuple[int, tuple[str, str]]]:
    """The number of its question, context and continuation of every candidate, all that fits."""
    encoding = prompting.Encoding(model, model.max_tokens - 1)
    pairs = zip(trial.questions, trial.parents, strict=True)
    for number, (question, parent) in enumerate(pairs):
        shots = [trial.template.encode_correct_candidate(shot) for shot in trial.shots.of(parent)]
        prompt, _ = prompting.fitted(trial.template, question, shots, "", encoding)
        for answer in prompt.answers:
            yield number, (prompt.before, answer + prompt.after)
