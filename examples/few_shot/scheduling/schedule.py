"""From settings and a command line to jobs that are carried out."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from examples.few_shot import results, stale
from examples.few_shot.options import default_options
from examples.few_shot.scheduling import slurm, submissions
from examples.few_shot.scheduling.arguments import (
    SLURM_FLAGS,
    arg_modify_default,
    checked,
    get_argparser,
    typed_of,
)
from examples.few_shot.scheduling.local import Pool
from examples.few_shot.scheduling.machine import Machine, share
from examples.few_shot.scheduling.plan import SHOTS, Job, Levels, Split, plan_jobs
from examples.few_shot.scheduling.settings import (
    RESERVED,
    Groups,
    ModelSettings,
    checked_args,
    chosen_models,
    chosen_tasks,
)
from examples.few_shot.scheduling.status import Status, look
from examples.few_shot.scheduling.submissions import Submission
from examples.few_shot.scheduling.worker import Order, order_of
from examples.few_shot.settings import PlannedEvaluation
from fairseq_lite.errors import DataError, FliteError
from fairseq_lite.plugins import import_user_dir
from fairseq_lite_cli.entry import run_command

LOG = "scheduled_jobs_log.jsonl"
JOB_LOGS = "job_logs"
COLLECT = "python examples/few_shot/scripts/collect_results.py"
NOTHING: Mapping[str, Any] = MappingProxyType({})

# What a job can come to.
SUBMIT, SKIP, HERE = "submit", "skip", "execute_locally"
DONE, FAILED, SUBMITTED, PLANNED, INTERRUPTED = (
    "completed", "failed", "submitted", "planned", "interrupted"
)  # fmt: skip


def schedule_experiment_jobs(
    args: argparse.Namespace,
    task_run_groups: Groups,
    available_tasks_settings: Mapping[str, Any],
    model_run_groups: Groups,
    available_model_settings: Mapping[str, Any],
    custom_base_run_args: Mapping[str, Any] = NOTHING,
    custom_override_run_args: Mapping[str, Any] = NOTHING,
) -> tuple[list[Job], list[dict[str, Any]]]:
    """Evaluate every chosen model on every chosen task setting, here or on Slurm.

    The arguments of an evaluation come from five places, of which a later one wins: `args`,
    `custom_base_run_args`, the model setting, the task setting, `custom_override_run_args`.

    What has complete results that were made with the same arguments is left alone, and so is what
    somebody works on; of a job that was done in part only the rest is.

    Args:
        args: of `get_argparser`.
        task_run_groups: lists of keys of task settings, by name.
        available_tasks_settings: `TaskSettings` or tuples, by key.
        model_run_groups: lists of keys of model settings, by name.
        available_model_settings: `ModelSettings` or tuples, by key.
        custom_base_run_args: win over `args` alone.
        custom_override_run_args: win over everything.

    Returns:
        The jobs that were submitted or carried out, and what became of each job: plain values.

    Raises:
        FliteError: a mistake that concerns all jobs. What goes wrong in one is its `error`.
    """
    checked(args)
    args = argparse.Namespace(**vars(args))  # the caller's stays as it is
    if args.user_dir is not None:
        import_user_dir(args.user_dir)
        args.user_dir = str(Path(args.user_dir).expanduser().absolute())
    if args.data_dir is not None:
        args.data_dir = str(Path(args.data_dir).expanduser().absolute())
    output = Path(args.output).expanduser().absolute()
    models = chosen_models(args.models, model_run_groups, available_model_settings)
    tasks = chosen_tasks(args.tasks, task_run_groups, available_tasks_settings)
    levels = Levels(
        base_run_args(args),
        typed_of(args),
        checked_args(custom_base_run_args),
        checked_args(custom_override_run_args),
    )
    split = Split(
        args.split_few_shot_experiments, args.split_jobs_by_eval_lang, args.split_few_shot_trials
    )
    plan = plan_jobs(models, tasks, levels, output, split)
    for remark in (*plan.remarks, *_slurm_remarks(args, models)):
        print(remark)
    run = _Run(args, output, plan.jobs)
    run.announce()
    attempted = run.dry() if args.dry_run else run.local() if args.local else run.slurm()
    run.conclude()
    return attempted, run.infos


def base_run_args(args: argparse.Namespace) -> dict[str, Any]:
    """The weakest level: what the command line, or its defaults, say of evaluations.

    Nothing where the evaluator's own default is meant: a model's name may imply another one.
    """
    own = {**default_options(), SHOTS: None}
    typed = typed_of(args)
    return {
        name: value
        for name, value in vars(args).items()
        if name in own and name not in RESERVED and value is not None
        if name in typed or value != own[name]
    }


def _slurm_remarks(args: argparse.Namespace, models: Mapping[str, ModelSettings]) -> Iterator[str]:
    """What is typed for Slurm and has no effect."""
    for name in sorted(typed_of(args) & SLURM_FLAGS.keys()):
        flag = f"--{name.replace('_', '-')}"
        if args.local:
            yield f"{flag} has no part in --local"
            continue
        field = SLURM_FLAGS[name]
        for key, model in models.items():
            own = None if field is None else getattr(model, field)
            if own is not None and own != getattr(args, name):
                yield f"{flag} gives way to model setting {key}: {own!r}"


def schedule_command(
    description: str,
    task_run_groups: Mapping[str, Any],
    available_tasks_settings: Mapping[str, Any],
    model_run_groups: Mapping[str, Any],
    available_model_settings: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] = NOTHING,
) -> int:
    """All that a script does: read the command line, schedule, give the exit status.

    A user's mistake is one line and status 2; see `run_script`.

    Args:
        description: what `-h` says it is.
        task_run_groups: see `schedule_experiment_jobs`, as the next three.
        available_tasks_settings: settings of tasks.
        model_run_groups: groups of models.
        available_model_settings: settings of models.
        argv: the words; those of this process by default.
        defaults: other defaults of flags, as `arg_modify_default` takes them.
    """
    settings = (
        task_run_groups,
        available_tasks_settings,
        model_run_groups,
        available_model_settings,
    )

    def schedule(words: Sequence[str]) -> int:
        parser = get_argparser(description, *settings)
        for name, value in defaults.items():
            arg_modify_default(parser, name, value)
        _, infos = schedule_experiment_jobs(parser.parse_args(words), *settings)
        return exit_status(infos)

    return run_script(schedule, argv)


def exit_status(infos: Sequence[Mapping[str, Any]]) -> int:
    """A script's status: 1 when a job failed."""
    return int(any(info["state"] == FAILED for info in infos))


