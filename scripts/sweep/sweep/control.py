"""A sweep from its command line to its table: which runs to start, and starting them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.data.folders import data_folders
from fairseq_lite.errors import ConfigError, DataError

from . import results, slurm, state
from .attempt import Attempt, claimed, snapshot
from .grid import Config, Run, hyperparam, runs_of, snapshot_folder
from .options import AddOptions, read, without_part
from .state import Record, State, place

Grid = Callable[[argparse.Namespace], Sequence[hyperparam]]
Postprocess = Callable[[argparse.Namespace, Config], object]

# Flags that do not say what is trained, and their values.
_ASIDE = {"--tensorboard-logdir", "--log-format", "--log-interval", "--num-workers"}


@dataclass(frozen=True)
class Plan:
    """What becomes of a run now.

    Attributes:
        start: whether it is started.
        words: why, or why not.
    """

    start: bool
    words: str


def plan(
    how_far: State, record: Record | None, *, resume_failed: bool, resume_finished: bool
) -> Plan:
    """Decide about a run; a pure function.

    Args:
        how_far: how far it is.
        record: what is known of it.
        resume_failed: the flag.
        resume_finished: the flag.
    """
    if how_far is State.NEW:
        return Plan(True, "starts")
    if how_far is State.INTERRUPTED:
        return Plan(True, "starts where it was interrupted")
    if how_far is State.FAILED:
        error = f": {record.error}" if record is not None and record.error else ""
        if resume_failed:
            return Plan(True, f"starts again after its failure{error}")
        return Plan(False, f"skipped, as it failed (--resume-failed goes on){error}")
    if how_far is State.FINISHED:
        if resume_finished:
            return Plan(True, "starts once more, though it finished")
        return Plan(False, "skipped, as it has finished")
    where = f" {place(record)}" if record is not None else ""
    return Plan(False, f"skipped, as it is {how_far.value}{where}")


def conduct(
    argv: Sequence[str],
    get_grid: Grid | Mapping[str, Grid],
    postprocess: Postprocess | None,
    add_options: AddOptions | None,
    prepare: Callable[[argparse.Namespace], object] | None,
    about: str | None,
) -> None:
    """Do what a sweep's command line says.

    Raises:
        FliteError: what cannot work, before anything is started.
        SystemExit: with status 1 when a run has failed or was ended, now or earlier.
    """
    args = read(argv, add_options, about)
    typed = args.data
    runs = runs_of(_grid(get_grid, args.grid), postprocess, args)
    configs = check(runs, here=args.local)
    idle = without_part(args)
    if idle:
        where = "--local" if args.local else "--salloc"
        print(f"{where}: no part in it have {', '.join(idle)}, which are Slurm's")
    if args.dry_run:
        _show(args, runs)
        # What a script prepares is not there yet.
        for line in missing_data(configs, typed) if prepare is None or typed is not None else ():
            print(f"not there yet: {line}")
    else:
        queue = None
        if args.salloc:
            slurm.check_allocation(args)
        elif not args.local:
            queue = slurm.Queue(args, Path(args.checkpoints_dir, f"{args.prefix}.slurm"))
        if prepare is not None:
            prepare(args)
        for line in missing_data(configs, typed):
            raise DataError(f"{line}; nothing was started")
        if queue is None:
            with _hangup_ends():
                _each(args, runs, _execute)
        else:
            _each(args, runs, lambda args, run, record: _submit(queue, run, record))
    rows = [results.result_of(run) for run in runs]
    print(f"\n{results.table(rows)}", flush=True)
    if not args.dry_run and rows:
        path = Path(args.checkpoints_dir, f"{args.prefix}.sweep_results.tsv")
        results.write_tsv(rows, path)
        print(f"also in {path}")
    open_ends = (State.FAILED, State.INTERRUPTED)
    if not args.dry_run and any(row.state in open_ends for row in rows):
        raise SystemExit(1)


def _grid(get_grid: Grid | Mapping[str, Grid], name: str | None) -> Grid:
    """The grid of a script, by name where it has several."""
    if isinstance(get_grid, Mapping):
        if name is None or name not in get_grid:
            given = "is missing" if name is None else name
            raise ConfigError(f"--grid {given}: expected one of {', '.join(get_grid)}")
        return get_grid[name]
    if name is not None:
        raise ConfigError(f"--grid {name}: this script has one grid; leave the flag out")
    return get_grid


def check(runs: Sequence[Run], *, here: bool = False) -> list[RunConfig]:
    """Let flite-train read every command line now, not when its turn or its job comes.

    Plugins are not imported for it: their flags are read when the run starts.

    Args:
        runs: the runs.
        here: this machine is to train, so that it can be asked what it cannot.

    Returns:
        What was read.

    Raises:
        ConfigError: a run's flags are none, or cannot train, with its name.
    """
    registries = None
    found = []
    for run in runs:
        plugin = any(word.split("=")[0] in ("--user-dir", "--config") for word in run.arguments)
        if not run.arguments or plugin:
            continue
        registries = registries or load_builtins()
        try:
            config = parse("flite-train", run.arguments, registries)
            # What a schedule cannot do is found when it is made, on any machine.
            registries["lr_scheduler"].get(config.lr_scheduler.name or "fixed").factory(
                config.lr_scheduler.config,
                config.optimization,
                maximize=config.checkpoint.maximize_best_checkpoint_metric,
            )
            if here:
                from fairseq_lite.training import assembly  # torch, which --help need not wait for

                assembly.check(config)
        except ConfigError as e:
            raise ConfigError(f"{run.name}: {e}; nothing was started") from None
        found.append(config)
    return found


def missing_data(configs: Iterable[RunConfig], typed: str | None) -> list[str]:
    """What is said of data folders that are none, once of each.

    Args:
        configs: of the runs.
        typed: the value of -d.
    """
    found: dict[str, None] = {}
    for config in configs:
        fields = {field.name for field in dataclasses.fields(config.task.config)}
        if "data" in fields:
            data = config.task.config.data  # type: ignore[attr-defined]
            try:
                data_folders(data)
            except DataError as e:
                found[f"{'-d ' if data == typed else ''}{e}"] = None
    return list(found)


def _show(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """What would be done."""
    for number, run in enumerate(runs, 1):
        now = _plan(args, *state.state_of(run.save_dir))
        print(f"[{number}/{len(runs)}] {run.name}: {now.words}")
        if now.start:
            print(f"    {shlex.join((*run.launcher, *run.command))}")
            for step in run.post_steps:
                print(f"    then: {step}")
    if not args.here:
        asked = {k: v for k, v in slurm.parameters(args).items() if v is not None}
        print("of Slurm: " + ", ".join(f"{name}={value}" for name, value in asked.items()))


def _plan(args: argparse.Namespace, how_far: State, record: Record | None) -> Plan:
    return plan(
        how_far,
        record,
        resume_failed=args.resume_failed,
        resume_finished=args.resume_finished,
    )


def _each(
    args: argparse.Namespace,
    runs: Sequence[Run],
    start: Callable[[argparse.Namespace, Run, Record], str],
) -> None:
    """Claim, start and tell, one run after another."""
    for number, run in enumerate(runs, 1):
        head = f"[{number}/{len(runs)}] {run.name}"
        with _alone_in(run.save_dir):
            how_far, before = state.state_of(run.save_dir)
            now = _plan(args, how_far, before)
            record = None
            if now.start:
                new = State.RUNNING if args.here else State.SUBMITTED
                record = claimed(run, before, new)
                state.store(run.save_dir, record)
        words = now.words + changed(before, run)
        if record is None:
            print(f"{head}: {words}", flush=True)
            continue
        try:
            if args.snapshot_code:
                snapshot(snapshot_folder(run.save_dir))
            if args.here:
                print(f"{head}: {words}; log: {run.save_dir / state.LOG}", flush=True)
            told = start(args, run, record)
            print(f"{head}: {told}" if args.here else f"{head}: {told}, {words}", flush=True)
        except Exception:
            state.take_back(run.save_dir, record, before)
            raise


@contextlib.contextmanager
def _alone_in(save_dir: Path) -> Iterator[None]:
    """Make a run's folder, and lock it for the moment in which the run is claimed.

    Raises:
        DataError: it cannot be made, or written to.
    """
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        with state.locked(save_dir):
            yield
    except OSError as e:
        raise DataError(f"--checkpoints-dir: cannot write to {save_dir}: {e.strerror}") from e


def _execute(args: argparse.Namespace, run: Run, record: Record) -> str:
    """Execute a run here; returns what became of it."""
    done = Attempt(run, record).execute()
    if done.state is State.FINISHED:
        return f"finished in {done.seconds:.0f} s: {results.summary(results.result_of(run))}"
    if done.state is State.FAILED:
        return f"failed: {done.error}"
    return "interrupted: somebody told it to end; the same command goes on"


def _submit(queue: slurm.Queue, run: Run, record: Record) -> str:
    """Submit a run; returns as which job."""
    job = queue.submit(run)
    with state.locked(run.save_dir):
        now = state.load(run.save_dir)
        if now is not None and now.state is State.SUBMITTED:  # it may have begun meanwhile
            state.store(run.save_dir, now.at(State.SUBMITTED, job=job))
    return f"submitted as job {job}"


def changed(before: Record | None, run: Run) -> str:
    """What a run's command has else than the last time, though its folder is the same."""
    if before is None or not before.command:
        return ""
    old, new = _flags(before.command), _flags(run.command)
    told = [
        f"{name} was {_shown(old, name)} and is {_shown(new, name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name) and name not in _ASIDE
    ]
    return f"; other flags than before: {', '.join(told)}" if told else ""


def _shown(flags: Mapping[str, str], name: str) -> str:
    return (flags[name] or "given") if name in flags else "not given"


def _flags(command: Sequence[str]) -> dict[str, str]:
    """The flags of a command with their values, as words."""
    name = "what is run"  # the words before the first flag, but the interpreter
    flags = {name: ""}
    for word in command[1:]:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            flags[name] = value
        else:
            flags[name] = f"{flags[name]} {word}".strip()
    return flags


@contextlib.contextmanager
def _hangup_ends() -> Iterator[None]:
    """A terminal that closes ends the sweep as SIGTERM does, unless it was told not to mind."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGHUP, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
