"""Runs as jobs of Slurm's, through submitit."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite_cli.submitting import job_setup, refusal

from . import state
from .attempt import Attempt, claimed
from .grid import Run
from .state import State, place

CPUS_PER_GPU = 8
# Before its time is over a job is told so long ahead, and goes back into the queue so often: as in
# the job templates.
SIGNAL_SECONDS = 180
MAX_REQUEUES = 50


def submitit() -> Any:
    """The package.

    Raises:
        MissingDependency: it is not installed.
        ConfigError: this is no machine of Slurm's.
    """
    try:
        import submitit as package
    except ImportError:
        raise MissingDependency(
            "submitting to Slurm needs submitit: pip install 'fairseq-lite[slurm]'; or --local"
        ) from None
    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise ConfigError(f"no {command} here, so no Slurm: add --local to train here")
    return package


def check_allocation(args: argparse.Namespace) -> None:
    """See that this is a shell of salloc's, with as many machines as are asked for.

    Raises:
        ConfigError: it is none, or has fewer.
    """
    if "SLURM_JOB_ID" not in os.environ or shutil.which("srun") is None:
        raise ConfigError(
            "--salloc: no allocation of Slurm's here: type salloc first; or --local to train on "
            "this machine, or leave it out and let Slurm queue the runs"
        )
    machines = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if machines.isdigit() and int(machines) < args.num_nodes:
        raise ConfigError(
            f"--salloc -n {args.num_nodes}: this allocation has {machines} machine(s)"
        )


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What the jobs ask for, in submitit's names."""
    library = Path(__file__).resolve().parents[__name__.count(".")]
    return {
        "nodes": args.num_nodes,
        "tasks_per_node": 1,  # flite-train starts a process for each GPU
        "gpus_per_node": args.num_gpus,
        "cpus_per_task": CPUS_PER_GPU * args.num_gpus,
        "timeout_min": args.time_minutes,
        "stderr_to_stdout": True,
        "slurm_mem": args.mem,
        "slurm_partition": args.partition,
        "slurm_constraint": args.constraint,
        "slurm_comment": args.comment,
        "slurm_exclusive": args.exclusive or None,
        "slurm_signal_delay_s": SIGNAL_SECONDS,
        "slurm_additional_parameters": {
            "requeue": True,
            **({} if args.reservation is None else {"reservation": args.reservation}),
        },
        "slurm_setup": job_setup(library),
    }


class Job:
    """A run, as submitit takes it to the machine where it is executed, and back into the queue."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._attempt: Attempt | None = None

    def __call__(self) -> str:
        """Execute the run; returns its state.

        Raises:
            RuntimeError: it failed, so that Slurm's job fails too.
        """
        import submitit as package

        env = package.JobEnvironment()
        record = None
        if env.global_rank == 0:  # of several machines' one keeps the record
            with state.locked(self.run.save_dir):
                now, before = state.state_of(self.run.save_dir)
                if before is not None and now in (State.SUBMITTED, State.RUNNING):
                    # The number is not noted yet where the job is faster than who submitted it.
                    unnamed = now is State.SUBMITTED and before.job is None
                    if before.job != env.job_id and not unnamed:
                        return f"left alone: {now.value} {place(before)}"
                record = claimed(self.run, before, State.RUNNING, env.job_id)
                state.store(self.run.save_dir, record)
        # Slurm may tell all processes of a job, and this signal would end training at once.
        deaf_to = getattr(signal, f"SIG{env.USR_SIG}") if env.USR_SIG == "USR2" else None
        self._attempt = Attempt(self.run, record, deaf_to)
        done = self._attempt.execute()
        self._attempt = None
        if done.state is State.FAILED:
            raise RuntimeError(f"{self.run.name}: {done.error}")
        return done.state.value

    def checkpoint(self) -> Any:
        """Save, as the job must make room; submitit puts what this returns back into the queue."""
        import submitit as package

        if self._attempt is not None:
            self._attempt.give_back(signal.SIGUSR1)
        return package.helpers.DelayedSubmission(Job(self.run))


class Queue:
    """Where runs are submitted.

    Args:
        args: the options.
        folder: for submitit's files and the jobs' logs.
        cluster: "slurm", or an executor of submitit's for tests.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, cluster: str = "slurm") -> None:
        package: Any = submitit() if cluster == "slurm" else __import__("submitit")
        self._args = args
        self._executor = package.AutoExecutor(
            folder=folder, cluster=cluster, slurm_max_num_timeout=MAX_REQUEUES
        )
        self._executor.update_parameters(**parameters(args))
        self._after: str | None = None if args.dep is None else str(args.dep)

    def submit(self, run: Run) -> str:
        """Submit a run; returns the job's number.

        Raises:
            ConfigError: Slurm does not take it.
        """
        asked: dict[str, Any] = {"name": run.name}
        if self._after is not None:
            asked["slurm_dependency"] = f"afterany:{self._after}"
        self._executor.update_parameters(**asked)
        try:
            job: str = self._executor.submit(Job(run)).job_id
        except Exception as e:
            raise refusal(run.name, e) from e
        if self._args.sequential:
            self._after = job
        return job
