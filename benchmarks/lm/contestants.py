"""The same model trained by flite-train's trainer and by Hugging Face's."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lm.plain import GPT, Mode, Shape, timed
from benchmarks.ours import begin
from benchmarks.random_text import data_folder
from benchmarks.timing import wait
from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.parallel.world import SingleWorld
from fairseq_lite.tasks.api import build_task
from fairseq_lite.training.allocator import keep_freed_memory


def command(shape: Shape, mode: Mode, data: Path) -> RunConfig:
    """flite-train's command line for a shape."""
    words: list[object] = [data, "--task", "language_modeling"]
    words += ["--arch", "transformer_lm_gpt3_small", "--decoder-embed-dim", shape.width]
    words += ["--decoder-layers", shape.layers, "--decoder-attention-heads", shape.heads]
    words += ["--tokens-per-sample", shape.length, "--batch-size", shape.batch]
    words += ["--required-batch-size-multiple", 1, "--optimizer", "adam", "--weight-decay", 0.01]
    words += ["--lr", 1e-4, "--clip-norm", 1.0, "--disable-validation", "--no-save"]
    flags = {"--bf16": mode.bf16, "--compile": mode.compile, "--cpu": mode.device == "cpu"}
    words += [name for name, on in flags.items() if on]
    return parse("flite-train", [str(word) for word in words], load_builtins())


def ours(shape: Shape, mode: Mode, updates: int, data: Path) -> Callable[[], float]:
    """Our trainer on our data folder: reading, batches, metrics and all."""
    if mode.device == "cpu":
        keep_freed_memory()  # as flite-train does
    run = command(shape, mode, data)
    task = build_task(run)
    task.load_dataset("train")
    trainer, batches = begin(run, SingleWorld(mode.device), task)
    return timed(lambda _: trainer.train_step([next(batches)]), shape, mode, updates)


def transformers(shape: Shape, mode: Mode, updates: int) -> Callable[[], float]:
    """Hugging Face's Trainer with GPT2LMHeadModel; times its updates after the first three."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers import logging as its_logging

    its_logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=2,
        eos_token_id=2,
    )
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config)
    texts = torch.randint(4, shape.vocabulary, (8 * shape.batch, shape.length))
    examples = [{"input_ids": text, "labels": text} for text in texts]

    class Clock(TrainerCallback):
        start = 0.0
        seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (3, 3 + updates):
                wait(mode.device)
            if state.global_step == 3:
                self.start = time.perf_counter()
            if state.global_step == 3 + updates:
                self.seconds = time.perf_counter() - self.start

    def run() -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=3 + updates,
                per_device_train_batch_size=shape.batch,
                learning_rate=1e-4,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                bf16=mode.bf16,
                torch_compile=mode.compile,
                use_cpu=mode.device == "cpu",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_steps=10**9,
            )
            Trainer(model, arguments, train_dataset=examples, callbacks=[clock]).train()
        return updates * shape.batch * shape.length / clock.seconds

    return run


def same_losses() -> dict[str, float]:
    """The loss of a small model with the same weights: ours, and the plain one's.

    Raises:
        AssertionError: they differ.
    """
    shape = Shape(vocabulary=104, width=32, layers=2, heads=2, length=16, batch=3)
    with tempfile.TemporaryDirectory() as folder:
        run = command(shape, Mode(), data_folder(Path(folder), shape.vocabulary, 2000))
        task = build_task(run)
        task.load_dataset("train")
        trainer, batches = begin(run, SingleWorld("cpu"), task)
    plain = GPT(shape)
    copy_weights(trainer.model.state_dict(), plain)
    sample = next(batches)
    assert sample is not None
    with torch.no_grad():
        loss, size, _ = trainer.criterion(trainer.model, sample)
        theirs = plain(sample["net_input"]["src_tokens"], sample["target"])
    losses = {"ours": float(loss) / size, "plain": float(theirs)}
    assert math.isclose(losses["ours"], losses["plain"], rel_tol=1e-5), losses
    return losses


def copy_weights(state: dict[str, Tensor], plain: GPT) -> None:
    """Give the plain model the weights of ours."""
    names = {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("out_proj",)}
    with torch.no_grad():
        plain.embed.weight.copy_(state["decoder.embed_tokens.weight"])
        positions = state["decoder.embed_positions.weight"]
        plain.positions.copy_(positions[len(positions) - len(plain.positions) :])  # after the pad's
        for i, layer in enumerate(plain.layers):
            at = f"decoder.layers.{i}"
            for kind in ("weight", "bias"):
                for name, parts in names.items():
                    whole = torch.cat([state[f"{at}.self_attn.{part}.{kind}"] for part in parts])
                    getattr(getattr(layer, name), kind).copy_(whole)
                for name, other in (
                    ("norm1", "self_attn_layer_norm"),
                    ("norm2", "final_layer_norm"),
                    ("fc1", "fc1"),
                    ("fc2", "fc2"),
                ):
                    getattr(getattr(layer, name), kind).copy_(state[f"{at}.{other}.{kind}"])
        plain.norm.weight.copy_(state["decoder.layer_norm.weight"])
        plain.norm.bias.copy_(state["decoder.layer_norm.bias"])
