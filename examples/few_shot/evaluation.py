"""Running evaluations: trials, their predictions, and the results over all of them.

A trial's predictions are written when it ends, an evaluation's results when its trials have. Both
appear whole or not at all, so whatever is interrupted goes on with the first trial that is missing.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.few_shot import results, sampling
from examples.few_shot.confusion import confusion_lines
from examples.few_shot.files import data_root
from examples.few_shot.metrics.api import Metric, build_metric
from examples.few_shot.models.api import Model
from examples.few_shot.predictors.api import (
    Prediction,
    Predictor,
    PredictorOptions,
    Trial,
    predictor_type,
)
from examples.few_shot.samples import FewShotSample
from examples.few_shot.settings import PlannedEvaluation
from examples.few_shot.stale import data_digests, data_files
from examples.few_shot.statistics import over_trials
from examples.few_shot.tasks.api import FewShotTask, build_task, task_type
from examples.few_shot.templates.api import FewShotTemplate, build_template
from examples.few_shot.versions import of_packages, versions
from fairseq_lite.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# Metrics of every task, beside its own.
COMMON_METRICS = ("candidate_ppl", "gold_answer_ppl")

# Metrics of what calibrates, where anything does.
CALIBRATION_METRICS = ("calibration_ppl",)


@dataclass(frozen=True)
class Question:
    """A question with its place.

    Attributes:
        number: of its sample, and of the subproblem behind a dot.
        sample: the question.
        parent: the sample it belongs to.
    """

    number: str
    sample: FewShotSample
    parent: FewShotSample


class Tasks:
    """The tasks of evaluations that are made one after another.

    Evaluations of one task, in one language, share its samples: files are read once for all
    numbers of shots. When the next task's turn comes, or the next language's, they are let go: what
    is held grows neither with the number of tasks nor with that of languages. What is shown in a
    language other than that of the question stays as long as the task does.
    """

    def __init__(self) -> None:
        self._of: tuple[str, str, Path] | None = None
        self._asked: dict[str | None, FewShotTask] = {}
        self._shown: dict[str | None, FewShotTask] = {}

    def of(self, planned: PlannedEvaluation) -> FewShotTask:
        """The task of an evaluation."""
        self._turn_to(planned)
        if planned.language not in self._asked:
            self._asked = {}
            self._asked[planned.language] = self._build(planned, planned.language)
        return self._asked[planned.language]

    def shown(self, planned: PlannedEvaluation, language: str | None) -> FewShotTask:
        """The task that an evaluation's shots, or the answers it counts, are of."""
        if language == planned.language:
            return self.of(planned)
        self._turn_to(planned)
        if language not in self._shown:
            self._shown[language] = self._build(planned, language)
        return self._shown[language]

    def _turn_to(self, planned: PlannedEvaluation) -> None:
        wanted = (planned.task, repr(planned.task_options), data_root(planned.options.data_dir))
        if wanted != self._of:
            self._of, self._asked, self._shown = wanted, {}, {}

    @staticmethod
    def _build(planned: PlannedEvaluation, language: str | None) -> FewShotTask:
        root = data_root(planned.options.data_dir)
        return build_task(planned.task, planned.task_options, language=language, data_dir=root)


