"""One training step: ours in fp32 and bf16 against the plain fp32 step of `plain.py`, in one run.

    python -m benchmarks.step.run --rounds 5 --out benchmarks/results/step.json

Contestants take turns, so that a machine whose speed drifts slows them all alike; what is quoted is
the median over rounds of the ratio of target tokens per second within a round. First a small model
with the same weights shows that the contestants compute the same loss.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.plain import LoopAdam, PlainTransformer, Shape, smoothed_loss
from benchmarks.timing import Apart, answers, machine, ratios, record
from fairseq_lite.config.core import CommonConfig
from fairseq_lite.criteria.cross_entropy import (
    LabelSmoothedCrossEntropy,
    LabelSmoothedCrossEntropyConfig,
)
from fairseq_lite.models.config import TransformerConfig
from fairseq_lite.models.transformer import TransformerModel
from fairseq_lite.optim.adam import Adam, AdamConfig
from fairseq_lite.optim.precision import make_precision
from fairseq_lite.training.allocator import keep_freed_memory

KINDS = ("plain fp32", "ours fp32", "ours bf16")
EPSILON = 0.1
LR = 5e-4
Batch = tuple[Tensor, Tensor, Tensor]
Step = Callable[[Batch], None]


class Words:
    """A dictionary of `n` symbols."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def pad(self) -> int:
        return 1


def our_model(shape: Shape) -> tuple[TransformerModel, LabelSmoothedCrossEntropy]:
    words = Words(shape.vocabulary)
    task = SimpleNamespace(
        source_dictionary=words, target_dictionary=words, max_positions=lambda: (1024, 1024)
    )
    sides: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("embed_dim", shape.width),
            ("ffn_embed_dim", shape.inner),
            ("attention_heads", shape.heads),
            ("layers", shape.layers),
        )
    }
    cfg = TransformerConfig(share_all_embeddings=True, dropout=shape.dropout, **sides)
    loss = LabelSmoothedCrossEntropyConfig(label_smoothing=EPSILON)
    model = TransformerModel.build(cfg, task)
    return model, LabelSmoothedCrossEntropy(loss, task, sentence_avg=False)


def sample_of(batch: Batch) -> dict[str, Any]:
    source, previous, target = batch
    inputs = {"src_tokens": source, "src_lengths": None, "prev_output_tokens": previous}
    return {"net_input": inputs, "target": target, "ntokens": target.numel()}


def our_step(shape: Shape, bf16: bool) -> Step:
    model, criterion = our_model(shape)
    model.train()
    optimizer = Adam(
        model.parameters(), AdamConfig(adam_betas=(0.9, 0.98), weight_decay=1e-4), lr=LR
    )
    precision = make_precision(CommonConfig(bf16=bf16), torch.device("cpu"))

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with precision.autocast():
            loss, sample_size, _ = criterion(model, sample_of(batch))
        loss.backward()
        optimizer.scale_gradients(1.0 / sample_size)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.clip(norm, 1.0)
        optimizer.step()

    return step


def plain_step(shape: Shape) -> Step:
    model = PlainTransformer(shape).train()
    optimizer = LoopAdam(list(model.parameters()), LR, 1e-4)

    def step(batch: Batch) -> None:
        source, previous, target = batch
        smoothed_loss(model(source, previous), target, EPSILON, shape.pad).backward()
        optimizer.step(1.0 / target.numel(), 1.0)

    return step


def make_batches(count: int, shape: Shape, sentences: int, length: int) -> list[Batch]:
    """Random tokens, no padding: both sides do the same work."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, shape.vocabulary, (count, 2, sentences, length), generator=generator)
    return [(source, target.roll(1, 1), target) for source, target in ids]


def check_same(shape: Shape) -> None:
    """Copy the weights of a small model of ours into a plain one and compare the losses."""
    shape = replace(shape, vocabulary=100, width=32, inner=48, layers=2, dropout=0.0)
    ours, criterion = our_model(shape)
    plain = PlainTransformer(shape)
    plain.embed.weight = ours.encoder.embed_tokens.weight
    for mine, theirs in ((plain.encoder, ours.encoder), (plain.decoder, ours.decoder)):
        for a, b in zip(mine, theirs.layers, strict=True):
            b = dict(b.named_children())
            names = ["self_attn_layer_norm", "final_layer_norm"]
            a.self_attn.load_state_dict(b["self_attn"].state_dict())
            if a.cross_attn is not None:
                names.insert(1, "encoder_attn_layer_norm")
                a.cross_attn.load_state_dict(b["encoder_attn"].state_dict())
            a.fc1.load_state_dict(b["fc1"].state_dict())
            a.fc2.load_state_dict(b["fc2"].state_dict())
            for norm, name in zip(a.norms, names, strict=True):
                norm.load_state_dict(b[name].state_dict())
    (batch,) = make_batches(1, shape, 4, 7)
    with torch.no_grad():
        got = float(criterion(ours, sample_of(batch))[0])
        expected = float(smoothed_loss(plain(*batch[:2]), batch[2], EPSILON, shape.pad))
    if not math.isclose(got, expected, rel_tol=1e-5):
        raise SystemExit(f"the contestants differ: loss {got} and {expected}")


def contestant(
    kind: str, threads: int, rounds: int, sentences: int, length: int
) -> Callable[[], tuple[float, float]]:
    """One step after another on the same batches; returns its wall and CPU seconds."""
    torch.set_num_threads(threads)
    shape = Shape()
    if kind == "plain fp32":
        step = plain_step(shape)
    else:
        keep_freed_memory()
        step = our_step(shape, bf16=kind == "ours bf16")
    batches = iter(make_batches(rounds + 1, shape, sentences, length))

    def run() -> tuple[float, float]:
        batch = next(batches)
        wall, work = time.perf_counter(), time.process_time()
        step(batch)
        return time.perf_counter() - wall, time.process_time() - work

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=128)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", help="contestants to run")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = Shape()
    check_same(shape)
    kinds = [kind for kind in KINDS if not args.only or kind in args.only]
    # Apart, since how `flite-train` sets the allocator would help the plain step as well.
    steps = {
        kind: Apart(contestant, kind, args.threads, args.rounds, args.sentences, args.length)
        for kind in kinds
    }
    found = answers(steps, args.rounds)
    tokens = args.sentences * args.length
    speeds = {name: [tokens / wall for wall, _ in times] for name, times in found.items()}
    first = next(iter(steps))
    rows = {
        name: {
            "tokens_per_second": round(statistics.median(speeds[name]), 1),
            "times_first": ratios(speeds[name], speeds[first])["median"],
            "cpu_seconds_per_step": round(min(work for _, work in found[name]), 3),
        }
        for name in steps
    }
    for name, row in rows.items():
        print(
            f"{name:12s} {row['tokens_per_second']:8.0f} target tokens/s  "
            f"{row['times_first']:5.2f} x {first}  {row['cpu_seconds_per_step']:7.3f} CPU s a step"
        )
    about = {"shape": asdict(shape), "batch": [args.sentences, args.length], "rounds": args.rounds}
    record({"machine": machine(args.threads), **about, "results": rows}, args.out)


if __name__ == "__main__":
    main()
