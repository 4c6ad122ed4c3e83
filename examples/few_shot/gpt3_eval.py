"""Evaluate a language model on few-shot tasks.

python -m examples.few_shot.gpt3_eval --model-name checkpoints/checkpoint_best.pt \
        --tasks copa --nb-few-shot-samples-values 0 1 32
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.few_shot import results
from examples.few_shot.builtins import load_builtins
from examples.few_shot.heeded import remarks
from examples.few_shot.options import DEFAULT_SHOTS, TASK_FLAGS, EvaluationOptions, flag_of
from examples.few_shot.predictors.api import predictor_type
from examples.few_shot.settings import (
    PlannedEvaluation,
    as_names,
    plan,
    template_entry,
)
from examples.few_shot.stale import unfinished
from examples.few_shot.tasks.api import GROUPS, TASKS, task_names, task_type
from examples.few_shot.templates.api import TEMPLATES
from fairseq_lite.config.core import DistributedTrainingConfig
from fairseq_lite.config.flags import Parser, add_flags
from fairseq_lite.errors import ConfigError, FliteError
from fairseq_lite.plugins import import_user_dir

logger = logging.getLogger(__name__)


def get_argparser(tasks: Sequence[str] = (), templates: Sequence[str] = ()) -> Parser:
    """The flags.

    Args:
        tasks: those whose own flags are known.
        templates: likewise.
    """
    load_builtins()
    parser = Parser("gpt3_eval", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model-name", metavar="NAME_OR_PATH",
        help="a name of model_configs.py, a checkpoint, a folder of them, or a Hugging Face model",
    )  # fmt: skip
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("--tasks", nargs="+", help="tasks and groups of tasks", **unset)
    parser.add_argument(
        "--nb-few-shot-samples-values", "--nshot", nargs="+", type=int, metavar="K",
        help=f"numbers of shots (default: {' '.join(map(str, DEFAULT_SHOTS))})", **unset,
    )  # fmt: skip
    parser.add_argument("--any-eval-set", nargs="+", metavar="SET",
                        help="what is evaluated, for tasks that do not say", **unset)  # fmt: skip
    parser.add_argument("--any-languages", nargs="+", metavar="LANG",
                        help="languages, for tasks that do not say", **unset)  # fmt: skip
    parser.add_argument("--list-tasks", action="store_true", help="print tasks and groups")
    owners: dict[str, str] = {}
    add_flags(parser, EvaluationOptions, "gpt3_eval", owners)
    for name in tasks:
        group = parser.add_argument_group(f"task {name}")
        for suffix, (several, text) in TASK_FLAGS.items():
            of_languages = suffix in ("languages", "train_lang", "valid_lang")
            if of_languages and not task_type(name).languages:
                continue
            flag = flag_of(name, suffix)
            more = [f"--{name.replace('_', '-')}-language"] if suffix == "languages" else []
            kind = {"nargs": "+"} if several else {}
            group.add_argument(
                flag, *more, dest=f"{name}_{suffix}", metavar=suffix.upper(), help=text,
                **kind, **unset,  # type: ignore[arg-type]
            )  # fmt: skip
    seen: set[type] = set()
    for entry in [*map(TASKS.get, tasks), *map(TEMPLATES.get, templates)]:
        if entry.config not in seen and dataclasses.fields(entry.config):
            seen.add(entry.config)
            add_flags(parser.add_argument_group(entry.name), entry.config, entry.name, owners)
    return parser


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Values of a command line, by destination; what was not typed is not there.

    Tasks are looked for first: only the flags of those that are evaluated exist.

    Raises:
        ConfigError: an unknown flag, task or template.
    """
    known, _ = get_argparser().parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if getattr(known, "user_dir", None):
        import_user_dir(known.user_dir)
    names = task_names(getattr(known, "tasks", ()))
    with_tasks, _ = get_argparser(names).parse_known_args(
        [a for a in argv if a not in ("-h", "--help")]
    )
    templates = {
        template_entry(name, template).name: None
        for name in names
        for template in as_names(
            getattr(with_tasks, f"{name}_template", task_type(name).template), "template"
        )
    }
    found, unknown = get_argparser(names, list(templates)).parse_known_args(argv)
    if unknown:
        raise ConfigError(_unknown(unknown[0], names))
    return {name: value for name, value in vars(found).items() if value is not None}


