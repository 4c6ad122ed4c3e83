"""Training speed, side by side: fairseq-lite against peers, same sizes, same token ids, one run.

    pip install transformers joeynmt importlib_metadata
    python -m benchmarks.training.compare --rounds 5 --out benchmarks/results/training.json

Every contestant trains transformer_iwslt_de_en's shape with Adam, dropout 0.1, label smoothing 0.1
and clipping, on the same batches. Contestants take turns batch by batch, so that a machine whose
speed drifts slows them all alike; what is quoted is the median over rounds of the ratio of target
tokens per second within a round. A peer that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.timing import machine, record
from benchmarks.training.peers import (
    EOS,
    PAD,
    Batch,
    Shape,
    Step,
    joeynmt_step,
    make_batches,
    transformers_step,
)
from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import CommonConfig
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.optim.precision import make_precision


def fairseq_lite_step(shape: Shape, bf16: bool = False) -> Step:
    """Our own model, criterion, optimizer and precision, in the trainer's order."""
    registries = load_builtins()
    dictionary = Dictionary()
    for i in range(shape.vocab - len(dictionary)):
        dictionary.add_symbol(f"t{i}")
    task = SimpleNamespace(
        source_dictionary=dictionary,
        target_dictionary=dictionary,
        cfg=SimpleNamespace(max_source_positions=1024, max_target_positions=1024),
        max_positions=lambda: (1024, 1024),
    )
    arch = registries["model"].get("transformer_iwslt_de_en")
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("embed_dim", shape.dim),
            ("ffn_embed_dim", shape.ffn),
            ("attention_heads", shape.heads),
            ("layers", shape.layers),
        )
    }
    config = arch.config(**{**sizes, "dropout": shape.dropout, "share_all_embeddings": True})
    torch.manual_seed(1)
    model = arch.factory.build(config, task).train()
    loss = registries["criterion"].get("label_smoothed_cross_entropy")
    criterion = loss.factory(loss.config(label_smoothing=shape.smoothing), task, sentence_avg=False)
    adam = registries["optimizer"].get("adam")
    optimizer = adam.factory(model.parameters(), adam.config(adam_betas=(0.9, 0.98)), lr=shape.lr)
    precision = make_precision(CommonConfig(bf16=bf16), torch.device("cpu"))

    def step(batch: Batch) -> None:
        sample = {
            "id": torch.arange(len(batch.source)),
            "nsentences": len(batch.source),
            "ntokens": batch.ntokens,
            "net_input": {
                "src_tokens": batch.source,
                "src_lengths": (batch.source != PAD).sum(1),
                "prev_output_tokens": batch.decoder_input,
            },
            "target": batch.target,
        }
        optimizer.zero_grad()
        with precision.autocast():
            total, sample_size, _ = criterion(model, sample)
        total.backward()
        optimizer.scale_gradients(1.0 / sample_size)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        optimizer.clip(float(norm) / sample_size, 1.0)
        optimizer.step()

    return step


def _plain_step(shape: Shape, bf16: bool = False) -> Step:
    """PyTorch's own nn.Transformer: what a careful user writes without a toolkit."""
    torch.manual_seed(1)
    embed = torch.nn.Embedding(shape.vocab, shape.dim, padding_idx=PAD)
    torch.nn.init.normal_(embed.weight, std=shape.dim**-0.5)
    net = torch.nn.Transformer(
        shape.dim,
        shape.heads,
        shape.layers,
        shape.layers,
        shape.ffn,
        shape.dropout,
        batch_first=True,
    ).train()
    params = [*embed.parameters(), *net.parameters()]
    optimizer = torch.optim.Adam(params, lr=shape.lr, betas=(0.9, 0.98))
    loss_of = torch.nn.CrossEntropyLoss(ignore_index=PAD, label_smoothing=shape.smoothing)
    causal = torch.nn.Transformer.generate_square_subsequent_mask

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            source_pad = batch.source == PAD
            out = net(
                embed(batch.source) * shape.dim**0.5,
                embed(batch.decoder_input) * shape.dim**0.5,
                tgt_mask=causal(batch.target.size(1)) < 0,
                src_key_padding_mask=source_pad,
                memory_key_padding_mask=source_pad,
                tgt_is_causal=True,
            )
            logits = torch.nn.functional.linear(out, embed.weight)
            loss = loss_of(logits.view(-1, shape.vocab), batch.target.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


CONTESTANTS: dict[str, tuple[Callable[..., Step], bool]] = {
    "fairseq-lite fp32": (fairseq_lite_step, False),
    "transformers fp32": (transformers_step, False),
    "joeynmt fp32": (joeynmt_step, False),
    "nn.Transformer fp32": (_plain_step, False),
    "fairseq-lite bf16": (fairseq_lite_step, True),
    "transformers bf16": (transformers_step, True),
    "joeynmt bf16": (joeynmt_step, True),
}


def measure(rounds: int, batches: list[Batch], shape: Shape, only: str) -> dict[str, list[float]]:
    """Target tokens per second of every contestant in every round."""
    steps: dict[str, Step] = {}
    for name, (build, bf16) in CONTESTANTS.items():
        if only and only not in name:
            continue
        try:
            steps[name] = build(shape, bf16)
            steps[name](batches[0])  # warm-up
        except ImportError as e:
            print(f"left out: {name}: {e}")
            steps.pop(name, None)
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        spent = dict.fromkeys(steps, 0.0)
        for batch in batches:
            for name, step in steps.items():
                start = time.perf_counter()
                step(batch)
                spent[name] += time.perf_counter() - start
        tokens = sum(b.ntokens for b in batches)
        for name, seconds in spent.items():
            speeds[name].append(tokens / seconds)
        print(f"round {index + 1}: " + ", ".join(f"{n} {v[-1]:.0f}" for n, v in speeds.items()))
    return speeds


def report(speeds: dict[str, list[float]]) -> dict[str, object]:
    """Medians, and ours over each other contestant of the same precision, round by round."""
    table: dict[str, object] = {
        "tokens_per_second": {n: round(statistics.median(v), 1) for n, v in speeds.items()}
    }
    ratios: dict[str, float] = {}
    for name, values in speeds.items():
        ours = speeds.get("fairseq-lite " + name.split()[-1])
        if ours and not name.startswith("fairseq-lite"):
            pairs = [a / b for a, b in zip(ours, values, strict=True)]
            ratios[f"fairseq-lite / {name}"] = round(statistics.median(pairs), 3)
    plain, fast = speeds.get("nn.Transformer fp32"), speeds.get("fairseq-lite bf16")
    if plain and fast:
        pairs = [a / b for a, b in zip(fast, plain, strict=True)]
        ratios["fairseq-lite bf16 / nn.Transformer fp32"] = round(statistics.median(pairs), 3)
    table["ratios"] = ratios
    return table


def main() -> None:
    """Run, print, and write the result where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="contestants whose name contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = Shape()
    batches = make_batches(args.batches, shape, args.sentences)
    assert all((b.target == EOS).any() for b in batches)
    result = report(measure(args.rounds, batches, shape, args.only))
    record({"machine": machine(args.threads), **result}, args.out)


if __name__ == "__main__":
    main()
