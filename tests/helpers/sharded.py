"""A small model with every oddity a shard may meet, trained a little and written, on any ranks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fairseq_lite.config.core import CheckpointConfig
from fairseq_lite.optim.adam import Adam, AdamConfig
from fairseq_lite.parallel.api import Part
from fairseq_lite.parallel.legacy_ddp import LegacyDDP
from fairseq_lite.parallel.local import rows_of
from fairseq_lite.parallel.shards import exchange as shards
from fairseq_lite.parallel.shards.pieces import (
    assembled,
    in_memory,
    is_in_parts,
    open_parts,
    tensors_of,
)
from fairseq_lite.parallel.shards.spans import digest
from fairseq_lite.parallel.world import World
from fairseq_lite.training.checkpoint import naming, parts
from fairseq_lite.training.checkpoint.writing import CheckpointWriter, Job

MOMENT = naming.Moment(1, 10, False)


class Odd(nn.Module):
    """Tied, frozen, never updated and narrow parameters, fewer rows than ranks, a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(9, 4)
        self.layer = nn.Linear(4, 7)
        self.few = nn.Parameter(torch.randn(3, 2, 2))
        self.frozen = nn.Linear(4, 5)
        self.frozen.requires_grad_(False)
        self.idle = nn.Linear(4, 6)
        self.narrow = nn.Linear(4, 5, dtype=torch.bfloat16)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("version", torch.tensor([3.0]))


class Training:
    """A model with optimizer and average on one rank."""

    def __init__(self, world: World, *, spread: bool, seed: int = 5) -> None:
        self.world, self.spread = world, spread
        self.model = Odd(seed)
        if spread:
            world.form_group()
            mesh = init_device_mesh("cpu", (world.size,))
            fully_shard(self.model.layer, mesh=mesh)
            fully_shard(self.model.narrow, mesh=mesh)  # of one type, as torch wants a unit
            fully_shard(self.model, mesh=mesh)
        self.optimizer = Adam(self.model.parameters(), AdamConfig(), lr=0.01)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def update(self, number: int) -> None:
        """One update with gradients that depend on the name and the number alone."""
        for name, param in self.model.named_parameters():
            if param.requires_grad and not name.startswith("idle"):
                torch.manual_seed(zlib.crc32(f"{name} {number}".encode()))
                grad = torch.randn(param.shape).to(param.dtype)
                param.grad = self._laid_out(grad, param)
        self.optimizer.step()

    def _laid_out(self, whole: Tensor, like: Any) -> Tensor:
        if not self.spread:
            return whole
        return type(like.data).from_local(
            rows_of(whole, like).contiguous(),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def save(self, path: Path, *, sharded: bool, mark: str = "a") -> None:
        """Write `path`, as one file or as shards."""
        if not self.spread:
            own = LegacyDDP(None, self.world).save_parts(self.model, self.optimizer, self.average)
        else:
            how = shards.shard if sharded else shards.gather
            own = how(self.world, shards.holding(self.model, self.optimizer, self.average))
        write(self.world, path, own, mark)

    def load(self, path: Path) -> None:
        """Read `path`, whatever it is."""
        files = parts.CheckpointFiles(path)
        if self.spread:
            shards.load(self.world, self.model, self.optimizer, files, self.average)
        else:
            backend = LegacyDDP(None, self.world)
            backend.load_parts(self.model, self.optimizer, files, self.average)


def content(part: Part, mark: str) -> dict[str, Any]:
    """A file with little but a part in it."""
    manifest = {**part.manifest, "save": mark}
    state: dict[str, Any] = {
        "model": dict(part.model),
        "extra_state": {},
        parts.OWN_KEY: {"manifest": manifest},
    }
    if part.optimizer is not None:
        state["last_optimizer_state"] = dict(part.optimizer)
    if part.average is not None:
        state["extra_state"]["ema"] = dict(part.average)
    return state


def write(world: World, path: Path, own: Mapping[str, Part], mark: str) -> None:
    """Write parts as a checkpoint manager does."""
    writer = CheckpointWriter(CheckpointConfig(save_dir=str(path.parent)), world)
    states = {name: content(part, mark) for name, part in own.items()}
    writer.submit(Job([path.name], MOMENT, states))


def whole_part(path: Path) -> Part:
    """All that a checkpoint holds, whole, under names."""
    files = parts.CheckpointFiles(path)
    if is_in_parts(files):
        return assembled(open_parts(files), in_memory)
    return files.read("model")


def digests(path: Path) -> dict[str, str]:
    """The hash of every tensor, parameters of the optimizer by number."""
    part = whole_part(path)
    found = {
        key: digest(tensor) for key, tensor in tensors_of(replace(part, optimizer=None)).items()
    }
    assert part.optimizer is not None
    for number, entry in part.optimizer["state"].items():
        for key, value in entry.items():
            text = digest(value) if isinstance(value, Tensor) else repr(value)
            found[f"optimizer.{number}.{key}"] = text
    return found


def flat_shards(
    weights: Mapping[str, Tensor], units: Sequence[str], shared: Mapping[str, str], ranks: int
) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """What fairscale makes of a model: (weights, metadata) of each rank.

    Args:
        weights: the model's; names that end in `version` are buffers.
        units: paths of the modules that are wrapped by themselves; the rest is the outermost unit.
        shared: further names of shared tensors -> the first.
        ranks: how many.
    """
    buffers = {name: tensor for name, tensor in weights.items() if name.endswith("version")}
    left = {n: t for n, t in weights.items() if n not in buffers and n not in shared}
    shards: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        (dict(buffers), {"param_metadata": [], "buffer_names": [*buffers, "computed.table"]})
        for _ in range(ranks)
    ]
    for unit in (*units, ""):
        own = [name for name in left if name.startswith(f"{unit}." if unit else "")]
        tensors = [left.pop(name) for name in own]
        row = torch.cat([tensor.flatten() for tensor in tensors])
        chunks = [*row.chunk(ranks), *[row[:0]] * ranks][:ranks]
        bare = [name[len(unit) + 1 :] if unit else name for name in own]
        for (state, metadata), chunk in zip(shards, chunks, strict=True):
            padding = chunks[0].numel() - chunk.numel()
            place = f"{unit}.flat_param_0" if unit else "flat_param_0"
            state[place] = torch.nn.functional.pad(chunk, (0, padding))
            params = {
                "names": bare,
                "shapes": [tensor.shape for tensor in tensors],
                "numels": [tensor.numel() for tensor in tensors],
                "padding": padding,
            }
            metadata["param_metadata"].append(
                {
                    "fsdp_path": unit,
                    "params": {"flat_param_0": params},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [] if unit else [(a, b) for b, a in shared.items()],
                }
            )
    return shards
