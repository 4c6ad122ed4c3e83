"""Training a language model: ours, a minimal GPT loop in plain PyTorch, Hugging Face's Trainer.

    pip install transformers accelerate
    python -m benchmarks.lm.run --out benchmarks/results/lm.json
    python -m benchmarks.lm.run --device cuda --compile --width 1024 --layers 24 --heads 16 \
        --length 1024 --batch 16 --out benchmarks/results/lm-cuda.json

All train a decoder of the same shape, without dropout, with Adam and clipping; first, small ones
with the same weights are shown to have the same loss. Each contestant is a process of its own and
they take turns, a few updates each, so that a machine whose speed drifts slows them all alike; what
is quoted is the median over rounds of the ratio of tokens a second within a round. MFU is the share
of the arithmetic that the model needs in what the device could do: on a GPU of known name its
peak, on a CPU a large product of matrices in the same precision. A peer that is not installed is
left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm import contestants, plain
from benchmarks.lm.plain import Mode, Shape
from benchmarks.random_text import data_folder
from benchmarks.timing import Apart, answers, machine, ratios, record, wait

# bf16 with dense matrices, in TFLOP/s, from the makers' data sheets.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}


def start(
    shape: Shape, modes: dict[str, Mode], updates: int, data: Path, only: str
) -> dict[str, Apart]:
    """A process for every contestant in every mode."""
    found: dict[str, Apart] = {}
    for label, mode in modes.items():
        entries: dict[str, tuple[Any, ...]] = {
            "ours": (contestants.ours, shape, mode, updates, data),
            "plain": (plain.work, shape, mode, updates),
        }
        if importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate"):
            entries["transformers"] = (contestants.transformers, shape, mode, updates)
        else:
            print("left out: transformers (pip install transformers accelerate)")
        for name, (build, *arguments) in entries.items():
            if not only or only in f"{name} {label}":
                found[f"{name} {label}"] = Apart(build, *arguments)
    return found


def peak_flops(device: str, bf16: bool, given: float | None) -> tuple[float, str]:
    """What the device can do a second, and how we know."""
    if given is not None:
        return given * 1e12, "given"
    if device == "cuda":
        name = torch.cuda.get_device_name()
        known = next((peak for part, peak in PEAKS.items() if part in name and bf16), 0.0)
        if known:
            return known * 1e12, f"data sheet of {name}"
    dtype, size = (torch.bfloat16 if bf16 else torch.float32), 4096
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best, f"a product of matrices of {size}"


def summary(
    speeds: dict[str, list[float]], shape: Shape, modes: dict[str, Mode], peak: float | None
) -> dict[str, Any]:
    """Medians, MFU, and ours over the others' of the same mode."""
    device = next(iter(modes.values())).device
    table: dict[str, Any] = {}
    peaks = {bf16: peak_flops(device, bf16, peak) for bf16 in {m.bf16 for m in modes.values()}}
    for name, values in speeds.items():
        kind, _, label = name.partition(" ")
        able, source = peaks[modes[label].bf16]
        median = statistics.median(values)
        row = table[name] = {
            "tokens_per_second": round(median, 1),
            "mfu": round(median * shape.flops_per_token / able, 4),
            "mfu_of": source,
        }
        mine = speeds.get(f"ours {label}")
        if kind != "ours" and mine:
            row["ours_times_faster"] = ratios(mine, values)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--updates", type=int, default=4, help="in a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="contestants whose name contains this")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape = Shape(**{name: getattr(args, name) for name in asdict(Shape())})
    print(f"the same weights have the same loss: {contestants.same_losses()}")
    modes = {
        precision + (" compile" if through else ""): Mode(precision == "bf16", through, args.device)
        for precision in args.precisions or (("fp32", "bf16") if args.device == "cpu" else ["bf16"])
        for through in ((False, True) if args.compile else (False,))
    }
    with tempfile.TemporaryDirectory() as folder:
        data = data_folder(Path(folder), shape.vocabulary, 64 * shape.batch * shape.length)
        processes = start(shape, modes, args.updates, data, args.only)
        speeds = answers(processes, args.rounds, show="{:.0f}".format)
    result = {
        "machine": machine(),
        "shape": asdict(shape),
        "matrix_parameters": shape.parameters,
        "flops_per_token": shape.flops_per_token,
        "rounds": args.rounds,
        "results": summary(speeds, shape, modes, args.peak_tflops),
    }
    record(result, args.out)


if __name__ == "__main__":
    main()
