"""Which processes a run has, from flags, GPUs and the launcher's environment."""

from __future__ import annotations

from typing import Any

import pytest

from fairseq_lite.config.core import CommonConfig, DistributedTrainingConfig, RunConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import BACKENDS, Machine
from fairseq_lite.parallel.legacy_ddp import LegacyDDP
from fairseq_lite.parallel.plan import (
    DEFAULT_HEARTBEAT,
    Plan,
    first_host,
    plan,
    threads_per_rank,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}


def planned(gpus: int = 0, environ: dict[str, str] | None = None, **flags: Any) -> Plan:
    cpu = flags.pop("cpu", False)
    cfg = DistributedTrainingConfig(**{f"distributed_{k}": v for k, v in flags.items()})
    return plan(cfg, cpu=cpu, machine=Machine(gpus, environ or {}))


def test_one_process_on_a_cpu_by_default() -> None:
    assert planned() == Plan(size=1, processes=1, backend="gloo", heartbeat=DEFAULT_HEARTBEAT)


def test_a_process_for_each_gpu_unless_told_otherwise() -> None:
    assert planned(gpus=4).size == 4
    assert planned(gpus=4).spawn
    assert planned(gpus=4).backend == "nccl"
    assert planned(gpus=4, cpu=True).size == 1
    assert planned(gpus=4, cpu=True).backend == "gloo"
    assert planned(gpus=4, no_spawn=True).size == 1
    assert planned(gpus=4, world_size=2).size == 2


def test_evaluation_is_one_process_unless_told_otherwise() -> None:
    def asked(gpus: int = 0, environ: dict[str, str] | None = None, **flags: Any) -> Plan:
        cfg = DistributedTrainingConfig(**{f"distributed_{k}": v for k, v in flags.items()})
        return plan(cfg, cpu=False, machine=Machine(gpus, environ or {}), if_asked=True)

    batch_script = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}
    assert asked(gpus=4).size == 1
    assert asked(gpus=4, environ=batch_script).size == 1
    assert asked(gpus=4, world_size=2).size == 2
    assert asked(gpus=4, num_procs=3).size == 3
    assert asked(gpus=4, environ=TORCHRUN).size == 8
    assert asked(gpus=4, environ=SLURM).size == 4
    assert asked(init_method="tcp://node1:29500", world_size=8, rank=4).size == 8


def test_several_processes_on_a_cpu() -> None:
    found = planned(world_size=3)
    assert (found.size, found.processes, found.local_size) == (3, 3, 3)
    assert found.one_machine and found.serve and not found.cuda


def test_torchrun_environment() -> None:
    found = planned(gpus=4, environ=TORCHRUN)
    assert (found.size, found.first_rank, found.local_rank, found.local_size) == (8, 5, 1, 4)
    assert (found.host, found.port) == ("node1", 29400)
    assert not found.spawn and not found.serve


def test_rank_0_keeps_the_store_when_no_agent_does() -> None:
    environ = {k: v for k, v in TORCHRUN.items() if not k.startswith("TORCHELASTIC")}
    assert planned(environ={**environ, "RANK": "0"}).serve
    assert not planned(environ=environ).serve


def test_slurm_environment_with_a_task_a_rank() -> None:
    found = planned(gpus=2, environ=SLURM)
    assert (found.size, found.first_rank, found.local_rank, found.local_size) == (4, 3, 1, 2)
    assert found.host == "gpu07"
    assert 10000 <= found.port < 30000
    assert not found.spawn and not found.serve
    assert planned(gpus=2, environ=SLURM, port=12345).port == 12345
    assert planned(environ={**SLURM, "SLURM_PROCID": "0"}).serve


@pytest.mark.parametrize(
    "more",
    [
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"},
        {"SLURM_GPUS_ON_NODE": "2"},
    ],
)
def test_a_slurm_task_may_have_a_gpu_of_its_own(more: dict[str, str]) -> None:
    found = planned(gpus=1, environ={**SLURM, **more})
    assert (found.size, found.first_rank, found.local_rank, found.local_size) == (4, 3, 0, 2)
    with pytest.raises(ConfigError, match="has 1 GPU"):  # two tasks on one GPU
        planned(gpus=1, environ=SLURM)


def test_slurm_ranks_agree_on_the_port() -> None:
    ports = {planned(environ={**SLURM, "SLURM_PROCID": str(r)}).port for r in range(4)}
    assert len(ports) == 1


def test_slurm_environment_with_a_task_a_node_starts_a_process_a_gpu() -> None:
    environ = {**SLURM, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    found = planned(gpus=8, environ=environ)
    assert (found.size, found.first_rank, found.processes) == (16, 8, 8)
    assert found.spawn and not found.serve and not found.one_machine


def test_a_shell_inside_a_slurm_allocation_is_one_process() -> None:
    assert planned(environ={**SLURM, "SLURM_STEP_NUM_TASKS": "1"}).size == 1


def test_a_batch_script_is_none_of_its_tasks() -> None:
    environ = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}
    with pytest.raises(ConfigError, match="srun"):
        planned(environ=environ)
    here = planned(environ=environ, world_size=2)
    assert (here.size, here.processes, here.spawn, here.host) == (2, 2, True, "127.0.0.1")
    assert planned(environ={**environ, "SLURM_STEP_NUM_TASKS": "4"}).size == 4


