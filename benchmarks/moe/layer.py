"""Forward and backward of a mixture of experts against a dense network of equal active FLOPs.

    pip install deepspeed
    python -m benchmarks.moe.layer --out benchmarks/results/moe-layer.json
    python -m benchmarks.moe.layer --device cuda --tokens 16384 \
        --out benchmarks/results/moe-layer-cuda.json

In each cell (experts of a token, experts, precision) all contestants have the same weights and get
the same batch, another one in each round; they take turns, and what is quoted is the median over
rounds of the ratio to the dense network of that round. First they are shown to compute the same. On
a machine that does other things too, `--clock cpu` with `--threads 1` is steadier.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.moe.einsum import EinsumMoE
from benchmarks.timing import machine, ratios, record, wait
from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.moe.options import MoEOptions, RouterOptions
from fairseq_lite.training.allocator import keep_freed_memory

DENSE = "dense"
Layer = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Feed(nn.Module):
    """A feed-forward network."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def between(self, inner: Tensor) -> Tensor:
        return F.relu(inner)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.between(self.fc1(x)))
        return out


class Dense(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.feed = Feed(width, inner)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.feed(x), None


class Native(nn.Module):
    def __init__(self, args: Any, top_k: Any, experts: int, factor: float | None) -> None:
        super().__init__()
        options = RouterOptions(
            experts,
            top_k,
            gate_fp32=True,
            second_policy="all",
            capacity_factor=None if factor is None else factor * top_k,
        )
        self.layer = MoELayer(
            args.width,
            MoEOptions(1, options, args.inner),
            lambda: Feed(args.width, args.inner),
            "layer",
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, report = self.layer(x)
        return out, report.balance


class DeepSpeed(nn.Module):
    def __init__(self, native: Native, factor: float | None) -> None:
        super().__init__()
        with contextlib.redirect_stdout(sys.stderr):
            from deepspeed.moe.experts import Experts
            from deepspeed.moe.sharded_moe import MOELayer, TopKGate
        cfg = native.layer.gate.options
        width = native.layer.gate.wg.in_features
        gate = TopKGate(
            width,
            cfg.num_experts,
            cfg.top_k,
            capacity_factor=1.0 if factor is None else factor,
            min_capacity=0,
            drop_tokens=factor is not None,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        gate.load_state_dict(native.layer.gate.state_dict())
        first = native.layer.experts.get_submodule("0")
        assert isinstance(first, Feed)
        experts = Experts(Feed(width, first.fc1.out_features), cfg.num_experts)
        for mine, theirs in zip(
            native.layer.experts.children(), experts.deepspeed_experts, strict=True
        ):
            theirs.load_state_dict(mine.state_dict())
        self.layer = MOELayer(gate, experts, "ep_size_1", 1, cfg.num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x, None), self.layer.l_aux


def contestants(args: Any, top_k: int, experts: int) -> dict[str, nn.Module]:
    """All of a cell, with the same weights."""
    torch.manual_seed(0)
    native = Native(args, top_k, experts, None)
    dropping = Native(args, top_k, experts, args.factor)
    dropping.load_state_dict(native.state_dict())
    found: dict[str, nn.Module] = {
        DENSE: Dense(args.width, args.inner * top_k),
        "native dropless": native,
        "native capacity": dropping,
    }
    if importlib.util.find_spec("deepspeed"):
        found["deepspeed dropless"] = DeepSpeed(native, None)
        found["deepspeed capacity"] = DeepSpeed(native, args.factor)
    feeds = []
    for expert in native.layer.experts.children():
        feeds.append(Feed(args.width, args.inner))
        feeds[-1].load_state_dict(expert.state_dict())
    gate = nn.Linear(args.width, experts, bias=False)
    gate.load_state_dict(native.layer.gate.wg.state_dict())
    found["einsum capacity"] = EinsumMoE(gate, feeds, top_k, args.factor * top_k)
    only = args.only.split(",") if args.only else []
    return {
        name: layer.to(args.device)
        for name, layer in found.items()
        if name == DENSE or not only or any(part in name for part in only)
    }


def check_same(args: Any) -> dict[str, float]:
    """The largest difference of each contestant from the native layer, where nothing is dropped."""
    small = argparse.Namespace(**{**vars(args), "width": 16, "inner": 24, "only": ""})
    small.factor = 4.0  # of four experts: places for all
    worst: dict[str, float] = {}
    for top_k in (1, 2):
        layers = contestants(small, top_k, 4)
        x = torch.randn(64, 16, device=args.device)
        want = layers["native dropless"](x)[0]
        for name, layer in layers.items():
            if name != DENSE:
                difference = float((layer(x)[0] - want).detach().abs().max())
                worst[name] = max(worst.get(name, 0.0), difference)
    if max(worst.values()) > 1e-5:
        raise SystemExit(f"the contestants differ: {worst}")
    return worst


def once(layer: nn.Module, x: Tensor, towards: Tensor, bf16: bool) -> None:
    """Forward and backward, as in a step: gradients begin anew."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
        out, balance = layer(x)
    if balance is None:
        out.backward(towards.to(out.dtype))
    else:
        torch.autograd.backward([out, balance], [towards.to(out.dtype), torch.ones_like(balance)])
    layer.zero_grad()


def measure(args: Any, top_k: int, experts: int, bf16: bool) -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    layers = contestants(args, top_k, experts)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    kind = torch.bfloat16 if bf16 else torch.float32
    for number in range(args.warm_up + args.rounds):
        x = torch.randn(args.tokens, args.width, device=args.device).to(kind)
        towards = torch.randn_like(x)
        for name, layer in layers.items():
            wait(args.device)
            start = clock()
            for _ in range(args.repeat):
                once(layer, x, towards, bf16)
            wait(args.device)
            if number >= args.warm_up:
                seconds[name].append((clock() - start) / args.repeat)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--top-k", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=None)
    parser.add_argument("--factor", type=float, default=1.0, help="capacity, times top-k S / E")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--repeat", type=int, default=1, help="passes in a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", default="", help="contestants whose name contains one of a,b,c")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as flite-train does, for all contestants
    print(f"largest difference from the native layer: {check_same(args)}")
    if not importlib.util.find_spec("deepspeed"):
        print("left out: deepspeed (pip install deepspeed)")
    cells: dict[str, Any] = {}
    precisions = args.precisions or ["fp32", "bf16"]
    for precision, top_k, experts in itertools.product(precisions, args.top_k, args.experts):
        seconds = measure(args, top_k, experts, precision == "bf16")
        label = f"{precision} top-{top_k} {experts} experts"
        cell: dict[str, Any] = {
            name: {
                "milliseconds": round(1000 * statistics.median(times), 2),
                "times_dense": ratios(times, seconds[DENSE]),
            }
            for name, times in seconds.items()
        }
        theirs = seconds.get("deepspeed dropless")
        if theirs is not None and "native dropless" in seconds:
            cell["native over deepspeed, dropless"] = ratios(seconds["native dropless"], theirs)
        cells[label] = cell
        row = ", ".join(
            f"{name} {values['times_dense']['median']:.2f}"
            for name, values in cell.items()
            if "times_dense" in values
        )
        print(f"{label} ({cell[DENSE]['milliseconds']:.0f} ms): {row}", flush=True)
    settings = {
        name: getattr(args, name)
        for name in "device tokens width inner factor rounds repeat clock".split()
    }
    record({"machine": machine(args.threads), **settings, "cells": cells}, args.out)


if __name__ == "__main__":
    main()