def _unknown(word: str, names: Sequence[str]) -> str:
    """What is said of a flag that nobody has."""
    if not word.startswith("-"):
        return f"{word}: expected a flag"
    flag = word.partition("=")[0]
    for name in TASKS.names():
        if flag.startswith(f"--{name.replace('_', '-')}-") and name not in names:
            return f"{flag}: {name} is not among --tasks; leave it out, or add the task"
    for registry in (TASKS, TEMPLATES):
        for name in registry.names():
            fields = dataclasses.fields(registry.get(name).config)
            if flag[2:].replace("-", "_") in {field.name for field in fields}:
                return f"{flag}: belongs to {registry.kind} {name}, which is not evaluated here"
    options = [o for a in get_argparser(names)._actions for o in a.option_strings]
    near = difflib.get_close_matches(flag, options, n=1)
    return f"{flag}: unknown flag" + (f"; did you mean {near[0]}?" if near else "")


@dataclass(frozen=True)
class _Work:
    """What processes are started for."""

    model_name: str
    planned: tuple[PlannedEvaluation, ...]
    skip_completed: bool = False


def run_evaluations_from_model_name(model_name: str, **kwargs: Any) -> list[dict[str, Any]]:
    """Evaluate a model, in as many processes as asked for.

    Args:
        model_name: a name of `model_configs`, or a path.
        kwargs: destinations of flags and their values, as `parse` gives them.

    Returns:
        The contents of the results files, in the order of `plan`. Of several processes that a
        launcher started only the first has them; the others return an empty list.

    Raises:
        FliteError: what the user can mend.
    """
    if kwargs.get("user_dir"):
        import_user_dir(kwargs["user_dir"])
    planned = plan(model_name, **kwargs)
    rank, size = _place(planned[0].options)
    options = planned[0].options
    for remark in remarks(planned, kwargs) if rank == 0 else ():
        logger.warning(remark)
    if rank == 0 and options.distributed_port is not None and not _meet_at_port(options):
        logger.warning(
            "--distributed-port %d: does nothing outside Slurm: processes that are started here"
            " find a free port, torchrun has its own", options.distributed_port,
        )  # fmt: skip
    skip = options.skip_completed and not options.recalc_metrics_from_predictions
    left = tuple(planned)
    if skip and size == 1:  # with nothing to do, no process need be started
        left = unfinished(planned)
    if left:
        _run(_Work(planned[0].model, left, skip_completed=skip and size > 1), options)
    return [results.read_results(each.results_file) for each in planned] if rank == 0 else []


def run_planned(planned: Sequence[PlannedEvaluation]) -> None:
    """Carry out evaluations of one model, which is loaded once, as the options of the first say.

    Raises:
        FliteError: what the user can mend.
    """
    _run(_Work(planned[0].model, tuple(planned)), planned[0].options)


def _distributed(options: EvaluationOptions) -> DistributedTrainingConfig:
    return DistributedTrainingConfig(
        distributed_world_size=options.distributed_world_size,
        distributed_port=options.distributed_port or -1,
    )


def _place(options: EvaluationOptions) -> tuple[int, int]:
    """The rank of this process among those that a launcher started, and their number."""
    found = _launched(options)
    return (0, 1) if found is None or found.spawn else (found.first_rank, found.size)


def _meet_at_port(options: EvaluationOptions) -> bool:
    """Whether processes meet at --distributed-port."""
    found = _launched(options)
    return found is not None and found.port == options.distributed_port


def _launched(options: EvaluationOptions) -> Any:
    """The processes that there are; None where no launcher started this one."""
    if os.environ.keys().isdisjoint({"RANK", "SLURM_PROCID"}):
        return None  # without importing torch
    from fairseq_lite.parallel.api import Machine
    from fairseq_lite.parallel.plan import plan as plan_processes

    machine = Machine(environ=os.environ)
    return plan_processes(_distributed(options), cpu=True, machine=machine, if_asked=True)


