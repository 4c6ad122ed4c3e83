"""The command line of scripts of experiments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from examples.few_shot.scheduling.settings import Groups
from examples.few_shot.scheduling.slurm import EXECUTORS
from fairseq_lite.config.flags import Parser
from fairseq_lite.errors import ConfigError, FliteError
from fairseq_lite.registry import near

# Flags that say how jobs run on Slurm, with the field of a model setting that wins over them.
SLURM_FLAGS = {
    "slurm_partition": "partition",
    "slurm_nodes": "nodes",
    "slurm_gpus_per_node": "gpus_per_node",
    "slurm_ntasks_per_node": "ntasks_per_node",
    "slurm_cpus_per_task": "cpus_per_task",
    "slurm_array_parallelism": "max_parallel",
    "slurm_time": "minutes",
    "slurm_constraint": "constraint",
    "slurm_mem": "mem",
    "slurm_mail_user": None,
    "slurm_mail_type": None,
}


class SchedulingParser(Parser):
    """A parser that also tells which values somebody typed.

    They are the attribute `typed` of what it returns: names of values.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        unset = object()
        names = {action.dest for action in self._actions if action.dest != argparse.SUPPRESS}
        # argparse leaves alone what a namespace has already, unless it is typed.
        probe, _ = super().parse_known_args(
            words, argparse.Namespace(**dict.fromkeys(names, unset))
        )
        found, rest = super().parse_known_args(words, namespace)
        found.typed = frozenset(name for name in names if getattr(probe, name, unset) is not unset)
        return found, rest

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        if args is None:  # the words of this process: whoever asks is its program
            _tell_in_one_line(self.prog)
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            word = rest[0].partition("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise ConfigError(f"unknown flag {word}{near(word, flags)}")
        return found


def _tell_in_one_line(program: str) -> None:
    """Let mistakes of users that nobody catches end this process with one line, and status 2.

    That is what scripts need which call `parse_args` and `schedule_experiment_jobs` themselves.
    """
    otherwise = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, FliteError):
            otherwise(kind, error, trace)
            return
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = tell


def get_argparser(
    description: str,
    task_run_groups: Groups,
    available_tasks_settings: Mapping[str, Any],
    model_run_groups: Groups,
    available_model_settings: Mapping[str, Any],
) -> SchedulingParser:
    """The flags of every script.

    Args:
        description: what `--help` says first.
        task_run_groups: what `-t` takes, for `--help`; so are the others.
        available_tasks_settings: likewise.
        model_run_groups: what `-m` takes.
        available_model_settings: likewise.
    """
    parser = SchedulingParser(description=description)
    _add_jobs(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--scoring", default="mean", help="from scores of tokens to that of a candidate")
    add("--predictor-name", default="clmprompting", help="who answers")
    add(
        "--nb-few-shot-samples-values", "--nshot", nargs="+", type=int, default=[0], metavar="K",
        help="numbers of shots, each an evaluation (default: 0)",
    )  # fmt: skip
    add("--num-trials", type=int, default=5, metavar="N",
        help="trials with other shots, where there are shots (default: 5)")  # fmt: skip
    add("--n-eval-samples", type=int, default=0, metavar="N",
        help="evaluate the first N samples (default: 0, all)")  # fmt: skip
    add("--max-tokens", type=int, metavar="N", help="tokens computed at a time")
    add("--data-dir", metavar="DIR", help="the folder of the tasks' files (default: $FSD)")
    add("--user-dir", metavar="DIR", help="a folder of plugins; jobs import it too")
    add("--cpu", action="store_true", help="use no GPU")
    add("--fp16", action="store_true", help="compute in float16 (CUDA)")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--recalc-metrics-from-predictions", action="store_true",
        help="with --local: compute metrics of finished evaluations anew")  # fmt: skip
    _add_slurm(parser)
    add = parser.add_argument_group("what is evaluated").add_argument
    add("-o", "--output", metavar="DIR", help="the folder under which results of jobs go")
    add("-t", "--tasks", nargs="+", metavar="TASK",
        help=_choice(task_run_groups, available_tasks_settings, "task"))  # fmt: skip
    add("-m", "--models", nargs="+", metavar="MODEL",
        help=_choice(model_run_groups, available_model_settings, "model")
        + " A path of a checkpoint is taken, too.")  # fmt: skip
    return parser


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("jobs").add_argument
    add("--local", action="store_true", help="run here; otherwise on Slurm")
    add(
        "-j", "--jobs", type=int, metavar="N", help="with --local: N jobs side by side (default: 1)"
    )
    add("--dry-run", action="store_true", help="print what would be done, and do nothing")
    add("--override-completed", action="store_true", help="evaluate again what has results")
    add("--split-few-shot-experiments", action="store_true",
        help="a job for each number of shots")  # fmt: skip
    add("--split-jobs-by-eval-lang", action="store_true", help="a job for each language")
    add("--split-few-shot-trials", action="store_true",
        help="a job for each trial; the last one writes the results of all")  # fmt: skip


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Slurm", "A model's setting wins where it says the same.")
    add = group.add_argument
    add("--slurm-partition", metavar="NAME", help="partition (default: the cluster's)")
    add("--slurm-array-parallelism", type=int, metavar="N",
        help="jobs of a model at a time (default: 3)")  # fmt: skip
    add("--slurm-nodes", type=int, default=1, metavar="N", help="nodes of a job (default: 1)")
    add("--slurm-gpus-per-node", type=int, default=1, metavar="N",
        help="GPUs of each of its nodes; 0 for none (default: 1)")  # fmt: skip
    add("--slurm-ntasks-per-node", type=int, default=1, metavar="N",
        help="processes on each node; 1 starts one for each GPU (default: 1)")  # fmt: skip
    add("--slurm-cpus-per-task", type=int, default=8, metavar="N",
        help="cores of each process (default: 8)")  # fmt: skip
    add("--slurm-time", type=int, default=1440, metavar="MINUTES",
        help="a job that takes longer goes back into the queue (default: 1440)")  # fmt: skip
    add("--slurm-constraint", metavar="NAME", help="features that nodes must have")
    add("--slurm-mem", metavar="SIZE", help="memory of a node (default: 58GB for each GPU)")
    add("--slurm-mail-user", metavar="ADDRESS", help="who is told of jobs")
    add("--slurm-mail-type", default="FAIL", metavar="TYPE",
        help="when, as Slurm writes it (default: FAIL)")  # fmt: skip
    add("--slurm-executor", choices=EXECUTORS, default="slurm",
        help="submitit's executor: local and debug try the same jobs without Slurm")  # fmt: skip


