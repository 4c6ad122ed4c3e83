"""DeepSpeed as a guest: imported quietly, with its communication over the groups we have.

Imported as it is, it logs to the standard output, sets a variable of the environment that changes
how torch looks for GPUs, and on a CPU compiles an extension when its communication starts, for a
minute, or fails where there is no compiler.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite.parallel.experts import ExpertLayout

INSTALL = "pip install --no-build-isolation 'fairseq-lite[deepspeed]'"

_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def load(device: torch.device | str) -> Any:
    """Import DeepSpeed for a kind of device; doing it again is a no-op.

    Args:
        device: where the run computes, which may be the CPU of a machine with GPUs.

    Returns:
        The package.

    Raises:
        MissingDependency: it is not installed, or does not work with this torch or machine.
    """
    try:
        with _quietly():
            package = importlib.import_module("deepspeed")
            _use(torch.device(device).type)
            _import_muon()
    except Exception as e:  # it looks at compilers, GPUs and variables, and what fails is raised
        why = " ".join(str(e).split()) or type(e).__name__
        raise MissingDependency(f"DeepSpeed cannot be imported ({why}): {INSTALL}") from e
    return package


def ensure_comm(device: torch.device | str = "cpu") -> None:
    """Let DeepSpeed communicate over torch's default group, which must exist.

    Doing it again is a no-op; in another world than before it forgets that one's groups.

    Raises:
        MissingDependency: see `load`.
    """
    load(device)
    comm = importlib.import_module("deepspeed.comm.comm")
    if comm.cdb is None:
        with _without_extension():
            comm.init_distributed(
                dist_backend=dist.get_backend(),
                auto_mpi_discovery=False,
                verbose=False,
                dist_init_required=True,
            )
        # torch's newer name for it does the same; DeepSpeed would be warned of at every update.
        warnings.filterwarnings(
            "ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning
        )
    _forget_groups_of_the_dead()


def form_groups(layout: ExpertLayout) -> str:
    """Have DeepSpeed form its expert and expert-data groups; all ranks call.

    Args:
        layout: of a layer of experts; layers that lie alike share their groups.

    Returns:
        DeepSpeed's name of the groups.

    Raises:
        ConfigError: DeepSpeed cannot spread experts like that.
    """
    if layout.num_experts % layout.group_size:
        raise ConfigError(uneven(layout))
    groups = _groups()
    size, rank = layout.group_size, dist.get_rank()
    groups._create_expert_and_data_parallel(size)
    name = f"ep_size_{size}"
    for found, wanted in (
        (groups._get_expert_parallel_group_ranks(name), layout.exchange_groups()),
        (groups._get_expert_data_parallel_group_ranks(name), layout.replica_groups()),
    ):
        assert tuple(found) in wanted and rank in found, (found, wanted)
    return name


def uneven(layout: ExpertLayout) -> str:
    """What to say of experts that do not divide evenly."""
    return (
        f"--ddp-backend deepspeed_moe gives each process of a group equally many experts, and "
        f"{layout.num_experts} do not divide by {layout.group_size}: change the number of experts "
        "or of processes, or use --ddp-backend legacy_ddp"
    )


def _groups() -> Any:
    return importlib.import_module("deepspeed.utils.groups")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what DeepSpeed says while it is imported, and what it does to the environment."""
    log = logging.getLogger("DeepSpeed")
    before = os.environ.get(_NVML)
    handlers, log.disabled = list(log.handlers), True
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sys.stderr),  # the standard output is for results
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = False
        for handler in log.handlers:  # it speaks through ours
            if handler not in handlers:
                log.removeHandler(handler)
        log.propagate = True
        if before is None:
            os.environ.pop(_NVML, None)


def _use(kind: str) -> None:
    """Set DeepSpeed's accelerator, which it has chosen by what the machine has."""
    accelerators = importlib.import_module("deepspeed.accelerator")
    if accelerators.get_accelerator().device_name() == kind:
        return
    module = importlib.import_module(f"deepspeed.accelerator.{kind}_accelerator")
    accelerators.set_accelerator(getattr(module, f"{kind.upper()}_Accelerator")())


def _import_muon() -> None:
    """Import DeepSpeed's optimizer Muon without torch's compiler, which takes two seconds.

    ZeRO asks at every update whether it is in use. It is not, but its module compiles functions.
    """
    name = "deepspeed.runtime.zero.muon.muon_optimizer"
    if name in sys.modules or importlib.util.find_spec(name) is None:
        return
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module(name)
    finally:
        compiler.compile = compile_


@contextlib.contextmanager
def _without_extension() -> Iterator[None]:
    """Start DeepSpeed's communication without the extension that it compiles for CPUs.

    That one serves inference over shared memory. There is no option for it.
    """
    module: Any = importlib.import_module("deepspeed.comm.torch")
    build, module.build_shm_op = module.build_shm_op, lambda: None
    try:
        yield
    finally:
        module.build_shm_op = build


def _forget_groups_of_the_dead() -> None:
    """Forget groups of a world that has ended: DeepSpeed keeps its groups in a module."""
    groups = _groups()
    tables = (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    )
    known = [groups._WORLD_GROUP, *tables[0].values(), *tables[2].values()]
    if all(_lives(group) for group in known if group is not None):
        return
    groups._WORLD_GROUP = None
    for table in tables:
        table.clear()


def _lives(group: Any) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True