def _run(work: _Work, options: EvaluationOptions) -> None:
    needs_model = predictor_type(options.predictor_name).needs_model
    if options.recalc_metrics_from_predictions or not needs_model:
        if _place(options)[0] == 0:  # there is nothing to share out
            _without_model(work, options)
        return
    from fairseq_lite.parallel.launch import launch_for

    launch_for(
        _distributed(options),
        _with_model,
        work,
        command="gpt3_eval",
        cpu=options.cpu,
        setup=prepare_rank,
        user_dir=options.user_dir,
        if_asked=True,
    )


def prepare_rank() -> None:
    """What a process that is started here does first."""
    from fairseq_lite.builtins import load_builtins as load_core

    load_core()
    load_builtins()
    set_up_logging()


def _without_model(work: _Work, options: EvaluationOptions) -> None:
    from examples.few_shot.evaluation import Evaluation, Tasks

    planned = unfinished(work.planned) if work.skip_completed else work.planned
    for each in planned:
        Evaluation(each, None)  # no evaluation begins where a later one cannot
    tasks = Tasks()
    for each in planned:
        evaluation = Evaluation(each, None, tasks=tasks)
        again = options.recalc_metrics_from_predictions
        _report(each, evaluation.recalculated() if again else _run_one(evaluation))


def _with_model(work: _Work, world: Any) -> None:
    """Evaluate, as one process of `world`."""
    from examples.few_shot.evaluation import Evaluation, Tasks
    from examples.few_shot.models.loading import load_model

    if not world.is_main:  # the first says what all have to say
        logging.getLogger().setLevel(logging.ERROR)
    planned = work.planned
    if work.skip_completed:  # what is there may change while ranks look: one looks for all
        planned = world.broadcast_object(unfinished(planned) if world.is_main else None)
    if not planned:
        return
    for each in planned:
        Evaluation(each, None)  # a missing file is told before minutes of loading
    model = load_model(work.model_name, planned[0].options, world)
    tasks = Tasks()
    for each in planned:
        found = _run_one(Evaluation(each, model, is_main=world.is_main, tasks=tasks))
        if world.is_main:
            _report(each, found)


def _run_one(evaluation: Any) -> dict[str, Any] | None:
    """Carry out an evaluation, or its only trial; None where there are no results yet."""
    trial = evaluation.planned.trial
    return evaluation.run() if trial is None else evaluation.run_trial(trial)


def _report(planned: PlannedEvaluation, found: dict[str, Any] | None) -> None:
    language = f" {planned.language}" if planned.language else ""
    what = f"{planned.task}{language} {planned.template} {planned.eval_set} | k={planned.k}"
    if found is None:
        said = "other trials are not there yet"
    else:
        name = found["preferred_metric"]
        value = found[name]
        spread = f" ± {value['std']:.2f}" if len(value["scores"]) > 1 else ""
        said = f"{name} {value['mean']:.2f}{spread}"
    if planned.trial is not None:
        said = f"seed {planned.seeds[planned.trial]} | {said}"
    print(f"{planned.model} | {what} | {said} | {planned.results_file}", flush=True)


def set_up_logging() -> None:
    """Let what happens be told on standard error."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and evaluate."""
    words = list(sys.argv[1:] if argv is None else argv)
    values = parse(words)
    if values.pop("list_tasks"):
        for name, members in sorted(GROUPS.items()):
            print(f"group {name}: {' '.join(members)}")
        print("\n".join(TASKS.names()))
        return
    model_name = values.pop("model_name", None)
    if model_name is None:
        raise ConfigError("--model-name is needed: a name of model_configs.py, or a path")
    set_up_logging()
    try:
        run_evaluations_from_model_name(model_name, **values)
    except FliteError:
        if values.get("debug"):
            traceback.print_exc()
        raise


if __name__ == "__main__":
    from fairseq_lite_cli.entry import run_command

    sys.exit(run_command("gpt3_eval", main))
