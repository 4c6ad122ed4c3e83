"""Jobs on Slurm, through submitit: for each model an array of jobs.

submitit's `local` executor carries out the same jobs in processes of this machine, its `debug`
executor in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.few_shot.scheduling import submissions
from examples.few_shot.scheduling.local import ROOT
from examples.few_shot.scheduling.settings import ModelSettings
from examples.few_shot.scheduling.submissions import SLURM, Submission
from examples.few_shot.scheduling.worker import Order, execute, needs_model
from examples.few_shot.settings import PlannedEvaluation, safe
from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite_cli.alive import Process
from fairseq_lite_cli.submitting import job_setup, refusal

EXECUTORS = ("slurm", "local", "debug")
LOGS = "submitit"
# Jobs of a model at a time, where neither its setting nor the command line says.
PARALLEL = 3
GB_PER_GPU = 58
# Before its time is over a job is told so long ahead; it goes back into the queue so often.
SIGNAL_SECONDS = 120
MAX_REQUEUES = 3
_PORTS = range(10000, 30000)


@dataclass(frozen=True)
class Needs:
    """What the jobs of one model ask for.

    Attributes:
        nodes, gpus_per_node, ntasks_per_node, cpus_per_task: of one job.
        parallel: how many of them at a time.
        minutes: the longest one may take before it goes back into the queue.
        partition, constraint, mem, mail_user, mail_type: as Slurm writes them; None: its default.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    ntasks_per_node: int = 1
    cpus_per_task: int = 8
    parallel: int = PARALLEL
    minutes: int = 1440
    partition: str | None = None
    constraint: str | None = None
    mem: str | None = None
    mail_user: str | None = None
    mail_type: str | None = None

    @property
    def world_size(self) -> int:
        """Processes that share one job: its tasks; a task alone on its node starts one a GPU."""
        each = max(1, self.gpus_per_node) if self.ntasks_per_node == 1 else self.ntasks_per_node
        return self.nodes * each

    def parameters(self, name: str) -> dict[str, Any]:
        """The same in submitit's words."""
        gigabytes = GB_PER_GPU * self.gpus_per_node
        return {
            "name": f"{safe(name)}_few_shot",
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node or None,
            "tasks_per_node": self.ntasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "timeout_min": self.minutes,
            "slurm_array_parallelism": self.parallel,
            "slurm_partition": self.partition,
            "slurm_constraint": self.constraint,
            "slurm_mem": self.mem or (f"{gigabytes}GB" if gigabytes else None),
            "slurm_mail_user": self.mail_user,
            "slurm_mail_type": self.mail_type if self.mail_user else None,
            "slurm_signal_delay_s": SIGNAL_SECONDS,
            "slurm_setup": job_setup(ROOT),
        }


def needs(model: ModelSettings, args: argparse.Namespace) -> Needs:
    """What a model's jobs ask for: its setting, else the command line."""

    def either(own: Any, flag: Any) -> Any:
        return flag if own is None else own

    return Needs(
        nodes=either(model.nodes, args.slurm_nodes),
        gpus_per_node=0 if args.cpu else either(model.gpus_per_node, args.slurm_gpus_per_node),
        ntasks_per_node=either(model.ntasks_per_node, args.slurm_ntasks_per_node),
        cpus_per_task=either(model.cpus_per_task, args.slurm_cpus_per_task),
        parallel=either(either(model.max_parallel, args.slurm_array_parallelism), PARALLEL),
        minutes=either(model.minutes, args.slurm_time),
        partition=either(model.partition, args.slurm_partition),
        constraint=either(model.constraint, args.slurm_constraint),
        mem=either(model.mem, args.slurm_mem),
        mail_user=args.slurm_mail_user,
        mail_type=args.slurm_mail_type,
    )


@dataclass
class RemoteJob:
    """A job as submitit takes it to where it is carried out, and back into the queue."""

    order: Order
    _before: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _goes_back: bool = False

    def __call__(self) -> str:
        """Carry the job out.

        Raises:
            RuntimeError: it failed, so that Slurm's job fails too.
        """
        import submitit

        env = submitit.JobEnvironment()
        order = self.order
        planned = order.planned()
        first = env.global_rank == 0
        if not first and not any(needs_model(each) for each in planned):
            return "the first task does it"
        if first:
            by = _who(order.name, env)
            for each in planned:
                submissions.record(each, by)
        self._before = {str(each.product): _made(each) for each in planned}
        try:
            with meeting_point(env):
                errors = execute(order, ranks=env.num_tasks)
        finally:
            if first and not self._goes_back:
                submissions.release(planned)
        if errors:
            raise RuntimeError("\n".join(errors))
        return f"{len(planned)} evaluations"

    def checkpoint(self) -> Any:
        """Go back into the queue as the time is over, with what is left to do."""
        import submitit

        self._goes_back = True
        done = [
            each
            for each in self.order.planned()
            if _made(each) not in (None, self._before.get(str(each.product)))
        ]
        return submitit.helpers.DelayedSubmission(RemoteJob(self.order.without(done)))