def run_script(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call a function as a script's; a user's mistake is one line, and Ctrl-C ends the jobs first.

    `schedule_command` does so by itself.

    Args:
        main: takes the words of the command line and returns the status.
        argv: the words; those of this process by default.
    """
    status = 0

    def call(words: Sequence[str]) -> None:
        nonlocal status
        status = main(words)

    name = Path(sys.argv[0]).stem or "schedule_jobs"
    return run_command(name, call, argv) or status


class _Run:
    """One call of `schedule_experiment_jobs`, from its jobs on."""

    def __init__(self, args: argparse.Namespace, output: Path, jobs: Sequence[Job]) -> None:
        self.args = args
        self.output = output
        self.jobs = list(jobs)
        self.recalculate: bool = args.recalc_metrics_from_predictions
        self.override: bool = args.override_completed
        self.statuses = look(self.jobs, override=self.override, recalculate=self.recalculate)
        self.infos = [self._info(*pair) for pair in zip(self.jobs, self.statuses, strict=True)]
        self.ended = 0

    def _info(self, job: Job, status: Status) -> dict[str, Any]:
        where = HERE if self.args.local else SUBMIT
        return {
            "name": job.name,
            "model": job.model_key,
            "model_name": job.model.model_name,
            "tasks": list(job.task_keys),
            "current_status": where if status.todo else SKIP,
            "state": PLANNED if status.todo else SUBMITTED if status.submitted else DONE,
            "evaluations": len(job.evaluations),
            "completed": len(status.completed),
            "submitted": len(status.submitted),
            "missing": len(status.missing),
            "to_do": len(status.todo),
            "elsewhere": len(job.elsewhere),
            "output_dirs": [str(folder) for folder in job.folders],
            "results_files": [str(each.results_file) for each in job.evaluations],
            "run_args": [dict(call.run_args) for call in job.calls],
            "sources": [dict(call.sources) for call in job.calls],
            "job_id": None,
            "stdout": None,
            "stderr": None,
            "seconds": None,
            "error": None,
        }

    # -- what is said

    def announce(self) -> None:
        """Print what will be done, and what not."""
        todo = [status.todo for status in self.statuses if status.todo]
        place = "here" if self.args.local else f"on {self.args.slurm_executor}"
        print(
            f"{len(self.jobs)} job(s), {_evaluations(job.evaluations for job in self.jobs)}; "
            f"to do {place}: {len(todo)} job(s), {_evaluations(todo)}"
        )
        for job, status in zip(self.jobs, self.statuses, strict=True):
            if not status.todo:
                print(f"skipped   {job.name} | {_why_nothing(job, status, self.recalculate)}")

    def dry(self) -> list[Job]:
        """Print the jobs; see that the folder could be made, and make nothing.

        Raises:
            DataError: it could not.
        """
        check_folder(self.output)
        for job, status in self._todo():
            folders = ", ".join(folder.name for folder in job.folders)
            done = len(status.completed) if not self.override and not self.recalculate else 0
            part = f", {done} are done" if done else ""
            print(f"dry run   {job.name} | {_counted(status.todo)}{part} | {folders}")
        return []

    def _todo(self) -> Iterator[tuple[Job, Status]]:
        for job, status in zip(self.jobs, self.statuses, strict=True):
            if status.todo:
                yield job, status

    def _say(self, state: str, info: Mapping[str, Any], rest: str) -> None:
        self.ended += 1
        total = sum(1 for _ in self._todo())
        seconds = "" if info["seconds"] is None else f" | {info['seconds']:.1f} s"
        place = f"[{self.ended:{len(str(total))}}/{total}]"
        print(f"{place} {state:9} {info['name']}{seconds} | {rest}", flush=True)

    def conclude(self) -> None:
        """Print where the results are."""
        failed = [info for info in self.infos if info["state"] == FAILED]
        if failed:
            print(f"{len(failed)} job(s) failed; the same command tries them again:")
            for info in failed:
                print(f"  {info['name']}: {info['error']}")
        where = shlex.quote(str(self.output))
        table = shlex.quote(str(self.output / "results.tsv"))
        print(f"to collect the results:\n{COLLECT} -i {where} -o {table} --overwrite-output")

    # -- here

    def local(self) -> list[Job]:
        """Carry the jobs out in processes of this machine."""
        todo = list(self._todo())
        if not todo:
            return []
        asked = 1 if self.args.jobs is None else self.args.jobs
        machine = Machine.here(cpu=self.args.cpu)
        most = max(self._gpus(job) for job, _ in todo)
        shares, reason = share(machine, asked, len(todo), most)
        if reason:
            print(reason)
        if shares.jobs > 1:
            print(shares)
        self._make_folder()
        by_name = {job.name: (job, info) for job, info in zip(self.jobs, self.infos, strict=True)}
        attempted: list[Job] = []
        claimed: dict[str, list[PlannedEvaluation]] = {}

        def orders() -> Iterator[Order]:
            for job, _ in todo:
                mine = self._claim(job, by_name[job.name][1])
                if mine:
                    claimed[job.name] = mine
                    attempted.append(job)
                    each = len(shares.gpus[0]) if shares.gpus else len(machine.gpus)
                    yield self._order(job, mine, max(1, min(self._gpus(job), each)))

        logs = self.output / JOB_LOGS if shares.jobs > 1 else None
        try:
            with contextlib.closing(Pool(shares, logs).run(orders())) as endings:
                for end in endings:
                    job, info = by_name[end.order.name]
                    mine = claimed.pop(job.name)
                    submissions.release(mine)
                    self._end(info, mine, end.seconds, end.errors, end.log)
        except BaseException:
            for name in claimed:
                by_name[name][1]["state"] = INTERRUPTED
                self._log(by_name[name][1])
            left = sum(info["state"] in (PLANNED, INTERRUPTED) for info in self.infos)
            print(f"interrupted: {left} job(s) left; the same command goes on", flush=True)
            raise
        finally:
            for mine in claimed.values():
                submissions.release(mine)
        return attempted

    def _gpus(self, job: Job) -> int:
        found = job.model.gpus_per_node
        return int(self.args.slurm_gpus_per_node if found is None else found)

    def _claim(self, job: Job, info: dict[str, Any]) -> list[PlannedEvaluation]:
        """Take what is still to be done of a job: others may work in the same folders."""
        (status,) = look([job], override=self.override, recalculate=self.recalculate)
        mine = []
        try:
            for each in status.todo:
                if submissions.claim(each, Submission.of_process(job.name)):
                    mine.append(each)
        except DataError as e:  # its folder cannot be written to; those of others perhaps can
            submissions.release(mine)
            info.update(state=FAILED, error=str(e))
            self._log(info)
            self._say("failed", info, str(e))
            return []
        if not mine:
            info.update(current_status=SKIP, state=SUBMITTED if status.submitted else DONE)
            self._say("skipped", info, "somebody else was faster")
        return mine

    def _order(self, job: Job, mine: Sequence[PlannedEvaluation], world_size: int) -> Order:
        return order_of(
            job, mine, override=self.override, recalculate=self.recalculate, world_size=world_size
        )

    def _end(
        self,
        info: dict[str, Any],
        planned: Sequence[PlannedEvaluation],
        seconds: float,
        errors: Sequence[str],
        log: Path | None = None,
    ) -> None:
        """Record and say how a job ended."""
        made = [(each, _is_made(each)) for each in planned]
        done = [each for each, is_made in made if is_made]
        lacking = [each for each, is_made in made if not is_made]
        if lacking and not errors:
            errors = [f"{_counted(lacking)} without results"]
        info["seconds"] = round(seconds, 2)
        info["state"] = FAILED if errors else DONE
        info["error"] = "; ".join(errors) or None
        info["stdout"] = None if log is None else str(log)
        self._log(info)
        where = f" | {log}" if log is not None else ""
        if errors:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            part = f"{len(done)} of {_counted(planned)} | " if len(planned) > 1 else ""
            self._say("failed", info, f"{part}{errors[0]}{more}{where}")
        else:
            whole = [each for each in done if each.trial is None or stale.is_done(each)]
            rest = shown_metrics(whole) if whole else "other trials are not there yet"
            self._say("done", info, f"{_counted(done)} | {rest}")

    # -- on Slurm

    def slurm(self) -> list[Job]:
        """Submit the jobs: an array for each model."""
        attempted: list[Job] = []
        by_model: dict[str, list[tuple[Job, dict[str, Any]]]] = {}
        for job, info, status in zip(self.jobs, self.infos, self.statuses, strict=True):
            if status.todo:
                by_model.setdefault(job.model_key, []).append((job, info))
        if by_model:
            slurm.executor(self.args.slurm_executor, self.output / slurm.LOGS)
            self._make_folder()
        for key, jobs in by_model.items():
            attempted += self._submit(key, jobs)
        return attempted

    def _submit(self, model_key: str, jobs: Sequence[tuple[Job, dict[str, Any]]]) -> list[Job]:
        kind = self.args.slurm_executor
        wanted = slurm.needs(jobs[0][0].model, self.args)
        mine = {job.name: self._claim(job, info) for job, info in jobs}
        chosen = [(job, info) for job, info in jobs if mine[job.name]]
        world_size = wanted.world_size
        if not chosen:
            return []
        orders = [self._order(job, mine[job.name], world_size) for job, _ in chosen]
        try:
            submitted = slurm.submit(kind, self.output / slurm.LOGS, model_key, wanted, orders)
        except BaseException as e:
            for each in mine.values():
                submissions.release(each)
            if not isinstance(e, FliteError):
                raise
            for _, info in chosen:
                info.update(state=FAILED, error=str(e))
                self._log(info)
                self._say("failed", info, str(e))
            return []
        for (job, info), one in zip(chosen, submitted, strict=True):
            slurm.mark(kind, one, mine[job.name])
            info.update(state=SUBMITTED, job_id=one.job_id, stdout=one.stdout, stderr=one.stderr)
            if kind == "debug":
                began = time.monotonic()
                error = slurm.run_here(one)
                log = Path(one.stdout)
                self._end(
                    info, mine[job.name], time.monotonic() - began, [error] * bool(error), log
                )
            else:
                self._log(info)
                what = _counted(mine[job.name])
                self._say("submitted", info, f"{what} | job {one.job_id}")
        return [job for job, _ in chosen]

    # -- what is written

    def _make_folder(self) -> None:
        check_folder(self.output)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise DataError(f"-o {self.output}: cannot be made: {e.strerror}") from None

    def _log(self, info: Mapping[str, Any]) -> None:
        """Append what became of a job; lines of several processes do not mix."""
        line = json.dumps({"time": submissions.now(), **info}, ensure_ascii=False) + "\n"
        path = self.output / LOG
        try:
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as e:
            raise DataError(f"{path}: cannot be written: {e.strerror}") from None


def _counted(planned: Sequence[PlannedEvaluation]) -> str:
    """How many there are, of what."""
    trials = any(each.trial is not None for each in planned)
    return f"{len(planned)} {'trial' if trials else 'evaluation'}(s)"


def _evaluations(jobs: Iterable[Sequence[PlannedEvaluation]]) -> str:
    """How many evaluations jobs are about, of which several may make trials of one."""
    return f"{len({each.results_file for job in jobs for each in job})} evaluation(s)"


def _is_made(planned: PlannedEvaluation) -> bool:
    if planned.trial is not None and planned.product.exists():
        return True
    return results.is_complete(planned)


def _why_nothing(job: Job, status: Status, recalculate: bool) -> str:
    if status.submitted:
        planned, by = status.submitted[0]
        known = submissions.can_tell(by)
        said = [
            path for path in submissions.markers(planned) if submissions.read_marker(path) == by
        ]
        hint = "" if known else f"; if it has ended, delete {', '.join(map(str, said))}"
        return f"{by} works on {_counted([each for each, _ in status.submitted])}{hint}"
    if not job.evaluations:
        return "an earlier job makes its results"
    if recalculate:
        return "no complete results to recalculate"
    return f"{_counted(status.completed)} are complete"


def shown_metrics(planned: Sequence[PlannedEvaluation], most: int = 4) -> str:
    """The main metric of evaluations: of each where they are few, else their mean."""
    found = []
    for each in planned:
        said = results.read_results(each.results_file)
        name = said["preferred_metric"]
        found.append((each, str(name), said[name]["mean"]))
    if len(found) <= most:
        parts = [(e.task, e.language or "", e.template, f"k={e.k}") for e, _, _ in found]
        telling = [i for i in range(4) if len({part[i] for part in parts}) > 1]
        labels = [" ".join(part[i] for i in telling) for part in parts]
        return ", ".join(
            f"{name} {_number(value)}" + (f" ({label})" if label else "")
            for (_, name, value), label in zip(found, labels, strict=True)
        )
    means: dict[str, list[float]] = {}
    for _, name, value in found:
        means.setdefault(name, []).extend([] if value is None else [value])
    return ", ".join(
        f"{name} {_number(sum(values) / len(values) if values else None)} (mean of {len(values)})"
        for name, values in means.items()
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def check_folder(folder: Path) -> None:
    """See that a folder is there, or could be made, and that files could be written there.

    Raises:
        DataError: it could not.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise DataError(f"-o {folder}: {there} is a file; expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"-o {folder}: cannot be made: no permission to write in {there}")
