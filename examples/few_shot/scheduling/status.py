"""How far jobs are, as the files of their evaluations say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from examples.few_shot import stale
from examples.few_shot.scheduling import submissions
from examples.few_shot.scheduling.plan import Job
from examples.few_shot.scheduling.submissions import Submission
from examples.few_shot.settings import PlannedEvaluation


@dataclass(frozen=True)
class Status:
    """How far a job is.

    Attributes:
        completed: evaluations with complete results, made with the same settings.
        submitted: evaluations that somebody works on, be it on one of their trials, with who it is.
        missing: the others.
        todo: those that are to be carried out now.
    """

    completed: tuple[PlannedEvaluation, ...]
    submitted: tuple[tuple[PlannedEvaluation, Submission], ...]
    missing: tuple[PlannedEvaluation, ...]
    todo: tuple[PlannedEvaluation, ...]


def look(jobs: Sequence[Job], *, override: bool = False, recalculate: bool = False) -> list[Status]:
    """Look how far jobs are.

    Args:
        jobs: the jobs.
        override: evaluate again what has results.
        recalculate: only compute metrics again, where there are results.
    """
    every = [each for job in jobs for each in job.evaluations]
    complete = {each.results_file for each in every if stale.is_done(each)}
    # A look at the folders: most of the files that might be there are not.
    folders = {each.product.parent for each in every} | {each.results_file.parent for each in every}
    there = [path for folder in folders for path in folder.glob(f"*{submissions.SUFFIX}")]
    said = {path: mark for path in there if (mark := submissions.read_marker(path)) is not None}
    alive = submissions.living(said.values())
    found = []
    for job in jobs:
        completed: list[PlannedEvaluation] = []
        missing: list[PlannedEvaluation] = []
        submitted, todo = [], []
        for each in job.evaluations:
            done = each.results_file in complete
            marks = (said.get(path) for path in submissions.markers(each))
            mark = next((found for found in marks if found in alive), None)
            if mark is not None and (override or not done):
                submitted.append((each, mark))
                continue
            (completed if done else missing).append(each)
            if done if recalculate else (override or not done):
                todo.append(each)
        found.append(Status(tuple(completed), tuple(submitted), tuple(missing), tuple(todo)))
    return found
