"""Carrying out a job, in a process of the local pool or in a job of Slurm's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.few_shot import stale
from examples.few_shot.options import EvaluationOptions
from examples.few_shot.predictors.api import predictor_type
from examples.few_shot.scheduling.plan import Job
from examples.few_shot.settings import PlannedEvaluation, plan
from fairseq_lite.errors import FliteError
from fairseq_lite.plugins import import_user_dir


@dataclass(frozen=True)
class Order:
    """A job as plain values, which travel to other processes and machines.

    Attributes:
        name: the job's.
        calls: model names with arguments of `plan`.
        only: the products of what is to be done (see `PlannedEvaluation`); the calls may mean more.
        override: make them again where they are there.
        recalculate: only compute metrics again.
        world_size: processes that share the work, where the arguments do not say.
    """

    name: str
    calls: tuple[tuple[str, dict[str, Any]], ...]
    only: tuple[str, ...]
    override: bool = False
    recalculate: bool = False
    world_size: int = 1

    @property
    def user_dirs(self) -> tuple[str, ...]:
        """Folders of plugins, which come before anything is planned."""
        found = (args.get("user_dir") for _, args in self.calls)
        return tuple(dict.fromkeys(str(each) for each in found if each))

    def planned(self) -> list[PlannedEvaluation]:
        """The evaluations, or of each one trial."""
        for folder in self.user_dirs:
            import_user_dir(folder)
        only = set(self.only)
        found: dict[str, PlannedEvaluation] = {}
        for model_name, args in self.calls:
            values = {"distributed_world_size": self.world_size, **args}
            values["recalc_metrics_from_predictions"] = self.recalculate
            values["override_completed"] = self.override
            for each in plan(model_name, **values):
                for one in (each, *each.by_trial()):
                    if str(one.product) in only:
                        found.setdefault(str(one.product), one)
        return list(found.values())

    def without(self, done: Sequence[PlannedEvaluation]) -> Order:
        """What is left when some are done."""
        files = {str(each.product) for each in done}
        return dataclasses.replace(self, only=tuple(f for f in self.only if f not in files))


def order_of(
    job: Job,
    todo: Sequence[PlannedEvaluation],
    *,
    override: bool = False,
    recalculate: bool = False,
    world_size: int = 1,
) -> Order:
    """The order to carry out evaluations of a job."""
    return Order(
        job.name,
        tuple((call.model_name, dict(call.run_args)) for call in job.calls),
        tuple(str(each.product) for each in todo),
        override,
        recalculate,
        world_size,
    )


def execute(order: Order, *, ranks: int = 1) -> list[str]:
    """Carry out an order; one evaluation's mistake does not stop the others.

    Args:
        order: what to do.
        ranks: processes of a launcher's that do the same, this one among them. With several nothing
            may depend on how far one of them came.

    Returns:
        Mistakes that users can mend, one line each.
    """
    planned = order.planned()
    if not order.override and not order.recalculate:
        planned = [each for each in planned if not stale.is_done(each)]
    errors: list[str] = []
    if len(planned) > 1 and not order.recalculate:
        planned = _with_data(planned, errors)
    for group in _groups(planned):
        _run_group(group, errors, ranks > 1)
    return list(dict.fromkeys(errors))


def _with_data(planned: Sequence[PlannedEvaluation], errors: list[str]) -> list[PlannedEvaluation]:
    """Those whose data can be read: otherwise one missing or damaged file would stop the others."""
    from examples.few_shot.evaluation import Evaluation, Tasks

    found = []
    tasks = Tasks()
    for each in planned:
        try:
            evaluation = Evaluation(each, None, tasks=tasks)
            for samples in (evaluation.samples, evaluation.pool, evaluation.counted):
                len(samples)  # reads them
        except FliteError as e:
            errors.append(str(e))
        else:
            found.append(each)
    return found


# What evaluations may differ in though they share a loaded model.
_SHARED = {
    "scoring", "calibrator_name", "data_dir", "results_dir", "predictions_dump_dir",
    "add_prompt_to_meta", "add_calib_to_meta", "add_positional_scores_to_meta",
    "add_prompt_tokens_to_meta", "n_eval_samples", "confusion_matrix", "uniform_sampling",
    "beam_size", "num_trials", "seed", "truncate_few_shot_samples_globally", "max_positions",
    "no_shuffle_examples", "allow_test_shots", "replace_newline_with_eos", "train_sep",
    "skip_completed", "any_train_set", "any_valid_set", "any_train_lang", "any_valid_lang",
    "skip_context_scores",
}  # fmt: skip


def _groups(planned: Sequence[PlannedEvaluation]) -> list[list[PlannedEvaluation]]:
    """Those that one loaded model can answer, together."""
    loading = [f.name for f in dataclasses.fields(EvaluationOptions) if f.name not in _SHARED]
    found: dict[tuple[Any, ...], list[PlannedEvaluation]] = {}
    for each in planned:
        key = (each.model, *(repr(getattr(each.options, name)) for name in loading))
        found.setdefault(key, []).append(each)
    return list(found.values())


def _run_group(group: list[PlannedEvaluation], errors: list[str], one_of_several: bool) -> None:
    from examples.few_shot.gpt3_eval import run_planned

    if not needs_model(group[0]):
        for each in group:
            try:
                run_planned([each])
            except FliteError as e:
                errors.append(f"{each.task}: {e}")
        return
    fruitless = 0
    while group:
        before = [_stamp(each) for each in group]
        try:
            run_planned(group)
            return
        except FliteError as e:
            if one_of_several:
                raise
            done = 0
            while done < len(group) and _stamp(group[done]) != before[done]:
                done += 1
            # The first without results has failed. Where none has any, twice, the model has.
            fruitless = 0 if done else fruitless + 1
            failed = group[min(done, len(group) - 1)]
            if fruitless > 1:
                errors[-1] = str(e)
                return
            errors.append(f"{failed.task}: {e}")
            group = group[done + 1 :]


def needs_model(planned: PlannedEvaluation) -> bool:
    """Whether an evaluation asks a model; a baseline does not."""
    return predictor_type(planned.options.predictor_name).needs_model


def _stamp(planned: PlannedEvaluation) -> tuple[int, int] | None:
    """Changes when it has been made."""
    try:
        found = planned.product.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
