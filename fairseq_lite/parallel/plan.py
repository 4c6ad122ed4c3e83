"""Which processes a run has, decided from flags, GPUs and the launcher's environment.

`plan` is a pure function. In order of precedence, as in fairseq: `--distributed-init-method`, a
torchrun environment, a Slurm step of several tasks, and otherwise processes of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from fairseq_lite.config.core import DistributedTrainingConfig, RunConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import Machine
from fairseq_lite.parallel.experts import planned_layout

# Below the range from which systems give out ports of their own (Linux: 32768).
_SLURM_PORTS = range(10000, 30000)
# Only what srun starts has one of these; a batch script has SLURM_PROCID and SLURM_NTASKS too.
_SLURM_STEP = {"SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"}
# Long enough for a pause to write a large checkpoint, short enough that all ranks have ended a
# minute after one froze.
DEFAULT_HEARTBEAT = 40


@dataclass(frozen=True)
class Plan:
    """What this process has to do to form its part of the world.

    Attributes:
        size: ranks altogether.
        first_rank: the rank of the first process on this machine.
        processes: ranks that this process stands for: those it starts, or itself.
        spawn: whether it starts them, or is the rank itself.
        local_rank: the local rank of the first of them.
        local_size: ranks on this machine, as far as known; they share its cores.
        cores: processor cores that are this process's own, where the launcher says so.
        host, port: where rank 0's machine answers; port 0 chooses one (this machine only).
        serve: whether rank 0's machine is this one and nobody else answers there.
        cuda: whether ranks compute on GPUs.
        backend: "gloo" or "nccl".
        heartbeat: seconds of silence after which a rank counts as dead.
    """

    size: int = 1
    first_rank: int = 0
    processes: int = 1
    spawn: bool = False
    local_rank: int = 0
    local_size: int = 1
    cores: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    serve: bool = True
    cuda: bool = False
    backend: str = "gloo"
    heartbeat: int = DEFAULT_HEARTBEAT

    @property
    def one_machine(self) -> bool:
        """Whether every rank is started by this process."""
        return self.spawn and self.processes == self.size


def plan(
    cfg: DistributedTrainingConfig, *, cpu: bool, machine: Machine, if_asked: bool = False
) -> Plan:
    """Decide which processes a run has.

    Args:
        cfg: the distributed flags.
        cpu: --cpu.
        machine: its GPUs and the environment.
        if_asked: one process unless flags or a launcher say otherwise, on a machine of several GPUs
            and in Slurm's batch script too: evaluation.

    Raises:
        ConfigError: flags that contradict each other, the environment or the machine.
    """
    gpus = 0 if cpu else machine.cuda_devices
    if if_asked and not _asks(cfg, machine.environ):
        cfg = replace(cfg, distributed_world_size=1)
    if cfg.distributed_init_method is not None and cfg.distributed_init_method != "env://":
        found = _from_method(cfg, cfg.distributed_init_method, gpus)
    elif "RANK" in machine.environ and "WORLD_SIZE" in machine.environ:
        found = _from_torchrun(cfg, machine.environ)
    elif cfg.distributed_init_method is not None:
        raise ConfigError(
            "--distributed-init-method env:// reads RANK and WORLD_SIZE, which are not set: start "
            "with torchrun, or give tcp://HOST:PORT"
        )
    elif _slurm_tasks(machine.environ) > 1 and not _ignores_slurm(cfg, machine.environ):
        found = _from_slurm(cfg, machine.environ, gpus)
    else:
        found = _local(cfg, gpus)
    return _on_devices(found, cfg, gpus)


def _asks(cfg: DistributedTrainingConfig, environ: Mapping[str, str]) -> bool:
    """Whether flags or a launcher speak of processes."""
    if cfg.distributed_init_method is not None or {"RANK", "WORLD_SIZE"} <= environ.keys():
        return True
    if _slurm_tasks(environ) > 1 and _SLURM_STEP & environ.keys():
        return True
    return cfg.distributed_world_size is not None or cfg.distributed_num_procs is not None


def common_reasons(run: RunConfig, machine: Machine) -> list[str]:
    """Why no backend at all could do `run` on `machine`: one line each."""
    try:
        found = plan(run.distributed_training, cpu=run.common.cpu, machine=machine)
        layout = planned_layout(run.model.config, found.size)
    except ConfigError as e:
        return [str(e)]
    if layout is not None and found.size > 1 and run.optimizer.name == "lamb":
        return [
            "--optimizer lamb clips by the gradients of one process, and experts are spread over "
            f"{found.size}: use --optimizer adam"
        ]
    return []


def _from_method(cfg: DistributedTrainingConfig, method: str, gpus: int) -> Plan:
    size = cfg.distributed_world_size
    if size is None:
        raise ConfigError(
            f"--distributed-init-method {method} also needs --distributed-world-size N"
        )
    try:
        parts = urlsplit(method)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "tcp" or not host or not port:
        raise ConfigError(
            f"--distributed-init-method {method}: expected tcp://HOST:PORT, "
            "for example tcp://10.0.0.1:29500, or env://"
        )
    first = cfg.distributed_rank
    here = 1 if cfg.distributed_no_spawn else cfg.distributed_num_procs or max(1, gpus)
    here = min(here, size - first) if cfg.distributed_num_procs is None else here
    if not 0 <= first < size:
        raise ConfigError(
            f"--distributed-rank {first}: expected 0 to {size - 1}, "
            f"as --distributed-world-size is {size}"
        )
    if first + here > size:
        raise ConfigError(
            f"--distributed-num-procs {here} from --distributed-rank {first} on is more than "
            f"--distributed-world-size {size}"
        )
    return Plan(
        size=size,
        first_rank=first,
        processes=here,
        spawn=not cfg.distributed_no_spawn and size > 1,
        local_rank=first % gpus if gpus and cfg.distributed_no_spawn else 0,
        local_size=here,
        host=host,
        port=port,
        serve=first == 0,
    )


def _from_torchrun(cfg: DistributedTrainingConfig, environ: Mapping[str, str]) -> Plan:
    size, rank = _number(environ, "WORLD_SIZE"), _number(environ, "RANK")
    asked = cfg.distributed_world_size
    if asked is not None and asked != size:
        raise ConfigError(
            f"--distributed-world-size {asked}: the launcher made {size} processes (WORLD_SIZE); "
            "leave the flag out"
        )
    if size > 1 and not ("MASTER_ADDR" in environ and "MASTER_PORT" in environ):
        raise ConfigError(
            "RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT: start with "
            "torchrun, or unset them"
        )
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Plan(
        size=size,
        first_rank=rank,
        local_rank=_number(environ, "LOCAL_RANK", rank),
        local_size=_number(environ, "LOCAL_WORLD_SIZE", 1),
        host=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environ, "MASTER_PORT", 0),
        serve=rank == 0 and not agent,
    )


def _from_slurm(cfg: DistributedTrainingConfig, environ: Mapping[str, str], gpus: int) -> Plan:
    tasks, task = _slurm_tasks(environ), _number(environ, "SLURM_PROCID")
    if not _SLURM_STEP & environ.keys():
        raise ConfigError(
            f"Slurm gave this job {tasks} tasks, but this process is none of them: start it with "
            "srun; or add --distributed-world-size N for N processes on this machine only"
        )
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", _number(environ, "SLURM_NNODES", 1))
    # One task on each node and several GPUs: the task starts a process a GPU, as fairseq's does.
    each = 1
    if tasks == nodes and not cfg.distributed_no_spawn:
        each = cfg.distributed_num_procs or max(1, gpus)
    size = tasks * each
    asked = cfg.distributed_world_size
    if asked is not None and asked != size:
        raise ConfigError(
            f"--distributed-world-size {asked}: Slurm started {tasks} tasks with {each} "
            f"process(es) each, which is {size}; leave the flag out"
        )
    names = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    names = names or environ.get("SLURM_NODELIST")
    if not names:
        raise ConfigError(
            "Slurm's environment has no SLURM_JOB_NODELIST: give --distributed-init-method "
            "tcp://HOST:PORT"
        )
    port = cfg.distributed_port
    if port <= 0:
        job = _number(environ, "SLURM_JOB_ID", _number(environ, "SLURM_JOBID", 0))
        port = _SLURM_PORTS[job % len(_SLURM_PORTS)]
    return Plan(
        size=size,
        first_rank=task * each,
        processes=each,
        spawn=each > 1,
        local_rank=0 if each > 1 else _slurm_device(environ, gpus),
        local_size=each if each > 1 else _tasks_here(environ, tasks, nodes),
        cores=_number(environ, "SLURM_CPUS_PER_TASK", 0) or None,
        host=first_host(names),
        port=port,
        serve=task == 0,
    )


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    if not {"SLURM_PROCID", "SLURM_NTASKS"} <= environ.keys():
        return 1
    # A shell that srun opened inside a larger allocation is a step of one task.
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS"))


def _slurm_device(environ: Mapping[str, str], gpus: int) -> int:
    """The task's place among those of its node, or among the GPUs it sees when these are its own.

    With --gpus-per-task=1 each task sees one GPU, number 0, and the node has more.
    """
    local, here = _number(environ, "SLURM_LOCALID", 0), environ.get("SLURM_GPUS_ON_NODE", "")
    own = (
        "SLURM_GPUS_PER_TASK" in environ
        or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
        or (here.isdigit() and gpus < int(here))
    )
    return local % gpus if gpus and own else local


def _ignores_slurm(cfg: DistributedTrainingConfig, environ: Mapping[str, str]) -> bool:
    """Whether this is Slurm's batch script itself, told to start processes of its machine only."""
    return cfg.distributed_world_size is not None and not _SLURM_STEP & environ.keys()


