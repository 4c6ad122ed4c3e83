"""fairscale's sharding on a CPU, for tests: a stand-in for `torch.cuda` inside its module.

fairscale makes CUDA streams where it finds a GPU and then uses them everywhere. `install` gives it
streams that do nothing. It changes tensors for the whole process, so it belongs into processes that
end with the test, never into pytest's own.
"""

from __future__ import annotations

import importlib
import os
import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.config.core import RunConfig
from fairseq_lite.parallel.api import Machine


class _Stream:
    """A stream on which everything has happened already."""

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


_STREAM = _Stream()


class _Cuda:
    """The part of `torch.cuda` that fairscale uses."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def Stream() -> _Stream:
        return _STREAM

    @staticmethod
    def current_stream() -> _Stream:
        return _STREAM

    @staticmethod
    def stream(stream: _Stream) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def synchronize() -> None:
        pass


class _Torch(types.ModuleType):
    """torch with another `cuda`."""

    cuda = _Cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _nothing(tensor: Tensor, *args: object) -> Tensor:
    return tensor


def install() -> types.ModuleType:
    """Let fairscale run on the CPU in this process.

    Returns:
        The module of the engine, which no longer asks for a GPU.
    """
    # gloo does not take what fairscale gives to the collectives it prefers. Read at its import.
    os.environ["ENABLE_NCCL_BASE_COLLECTIVES"] = "0"
    fairscale = importlib.import_module("fairscale.nn.data_parallel.fully_sharded_data_parallel")
    assert not fairscale.enable_nccl_base_collectives, "fairscale was imported before the shim"
    fairscale.torch = _Torch("torch")
    Tensor.record_stream = _nothing  # type: ignore[method-assign]
    Tensor.pin_memory = _nothing  # type: ignore[method-assign]
    engine = importlib.import_module("fairseq_lite.parallel.fully_sharded.fairscale_engine")
    reasons = engine.FairscaleSharded.reasons

    def but_for_the_gpu(run: RunConfig, machine: Machine | None = None) -> list[str]:
        return [reason for reason in reasons(run, machine) if "needs a GPU" not in reason]

    engine.FairscaleSharded.reasons = staticmethod(but_for_the_gpu)
    return engine