class Evaluation:
    """One evaluation, from its data files to its results.

    Files are looked for at once, and read when samples are first asked for.

    Args:
        planned: which.
        model: what is evaluated; None where the predictor needs none.
        is_main: whether this process writes.
        tasks: those of the evaluations that are made together.

    Raises:
        DataError: a data file is missing.
    """

    def __init__(
        self,
        planned: PlannedEvaluation,
        model: Model | None,
        *,
        is_main: bool = True,
        tasks: Tasks | None = None,
    ) -> None:
        self.planned = planned
        self.model = model
        self.is_main = is_main
        data_files(planned)
        self._tasks = Tasks() if tasks is None else tasks
        self.template: FewShotTemplate = build_template(
            planned.template,
            planned.template_options,
            sep=planned.options.separator,
            language=planned.language,
        )
        further = CALIBRATION_METRICS if planned.calibration_options else ()
        names = (*task_type(planned.task).metrics, *COMMON_METRICS, *further)
        self.metrics = [build_metric(name) for name in names]

    @functools.cached_property
    def task(self) -> FewShotTask:
        """What is asked."""
        return self._tasks.of(self.planned)

    @functools.cached_property
    def samples(self) -> Sequence[FewShotSample]:
        """Those that are evaluated.

        Raises:
            DataError: their file is damaged or empty.
        """
        found = self.task.samples(self.planned.eval_set)
        return found[: self.planned.options.n_eval_samples or None]

    @functools.cached_property
    def pool(self) -> Sequence[FewShotSample]:
        """Those that shots are drawn from; see `samples`."""
        planned = self.planned
        return self._other_samples(planned.train_set if planned.k else None, planned.train_lang)

    @functools.cached_property
    def counted(self) -> Sequence[FewShotSample]:
        """Those whose answers the majority is of; see `samples`."""
        return self._other_samples(self.planned.valid_set, self.planned.valid_lang)

    @functools.cached_property
    def questions(self) -> Sequence[Question]:
        """What is asked of each of `samples`."""
        return [
            Question(f"{i}.{j}" if sample.subproblems else str(i), question, sample)
            for i, sample in enumerate(self.samples)
            for j, question in enumerate(sample.problems())
        ]

    def _other_samples(self, set_name: str | None, language: str | None) -> Sequence[FewShotSample]:
        """Samples of another set: in another language where --TASK-train-lang says so."""
        if set_name is None:
            return ()
        return self._tasks.shown(self.planned, language).samples(set_name)

    def run(self) -> dict[str, Any]:
        """Evaluate, and write what comes out; trials that are there already are read."""
        began = time.time()
        return self._finished([self._trial(number) for number in self._trials], began)

    def run_trial(self, number: int) -> dict[str, Any] | None:
        """Make one trial, and the results if it was the last that was missing.

        Where the trials of an evaluation are made at the same time, several may find themselves the
        last: they write the same.

        Args:
            number: of the trial.

        Returns:
            The results; None where other trials are not there yet.
        """
        began = time.time()
        made = {number: self._trial(number)}
        if self.is_main:
            self.planned.prediction_files[number].touch()  # it has been looked at, if it was there
        for other in self._trials:
            if other not in made:
                path = self.planned.prediction_files[other]
                rows = self._agree(self._there(path, self._drawn(self._shots(other))))
                if rows is None:
                    return None
                made[other] = self._read(rows, path), math.nan
        return self._finished([made[each] for each in self._trials], began)

    @property
    def _trials(self) -> range:
        return range(len(self.planned.seeds))

    def _finished(
        self, trials: Sequence[tuple[Sequence[Prediction], float]], began: float
    ) -> dict[str, Any]:
        """The results of all trials, which are written."""
        found = self.results(trials, began)
        if self.is_main:
            results.write_results(self.planned.results_file, found)
            if self.planned.options.confusion_matrix:
                for line in confusion_lines([each for some, _ in trials for each in some]):
                    print(line)
        return found

    def recalculated(self) -> dict[str, Any]:
        """The results with metrics computed anew from predictions; what took time stays.

        Raises:
            DataError: the predictions or results are missing.
        """
        for path in (self.planned.results_file, *self.planned.prediction_files):
            if not path.exists():
                raise DataError(
                    f"--recalc-metrics-from-predictions: there is no {path}: leave the flag out,"
                    " which evaluates what is missing"
                )
        old = results.read_results(self.planned.results_file)
        trials = []
        for path in self.planned.prediction_files:
            trials.append((self._read(results.read_rows(path), path), math.nan))
        kept = {name: old.get(name) for name in ("times", "model", "versions")}
        kept["versions"] = (kept["versions"] or {}) | of_packages(self._packages_of_metrics)
        found = self.results(trials, 0.0) | kept
        if self.is_main:
            results.write_results(self.planned.results_file, found)
        return found

    def _read(self, rows: Sequence[Mapping[str, Any]], path: Path) -> list[Prediction]:
        return results.predictions_of(rows, [q.sample for q in self.questions], path)

    def _trial(self, number: int) -> tuple[list[Prediction], float]:
        """The predictions of a trial, which are written, and the seconds they took."""
        path = self.planned.prediction_files[number]
        shots = self._shots(number)
        drawn = self._drawn(shots)
        anew = self.planned.options.override_completed
        found = None if anew else self._agree(self._there(path, drawn))
        if found is not None:
            logger.info("%s: is there", path.name)
            return self._read(found, path), math.nan
        start = time.perf_counter()
        predictions = self._predict(number, self.planned.seeds[number], shots)
        rows = results.prediction_rows(
            predictions, [question.number for question in self.questions], drawn, self._run_name()
        )
        seconds = time.perf_counter() - start
        if self.is_main:
            results.write_predictions(path, rows)
        return self._read(rows, path), seconds

    def _shots(self, trial: int) -> sampling.Shots:
        return sampling.draw(
            self.pool,
            self.planned.k,
            seed=self.planned.options.seed,
            trial=trial,
            task=self.planned.task,
            uniform=self.planned.options.uniform_sampling,
            leak=self.planned.options.allow_test_shots,
            keep_order=self.planned.options.no_shuffle_examples,
            translated=self._translated,
        )

    def _drawn(self, shots: sampling.Shots) -> list[list[str]]:
        """Of each question the identities of its shots."""
        return [
            [shot.identity for shot in shots.of(question.parent)] if self.planned.k else []
            for question in self.questions
        ]

    @functools.cached_property
    def _translated(self) -> Mapping[str, frozenset[int]]:
        """Shots that may be translations of questions: none unless they are of one set."""
        planned = self.planned
        if planned.train_set != planned.eval_set or planned.train_lang == planned.language:
            return {}
        return sampling.translations(self.samples, self.pool)

    def _there(self, path: Path, drawn: Sequence[Sequence[str]]) -> list[dict[str, Any]] | None:
        """Predictions that another run has left, if they are those this one would make."""
        if not path.exists():
            return None
        try:
            rows = results.read_rows(path)
        except DataError as e:
            logger.warning("%s; predicted again", e)
            return None
        run = self._run_name()
        wanted = [
            (run, question.sample.identity, its)
            for question, its in zip(self.questions, drawn, strict=True)
        ]
        there = [(row.get("run"), row.get("id"), row.get("shots")) for row in rows]
        return rows if there == wanted else None

    def _agree(self, value: Any) -> Any:
        return value if self.model is None else self.model.agree(value)

    def _predict(self, trial: int, seed: int, shots: sampling.Shots) -> list[Prediction]:
        planned = self.planned
        # Its own is one between processes: what a killed rank leaves of it is told after the error.
        tqdm.set_lock(threading.RLock())
        bar = tqdm(
            total=len(self.questions),
            desc=f"{planned.task} {planned.template} k={planned.k} seed={seed}",
            unit="question",
            disable=None if self.is_main else True,
        )
        with bar:
            return self._predictor().predict(
                Trial(
                    self.task,
                    self.template,
                    [question.sample for question in self.questions],
                    shots,
                    [question.parent for question in self.questions],
                    [each for sample in self.counted for each in sample.problems()] or None,
                    trial,
                    lambda done: bar.update(done - bar.n),
                )
            )

    def _predictor(self) -> Predictor:
        options = self.planned.options
        predictor = predictor_type(options.predictor_name)(
            self.model,
            PredictorOptions(
                scoring=options.scoring,
                calibrator=options.calibrator_name,
                calibration_options=self.planned.calibration_options,
                train_sep=options.separator,
                newline_to_end=options.replace_newline_with_eos,
                max_positions=self.planned.settings["max_positions"],
                same_number_of_shots=options.truncate_few_shot_samples_globally,
                beam_size=options.beam_size,
                add_prompt=options.add_prompt_to_meta,
                add_calib=options.add_calib_to_meta,
                add_positional_scores=options.add_positional_scores_to_meta,
                add_prompt_tokens=options.add_prompt_tokens_to_meta,
                context_scores=not options.skip_context_scores,
                seed=options.seed,
            ),
        )
        return predictor

    def _run_name(self) -> str:
        """What predictions must come from to be used again."""
        model = "none" if self.model is None else str(self.model.identity().get("sha256", ""))[:8]
        options = self.planned.options
        kept = (
            options.add_prompt_to_meta,
            options.add_calib_to_meta,
            options.add_positional_scores_to_meta,
            options.add_prompt_tokens_to_meta,
        )
        return f"{self.planned.settings_hash}-{model}-{''.join(str(int(each)) for each in kept)}"

    def results(
        self, trials: Sequence[tuple[Sequence[Prediction], float]], began: float
    ) -> dict[str, Any]:
        """What a results file says; nothing outside `times` depends on when and where it was."""
        planned = self.planned
        columns: dict[str, list[float]] = {}
        for predictions, _ in trials:
            for name, value in measured(self.metrics, predictions).items():
                columns.setdefault(name, []).append(value)
        if any(len(values) != len(trials) for values in columns.values()):
            raise ConfigError(
                f"{planned.task}: a metric has numbers for some trials only: were some predicted by"
                " another version? --override-completed predicts all anew"
            )
        preferred = self.metrics[0]
        return {
            "format": results.FORMAT,
            "complete": True,
            "model_name": planned.model,
            "task": planned.task,
            "language": planned.language,
            "template": planned.template,
            "nb_few_shot_samples": planned.k,
            "calibration_options": list(planned.calibration_options),
            "calibrator_name": planned.options.calibrator_name,
            "scoring": planned.settings["scoring"],
            "train_set": planned.train_set,
            "valid_set": planned.valid_set,
            "eval_set": planned.eval_set,
            "train_lang": planned.train_lang,
            "valid_lang": planned.valid_lang,
            "eval_examples_cnt": len(self.samples),
            "questions_cnt": len(self.questions),
            "preferred_metric": self._preferred(preferred, columns),
            **{name: over_trials(values) for name, values in columns.items()},
            "metric_definitions": {metric.name: metric.definition() for metric in self.metrics},
            "example_prompts": self._example_prompts(),
            "predictions": [path.name for path in planned.prediction_files],
            "data": data_digests(planned),
            "settings": dict(planned.settings),
            "settings_hash": planned.settings_hash,
            "model": {} if self.model is None else self.model.identity(),
            "versions": versions(self._packages),
            "times": {
                "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
                "execution_time": over_trials([seconds for _, seconds in trials]),
            },
        }

    @property
    def _packages_of_metrics(self) -> set[str]:
        return {name for metric in self.metrics for name in metric.packages}

    @property
    def _packages(self) -> set[str]:
        """Those that numbers depend on."""
        of_model = () if self.model is None else ("torch", *self.model.packages())
        return self._packages_of_metrics | set(of_model)

    @staticmethod
    def _preferred(metric: Metric, columns: Mapping[str, Any]) -> str:
        """The number that stands for the task: its first metric's own, or the first it gives."""
        if metric.name in columns:
            return metric.name
        return next(iter(columns))

    def _example_prompts(self) -> list[str]:
        """The first three questions, without shots: what was asked, for the eye."""
        return [self.template.encode(question.sample) for question in self.questions[:3]]


def measured(metrics: Sequence[Metric], predictions: Sequence[Prediction]) -> dict[str, float]:
    """The numbers of all metrics.

    Raises:
        ConfigError: two metrics give a number of one name.
    """
    found: dict[str, float] = {}
    for metric in metrics:
        for name, value in metric.score(predictions).items():
            if name in found:
                raise ConfigError(f"metric {metric.name}: {name} is another metric's number, too")
            found[name] = value
    return found