def _tasks_here(environ: Mapping[str, str], tasks: int, nodes: int) -> int:
    """Tasks on this node; nodes need not have equally many: "2(x3),1"."""
    each: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is not None:
            each += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    return each[node] if node < len(each) else max(1, tasks // nodes)


def _local(cfg: DistributedTrainingConfig, gpus: int) -> Plan:
    size = cfg.distributed_world_size
    if size is None:
        size = 1 if cfg.distributed_no_spawn else cfg.distributed_num_procs or max(1, gpus)
    if cfg.distributed_no_spawn and size > 1:
        raise ConfigError(
            f"--distributed-no-spawn and --distributed-world-size {size}: the other processes must "
            "come from a launcher; add --distributed-init-method tcp://HOST:PORT, or use torchrun"
        )
    if cfg.distributed_rank != 0:
        raise ConfigError(
            f"--distributed-rank {cfg.distributed_rank} also needs --distributed-init-method "
            "tcp://HOST:PORT, the address of rank 0"
        )
    if cfg.distributed_num_procs not in (None, size):
        raise ConfigError(
            f"--distributed-num-procs {cfg.distributed_num_procs} on one machine of "
            f"--distributed-world-size {size}: give --distributed-init-method tcp://HOST:PORT too"
        )
    return Plan(size=size, processes=size, spawn=size > 1, local_size=size)


def _on_devices(found: Plan, cfg: DistributedTrainingConfig, gpus: int) -> Plan:
    backend = cfg.distributed_backend or ("nccl" if gpus else "gloo")
    if backend == "nccl" and not gpus:
        raise ConfigError(
            "--distributed-backend nccl needs GPUs, and this run is on the CPU: use gloo"
        )
    here = found.local_rank + found.processes
    if backend == "nccl" and here > gpus:
        raise ConfigError(
            f"{here} processes on this machine, but it has {gpus} GPU(s): lower "
            "--distributed-world-size, or add --cpu"
        )
    heartbeat = cfg.heartbeat_timeout if cfg.heartbeat_timeout > 0 else DEFAULT_HEARTBEAT
    return replace(found, cuda=gpus > 0, backend=backend, heartbeat=heartbeat)


def threads_per_rank(found: Plan, environ: Mapping[str, str], cores: int) -> int | None:
    """How many threads each rank may compute with; None to leave it as it is.

    Args:
        found: the plan.
        environ: `OMP_NUM_THREADS` in it decides; torchrun sets it to 1 for several ranks.
        cores: processor cores that this process may run on.
    """
    if "OMP_NUM_THREADS" in environ:
        return None
    if found.cores is not None:  # Slurm's share of this task: `cores` may be all of the machine's
        return max(1, min(cores, found.cores) // found.processes)
    return max(1, cores // found.local_size)


def first_host(names: str) -> str:
    """The first host of a Slurm node list: "gpu[03-05,9],cpu1" -> "gpu03"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", names.strip())
    if first is None:
        raise ConfigError(f"Slurm's node list {names!r} cannot be read")
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", first.group())


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"the environment's {name} is {text!r}: expected a number") from None
