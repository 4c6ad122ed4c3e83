"""Whole training and validation steps: a dense transformer against the same with experts.

    python -m benchmarks.moe.step --out benchmarks/results/moe-step.json
    python -m benchmarks.moe.step --device cuda --precisions bf16 --sentences 512 \
        --out benchmarks/results/moe-step-cuda.json

Every second layer has experts, as many active parameters as the dense one: one expert a token of
its inner width, or two of half of it. A training step is forward, backward, the norm, clipping and
Adam over all parameters, those of all experts too; a validation step is forward without gradients.
Each contestant is a process of its own and they take turns; what is quoted is the median over
rounds of the ratio of target tokens a second to the dense model's in that round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.run import EPSILON, LR, Words, make_batches, sample_of
from benchmarks.timing import Apart, answers, machine, ratios, record, wait
from fairseq_lite.config.core import CommonConfig
from fairseq_lite.criteria.api import Criterion
from fairseq_lite.criteria.cross_entropy import (
    LabelSmoothedCrossEntropy,
    LabelSmoothedCrossEntropyConfig,
)
from fairseq_lite.criteria.moe import (
    MoELabelSmoothedCrossEntropy,
    MoELabelSmoothedCrossEntropyConfig,
)
from fairseq_lite.models.config import TransformerConfig
from fairseq_lite.models.transformer import TransformerModel
from fairseq_lite.moe.experts import casts_kept
from fairseq_lite.optim.adam import Adam, AdamConfig
from fairseq_lite.optim.precision import make_precision
from fairseq_lite.training.allocator import keep_freed_memory

KINDS = {"dense": 0, "top-1": 1, "top-2": 2}


@dataclass(frozen=True)
class Setting:
    """What all contestants share."""

    device: str = "cpu"
    threads: int = 1
    sentences: int = 128
    length: int = 32
    validations: int = 2
    experts: int = 8
    capacity: float = 0.0
    vocabulary: int = 10_000
    width: int = 512
    inner: int = 1024
    heads: int = 4
    layers: int = 6
    dropout: float = 0.3
    pad: int = 1


def build(setting: Setting, top_k: int) -> tuple[TransformerModel, Criterion]:
    words = Words(setting.vocabulary)
    task = SimpleNamespace(
        source_dictionary=words, target_dictionary=words, max_positions=lambda: (1024, 1024)
    )
    flags: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("embed_dim", setting.width),
            ("ffn_embed_dim", setting.inner),
            ("attention_heads", setting.heads),
            ("layers", setting.layers),
        )
    }
    if top_k:
        flags |= {
            "moe_freq": 2,
            "moe_expert_count": setting.experts,
            "moe_expert_ffn_dim": setting.inner // top_k,
            "moe_top1_expert": top_k == 1,
            "moe_capacity_factor": setting.capacity * top_k,
        }
    cfg = TransformerConfig(share_all_embeddings=True, dropout=setting.dropout, **flags)
    torch.manual_seed(1)
    model = TransformerModel.build(cfg, task).to(setting.device)
    if not top_k:
        dense = LabelSmoothedCrossEntropyConfig(label_smoothing=EPSILON)
        return model, LabelSmoothedCrossEntropy(dense, task, sentence_avg=False)
    moe = MoELabelSmoothedCrossEntropyConfig(label_smoothing=EPSILON, moe_gate_loss_wt=0.01)
    return model, MoELabelSmoothedCrossEntropy(moe, task, sentence_avg=False)


def contestant(
    setting: Setting, top_k: int, bf16: bool, rounds: int
) -> Callable[[], dict[str, tuple[float, float]]]:
    """One training step and some of validation; returns wall and CPU seconds of each."""
    torch.set_num_threads(setting.threads)
    if setting.device == "cpu":
        keep_freed_memory()  # as flite-train does
    model, criterion = build(setting, top_k)
    optimizer = Adam(
        model.parameters(), AdamConfig(adam_betas=(0.9, 0.98), weight_decay=1e-4), lr=LR
    )
    precision = make_precision(CommonConfig(bf16=bf16), torch.device(setting.device))
    shape: Any = setting
    batches = make_batches(rounds + setting.validations, shape, setting.sentences, setting.length)
    batches = [tuple(t.to(setting.device) for t in batch) for batch in batches]  # type: ignore[misc]
    validation, training = batches[: setting.validations], iter(batches[setting.validations :])

    def train() -> None:
        model.train()
        criterion.train()
        optimizer.zero_grad()
        with casts_kept(model):
            with precision.autocast():
                loss, sample_size, _ = criterion(model, sample_of(next(training)))
            loss.backward()
        optimizer.scale_gradients(1.0 / sample_size)  # pass after pass, as the trainer does it
        norm: Tensor = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.clip(norm, 1.0)
        optimizer.step()

    def validate() -> None:
        model.eval()
        criterion.eval()
        with torch.no_grad(), casts_kept(model):
            for batch in validation:
                with precision.autocast():
                    criterion(model, sample_of(batch))

    def timed(work: Callable[[], None]) -> tuple[float, float]:
        wait(setting.device)
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        wait(setting.device)
        return time.perf_counter() - wall, time.process_time() - cpu

    def run() -> dict[str, tuple[float, float]]:
        return {"training": timed(train), "validation": timed(validate)}

    return run


def parameters(setting: Setting, top_k: int) -> dict[str, int]:
    """All of them, and those that one token passes through."""
    model, _ = build(replace(setting, device="meta"), top_k)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    active = total - experts + experts * top_k // setting.experts
    return {"parameters": total, "active_parameters": active}


def compare(args: Any, setting: Setting, precision: str) -> dict[str, Any]:
    works = {
        kind: Apart(contestant, setting, top_k, precision == "bf16", args.rounds + 1)
        for kind, top_k in KINDS.items()
    }
    column = 1 if args.clock == "cpu" else 0
    found = answers(works, args.rounds)
    tokens = setting.sentences * setting.length
    result: dict[str, Any] = {}
    for phase in ("training", "validation"):
        by_kind = {kind: [each[phase][column] for each in found[kind]] for kind in works}
        count = tokens * (setting.validations if phase == "validation" else 1)
        for kind, times in by_kind.items():
            row = result.setdefault(kind, dict(parameters(setting, KINDS[kind])))
            row[phase] = {
                "tokens_per_second": round(count / statistics.median(times), 1),
                "times_dense": ratios(by_kind["dense"], times),
            }
            print(
                f"{precision} {phase:10s} {kind:6s} {row[phase]['tokens_per_second']:9.0f} tokens/s"
                f"  {row[phase]['times_dense']['median']:.2f} x dense",
                flush=True,
            )
    return result


def main() -> None:
    default = Setting()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name in ("sentences", "length", "validations", "experts", "width", "inner", "layers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument(
        "--capacity", type=float, default=default.capacity, help="times top-k S / E; 0: dropless"
    )
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=None)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    chosen = {name: getattr(args, name) for name in asdict(default) if hasattr(args, name)}
    setting = Setting(**chosen)
    results = {
        precision: compare(args, setting, precision)
        for precision in args.precisions or ("fp32", "bf16")
    }
    about = {"setting": asdict(setting), "rounds": args.rounds, "clock": args.clock}
    record({"machine": machine(args.threads), **about, "results": results}, args.out)


if __name__ == "__main__":
    main()
