"""Few-shot tasks and templates in tests: made rows, prompts as text, checks of real files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.few_shot import prompting, sampling
from examples.few_shot.builtins import load_builtins
from examples.few_shot.metrics.api import build_metric
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.predictors.api import Prediction, PredictorOptions, ScoredCandidate, Trial
from examples.few_shot.predictors.prompting import CLMPrompting
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask, build_task
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate, build_template
from fairseq_lite.errors import DataError


def make_task(
    name: str, data_dir: Path, language: str | None = None, **options: Any
) -> FewShotTask:
    """A task whose files lie in a folder."""
    load_builtins()
    return build_task(name, TASKS.get(name).config(**options), language=language, data_dir=data_dir)


def make_template(
    name: str, *, sep: str = "\n", language: str | None = None, **options: Any
) -> FewShotTemplate:
    """A template that joins with line breaks unless told otherwise."""
    load_builtins()
    return build_template(name, TEMPLATES.get(name).config(**options), sep=sep, language=language)


def write_text(path: Path, text: str) -> Path:
    """A file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path: Path, *rows: Mapping[str, Any]) -> Path:
    """A file of JSON lines."""
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def full_prompt(
    template: FewShotTemplate, sample: FewShotSample, *shots: FewShotSample
) -> list[str]:
    """The whole text of each candidate, behind shots."""
    said = [template.encode_correct_candidate(shot) for shot in shots]
    return prompting.compose(template, sample, said, template.task_description).texts


def predicted(sample: FewShotSample, best: str) -> Prediction:
    """A prediction whose best candidate is this one."""
    return Prediction(
        sample, tuple(ScoredCandidate(c, float(c == best)) for c in sample.candidates)
    )


def scores_of(
    task: FewShotTask,
    template: FewShotTemplate,
    samples: Sequence[FewShotSample],
    k: int = 1,
    calibrate: Iterable[str] = (),
) -> dict[str, float]:
    """The task's metrics of an evaluation by a model without weights.

    Args:
        task: the task.
        template: of its samples.
        samples: both what is asked and what shots are taken from.
        k: shots.
        calibrate: calibration options.
    """
    options = tuple(calibrate)
    questions = [(q, sample) for sample in samples for q in sample.problems()]
    trial = Trial(
        task,
        template,
        [question for question, _ in questions],
        sampling.draw(samples, k, seed=0, trial=0, task=task.name),
        [parent for _, parent in questions],
    )
    predictor = CLMPrompting(
        DummyModel(),
        PredictorOptions(
            train_sep=template.sep,
            calibrator="average_option" if options else None,
            calibration_options=options,
        ),
    )
    predictions = predictor.predict(trial)
    assert len(predictions) == len(questions)
    found: dict[str, float] = {}
    for name in task.metrics:
        found |= build_metric(name).score(predictions)
    return found


def check_real_set(
    task: FewShotTask, set_name: str, templates: Sequence[str], count: int, *, answered: bool = True
) -> tuple[FewShotSample, ...]:
    """Read a real file as a whole, put all of it into words, evaluate three of its samples.

    Args:
        task: the task, in its folder.
        set_name: one of its sets, or a file.
        templates: all that serve it.
        count: how many samples there must be.
        answered: whether right answers are known.
    """
    samples = task.samples(set_name)
    assert len(samples) == count
    for name in templates:
        template = make_template(name, language=task.language)
        for sample in samples:
            for question in sample.problems():
                assert template.encode(question).count(MASK) == 1
                assert len(set(question.candidates)) == len(question.candidates) > 1
                assert bool(question.correct) == answered
                assert set(question.correct) <= set(question.candidates)
                assert all(template.verbalize(question, c).strip() for c in question.candidates)
        scores = scores_of(task, template, samples[:3], k=1 if answered else 0)
        assert not answered or math.isfinite(next(iter(scores.values())))
    return samples


def reason(task: FewShotTask, set_name: str) -> str:
    """Why a set cannot be read, in one line."""
    with pytest.raises(DataError) as error:
        task.samples(set_name)
    text = str(error.value)
    assert "\n" not in text
    return text