@pytest.mark.parametrize(("node", "tasks"), [("0", 2), ("1", 2), ("2", 1), ("3", 3)])
def test_slurm_nodes_may_have_different_numbers_of_tasks(node: str, tasks: int) -> None:
    environ = {**SLURM, "SLURM_NTASKS": "8", "SLURM_NNODES": "4"}
    environ |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1,3", "SLURM_NODEID": node}
    assert planned(environ=environ).local_size == tasks


def test_ranks_share_the_cores_of_their_machine() -> None:
    assert threads_per_rank(planned(world_size=3), {}, 8) == 2
    assert threads_per_rank(planned(world_size=16), {}, 8) == 1
    assert threads_per_rank(planned(gpus=4), {}, 8) == 2
    assert threads_per_rank(planned(world_size=3), {"OMP_NUM_THREADS": "5"}, 8) is None
    assert threads_per_rank(planned(gpus=4, environ=TORCHRUN), {}, 8) == 2


def test_a_slurm_tasks_cores_are_its_own() -> None:
    environ = {**SLURM, "SLURM_CPUS_PER_TASK": "6"}
    bound, unbound = 6, 12  # cores it may run on where Slurm binds tasks to cores, and where not
    for cores in (bound, unbound):
        assert threads_per_rank(planned(environ=environ), environ, cores) == 6
    each = {**environ, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert threads_per_rank(planned(environ=each, gpus=3), each, unbound) == 2
    assert threads_per_rank(planned(environ=SLURM), SLURM, 12) == 6


def test_init_method_with_several_machines() -> None:
    found = planned(init_method="tcp://10.0.0.1:29500", world_size=6, rank=2, num_procs=2)
    assert (found.size, found.first_rank, found.processes) == (6, 2, 2)
    assert (found.host, found.port, found.serve, found.spawn) == ("10.0.0.1", 29500, False, True)
    assert planned(init_method="tcp://h:1", world_size=6, gpus=4).processes == 4
    assert planned(init_method="tcp://h:1", world_size=6, rank=4, gpus=4).processes == 2


def test_init_method_wins_over_a_launcher() -> None:
    found = planned(environ=TORCHRUN, init_method="tcp://h:1", world_size=2, rank=1, no_spawn=True)
    assert (found.size, found.first_rank, found.host, found.spawn) == (2, 1, "h", False)
    assert planned(environ=TORCHRUN, init_method="env://").size == 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"world_size": 4, "gpus": 2}, "has 2 GPU"),
        ({"backend": "nccl"}, "nccl needs GPUs"),
        ({"backend": "nccl", "gpus": 2, "cpu": True}, "nccl needs GPUs"),
        ({"world_size": 2, "no_spawn": True}, "--distributed-no-spawn"),
        ({"rank": 1}, "--distributed-init-method"),
        ({"world_size": 4, "num_procs": 2}, "--distributed-init-method"),
        ({"init_method": "file:///x", "world_size": 2}, "tcp://HOST:PORT"),
        ({"init_method": "tcp://host:port", "world_size": 2}, "tcp://HOST:PORT"),
        ({"init_method": "tcp://host:1"}, "--distributed-world-size"),
        ({"init_method": "env://"}, "torchrun"),
        ({"init_method": "tcp://h:1", "world_size": 2, "rank": 2}, "expected 0 to 1"),
        ({"init_method": "tcp://h:1", "world_size": 4, "rank": 3, "num_procs": 2}, "more than"),
        ({"environ": TORCHRUN, "world_size": 4}, "WORLD_SIZE"),
        ({"environ": {"RANK": "0", "WORLD_SIZE": "2"}}, "MASTER_ADDR"),
        ({"environ": {**TORCHRUN, "RANK": "x"}}, "RANK is 'x'"),
        ({"environ": SLURM, "world_size": 3}, "Slurm started 4 tasks"),
    ],
)
def test_contradictions_are_one_line(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        planned(**flags)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_ranks_may_share_a_gpu_through_gloo() -> None:
    assert planned(gpus=1, world_size=2, backend="gloo").cuda


def test_heartbeat_timeout() -> None:
    cfg = DistributedTrainingConfig(heartbeat_timeout=7)
    assert plan(cfg, cpu=True, machine=Machine()).heartbeat == 7


@pytest.mark.parametrize(
    ("names", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[9,12]", "gpu9"),
        ("r1-gpu[07]-ib,x", "r1-gpu07-ib"),
        ("rack[1-2]n[3-4]", "rack1n3"),
    ],
)
def test_first_host_of_a_slurm_node_list(names: str, host: str) -> None:
    assert first_host(names) == host


def test_names_of_data_parallel_backends_mean_the_same() -> None:
    for name in ("legacy_ddp", "no_c10d", "c10d", "pytorch_ddp"):
        assert BACKENDS.get(name).factory is LegacyDDP


def test_check_gives_the_first_reason() -> None:
    run = RunConfig(
        "flite-train",
        common=CommonConfig(fp16=True),
        distributed_training=DistributedTrainingConfig(distributed_backend="nccl"),
    )
    reasons = LegacyDDP.reasons(run, Machine())
    assert len(reasons) == 1, "float16 trains on a CPU too"
    with pytest.raises(ConfigError, match="nccl needs GPUs"):
        LegacyDDP.check(run, Machine())
    assert LegacyDDP.reasons(run, Machine(cuda_devices=1)) == []
    assert LegacyDDP.reasons(RunConfig("flite-train"), Machine()) == []