def _made(planned: PlannedEvaluation) -> int | None:
    """When it was made."""
    try:
        return planned.product.stat().st_mtime_ns
    except OSError:
        return None


def _who(name: str, env: Any) -> Submission:
    if env.cluster == "slurm":
        return _on_slurm(name, env.job_id)
    return Submission.of_process(name)


def _on_slurm(name: str, job_id: str, folder: str = "") -> Submission:
    me = Process.of(os.getpid())
    return Submission(name, SLURM, me, job_id, folder, submissions.now())


@contextlib.contextmanager
def meeting_point(env: Any) -> Iterator[None]:
    """Let the tasks of submitit's local executor find each other; Slurm's do by themselves."""
    if env.cluster != "local" or env.num_tasks == 1:
        yield
        return
    found = {
        "RANK": env.global_rank,
        "WORLD_SIZE": env.num_tasks,
        "LOCAL_RANK": env.local_rank,
        "LOCAL_WORLD_SIZE": env.num_tasks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _PORTS[int(env.job_id) % len(_PORTS)],
    }
    os.environ.update({name: str(value) for name, value in found.items()})
    try:
        yield
    finally:
        for name in found:
            del os.environ[name]


@dataclass(frozen=True)
class Submitted:
    """A job that was handed over.

    Attributes:
        order: what it is to do.
        job_id: its number.
        stdout, stderr: where its output goes.
        job: submitit's object.
    """

    order: Order
    job_id: str
    stdout: str
    stderr: str
    job: Any


def executor(kind: str, folder: Path) -> Any:
    """submitit's executor.

    Raises:
        MissingDependency: submitit is not installed.
        ConfigError: this is no machine of Slurm's.
    """
    try:
        import submitit
    except ImportError:
        raise MissingDependency(
            "jobs on Slurm need submitit: pip install 'fairseq-lite[slurm]'; or add --local"
        ) from None
    try:
        return submitit.AutoExecutor(folder, cluster=kind, slurm_max_num_timeout=MAX_REQUEUES)
    except RuntimeError:
        raise ConfigError(
            "no srun here, so no Slurm: add --local to evaluate on this machine"
        ) from None


def submit(
    kind: str, folder: Path, model_key: str, wanted: Needs, orders: Sequence[Order]
) -> list[Submitted]:
    """Submit the jobs of one model as an array.

    Args:
        kind: one of `EXECUTORS`.
        folder: for submitit's files and the jobs' output.
        model_key: names the array.
        wanted: what each asks for.
        orders: what each is to do.

    Raises:
        ConfigError: Slurm does not take them.
        MissingDependency: see `executor`.
    """
    found = executor(kind, folder)
    before = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), before or ""]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    try:
        found.update_parameters(**wanted.parameters(model_key))
        with found.batch():
            jobs = [found.submit(RemoteJob(order)) for order in orders]
    except Exception as e:
        raise refusal(model_key, e) from e
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return [
        Submitted(order, str(job.job_id), str(job.paths.stdout), str(job.paths.stderr), job)
        for order, job in zip(orders, jobs, strict=True)
    ]


def run_here(done: Submitted) -> str:
    """Carry out a job of the `debug` executor; returns what went wrong, or nothing."""
    # submitit's own way ends in a debugger that waits for somebody.
    os.environ["SUBMITIT_DEBUG_JOB_ID"] = done.job_id
    try:
        error = done.job.exception()
    finally:
        del os.environ["SUBMITIT_DEBUG_JOB_ID"]
    return "" if error is None else str(error) or type(error).__name__


def mark(kind: str, done: Submitted, planned: Sequence[PlannedEvaluation]) -> None:
    """Write down whose the evaluations of a submitted job are."""
    if kind == "debug":
        return  # it is carried out by this process, which has claimed them
    if kind == "local":
        by = Submission.of_process(done.order.name, int(done.job_id))
    else:
        by = _on_slurm(done.order.name, done.job_id, str(Path(done.stdout).parent))
    for each in planned:
        submissions.record(each, by)
