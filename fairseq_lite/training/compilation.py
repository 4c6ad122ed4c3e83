"""`--compile`: a model's layers through torch.compile, in training only.

The `forward` of each layer is replaced, not the layer: names in checkpoints, classes, and the hooks
by which a sharding backend gathers weights stay as they are. Layers of one shape share a graph; it
is made anew once when the shape of the batches changes, and serves any shape from then on.
Validation and generation run the layers as they are written, and so do mixtures of experts, where
every batch has stretches of other lengths: only what is around them is compiled.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fairseq_lite.config.core import RunConfig
from fairseq_lite.errors import ConfigError, TrainingError
from fairseq_lite.models.api import Model
from fairseq_lite.moe.experts import Experts
from fairseq_lite.parallel.api import Machine
from fairseq_lite.parallel.experts import has_experts
from fairseq_lite.parallel.fully_sharded.choice import FullyShardedConfig

logger = logging.getLogger(__name__)


def reasons(run: RunConfig, machine: Machine) -> list[str]:
    """Why --compile cannot work; a pure function but for looking for a compiler on the path."""
    if not run.optimization.compile:
        return []
    found = []
    backend = run.ddp_backend.config
    if isinstance(backend, FullyShardedConfig) and backend.fsdp_engine == "fairscale":
        found.append("--compile does not see through fairscale's wrappers: use --fsdp-engine torch")
    if machine.cuda_devices and not run.common.cpu:
        if importlib.util.find_spec("triton") is None:
            found.append("--compile needs triton on CUDA: pip install triton, or leave it out")
    else:
        name = _cpp_compiler(machine.environ)
        if shutil.which(name) is None:
            found.append(
                f"--compile needs a C++ compiler on a CPU and there is no {name}: install it, name"
                " another in the environment's CXX, or leave --compile out"
            )
    return found


def check(run: RunConfig, machine: Machine | None = None) -> None:
    """Refuse --compile where it cannot work.

    Raises:
        ConfigError: with the first reason.
    """
    for reason in reasons(run, machine or Machine(torch.cuda.device_count(), dict(os.environ))):
        raise ConfigError(reason)


def compile_layers(model: Model, backend: str = "inductor") -> None:
    """Compile each layer's forward pass, to be used while the layer is in training mode.

    Args:
        model: what the distributed backend's `wrap` returned.
        backend: torch.compile's; another one than the default is of use in tests.

    Raises:
        ConfigError: the architecture names no layers.
    """
    layers = model.layers_to_compile()
    if not layers and has_experts(model):
        raise ConfigError(
            "--compile: every layer of the model has experts, and those run as they are written:"
            " leave --compile out"
        )
    if not layers:
        raise ConfigError(
            f"--compile: {type(model).__name__} does not say what its layers are"
            " (layers_to_compile): leave --compile out"
        )
    for layer in layers:
        for part in layer.modules():
            if any(isinstance(child, Experts) for child in part.children()):
                part.forward = torch.compiler.disable(part.forward)
        layer.forward = _in_training(layer, layer.forward, backend)
    logger.info(
        "compiling %d layers with torch.compile: the first updates take minutes", len(layers)
    )


def _in_training(layer: nn.Module, eager: Callable[..., Any], backend: str) -> Callable[..., Any]:
    compiled = torch.compile(eager, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return eager(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as e:
            # The cause stands in the first two of many lines.
            why = " ".join([line.strip() for line in str(e).splitlines() if line.strip()][:2])
            raise TrainingError(
                f"--compile: torch.compile failed ({why}); leave --compile out"
            ) from e

    return forward


def _cpp_compiler(environ: Mapping[str, str]) -> str:
    """The one that torch.compile calls."""
    return environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