def _choice(groups: Groups, settings: Mapping[str, Any], what: str) -> str:
    text = f"{what} settings and groups of them. Groups: {_quoted(groups)}; settings:"
    return f"{text} {_quoted(settings)}.".replace("%", "%%")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def arg_modify_default(parser: argparse.ArgumentParser, dest: str, value: Any) -> None:
    """Change the default of a flag.

    Args:
        parser: has the flag.
        dest: its name with underscores, as in "num_trials".
        value: the new default.

    Raises:
        ConfigError: no such flag, or a value that it does not take.
    """
    found = [action for action in parser._actions if action.dest == dest]
    if not found:
        names = [action.dest for action in parser._actions if action.dest != "help"]
        raise ConfigError(f"arg_modify_default: no flag {dest!r}{near(dest, names)}")
    for action in found:
        if action.choices is not None and value is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise ConfigError(f"arg_modify_default: {dest} {value!r}: expected one of {known}")
        if (action.nargs in ("+", "*")) != isinstance(value, (list, tuple)) and value is not None:
            expected = "a list" if action.nargs in ("+", "*") else "one value"
            raise ConfigError(f"arg_modify_default: {dest} {value!r}: expected {expected}")
        action.default = value
        action.required = False


def typed_of(args: argparse.Namespace) -> frozenset[str]:
    """Names of values that somebody typed; none where another parser made the namespace."""
    found: frozenset[str] = getattr(args, "typed", frozenset())
    return found


def checked(args: argparse.Namespace) -> None:
    """Refuse what is missing or contradicts itself.

    Raises:
        ConfigError: in one line.
    """
    for flag, value, what in (
        ("-o", args.output, "DIR: the folder under which results go"),
        ("-t", args.tasks, "TASK …: task settings or groups; -h lists them"),
        ("-m", args.models, "MODEL …: model settings or groups; -h lists them"),
    ):
        if not value:
            raise ConfigError(f"{flag} is needed: {flag} {what}")
    if args.recalc_metrics_from_predictions and not args.local:
        raise ConfigError("--recalc-metrics-from-predictions needs no cluster: add --local")
    if args.recalc_metrics_from_predictions and args.override_completed:
        raise ConfigError(
            "--recalc-metrics-from-predictions keeps predictions and --override-completed makes "
            "them anew: leave one out"
        )
    if args.recalc_metrics_from_predictions and args.split_few_shot_trials:
        raise ConfigError(
            "--recalc-metrics-from-predictions reads all trials of an evaluation: leave out "
            "--split-few-shot-trials"
        )
    if args.jobs is not None and not args.local:
        raise ConfigError(
            f"-j {args.jobs} is for --local; on Slurm it is --slurm-array-parallelism {args.jobs}"
        )
    for name, least in (("jobs", 1), *_LEAST.items()):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = "-j" if name == "jobs" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {value}: expected {least} or more")


_LEAST = {
    "slurm_nodes": 1, "slurm_gpus_per_node": 0, "slurm_ntasks_per_node": 1,
    "slurm_cpus_per_task": 1, "slurm_array_parallelism": 1, "slurm_time": 1,
}  # fmt: skip
