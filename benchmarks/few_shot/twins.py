"""A checkpoint of ours and a model of Hugging Face's with the same weights and the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

START = "</s>"
# Ours begin with <s>, <pad>, </s> and <unk>; a piece's number is moved up by so many.
_SPECIALS = 4


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50_000
    length: int = 2048

    @classmethod
    def of(cls, text: str) -> Shape:
        """`12x768`: layers and width; heads are 64 wide."""
        layers, width = map(int, text.split("x"))
        return cls(layers, width, max(1, width // 64))


def make(folder: Path, shape: Shape, texts: Iterable[str]) -> Path:
    """Learn a byte-level BPE from texts and train a model on a few tokens of them.

    Args:
        folder: for all files; what is there is kept.
        shape: of the model. Of its vocabulary the texts may need less.
        texts: whose words are to be pieces.

    Returns:
        The checkpoint.
    """
    path = folder / "checkpoint_last.pt"
    if path.exists():
        return path
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    lines = list(texts)
    bpe = ByteLevelBPETokenizer()
    pieces = shape.vocabulary - _SPECIALS
    bpe.train_from_iterator(lines, vocab_size=pieces, min_frequency=1, show_progress=False)
    bpe.save_model(str(folder))
    (folder / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(pieces)), encoding="utf-8")
    numbers = [" ".join(map(str, bpe.encode(line).ids)) for line in lines[:20]]
    (folder / "text").write_text("\n".join(numbers) + "\n", encoding="utf-8")
    words: list[object] = ["--only-source", "--srcdict", folder / "dict.txt"]
    words += ["--trainpref", folder / "text", "--destdir", folder / "data"]
    _run("preprocess", words)
    words = [folder / "data", "--task", "language_modeling", "--arch", "transformer_lm_gpt3_small"]
    words += ["--decoder-layers", shape.layers, "--decoder-attention-heads", shape.heads]
    words += ["--decoder-embed-dim", shape.width, "--decoder-ffn-embed-dim", 4 * shape.width]
    words += ["--decoder-input-dim", shape.width, "--decoder-output-dim", shape.width]
    words += ["--no-scale-embedding", "--tokens-per-sample", shape.length, "--max-tokens", 4096]
    words += ["--optimizer", "adam", "--lr", 1e-3, "--max-update", 1, "--cpu"]
    words += ["--disable-validation", "--no-save-optimizer-state", "--save-dir", folder]
    words += ["--bpe", "hf_byte_bpe", "--bpe-merges", folder / "merges.txt"]
    words += ["--bpe-vocab", folder / "vocab.json"]
    _run("train", words)
    return path


def _run(command: str, words: list[object]) -> None:
    call = [sys.executable, "-m", f"fairseq_lite_cli.{command}", *map(str, words)]
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def twin(checkpoint: Path, shape: Shape) -> tuple[Any, Any]:
    """The checkpoint as a GPT-2 of Hugging Face's, and its tokenizer, which begins texts as ours.

    Args:
        checkpoint: what `make` returned.
        shape: of it.
    """
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from fairseq_lite import hub

    lm = hub.load(checkpoint, device="cpu")
    assert isinstance(lm, hub.LanguageModel)
    (ours,) = lm.models
    start = shape.vocabulary - _SPECIALS
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu",
        bos_token_id=start,
        eos_token_id=start,
    )
    model = GPT2LMHeadModel(config).eval()
    _copy(ours.state_dict(), model.transformer, lm.dictionary.eos())
    names = [str(checkpoint.parent / name) for name in ("vocab.json", "merges.txt")]
    bpe = ByteLevelBPETokenizer(*names)
    known = len(json.loads(Path(names[0]).read_text(encoding="utf-8")))
    # Numbers that no piece has, so that the start symbol's is where it should be.
    bpe.add_tokens([f"<unused{i}>" for i in range(known, start)])
    bpe.add_special_tokens([START])
    assert bpe.token_to_id(START) == start
    bpe._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, start)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=START, eos_token=START, pad_token=START
    )
    return model, tokenizer


def _copy(state: dict[str, Tensor], theirs: Any, eos: int) -> None:
    """Give GPT-2 the weights of ours."""
    with torch.no_grad():
        embed = state["decoder.embed_tokens.weight"]
        # Pieces come first there, then the end symbol.
        order = [*range(_SPECIALS, len(embed)), eos, 0, 1, 3]
        theirs.wte.weight.copy_(embed[order])
        positions = state["decoder.embed_positions.weight"]
        theirs.wpe.weight.copy_(positions[len(positions) - len(theirs.wpe.weight) :])
        for i, layer in enumerate(theirs.h):
            at = f"decoder.layers.{i}."
            for kind in ("weight", "bias"):
                parts = [state[f"{at}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                _fill(layer.attn.c_attn, kind, torch.cat(parts))
                _fill(layer.attn.c_proj, kind, state[f"{at}self_attn.out_proj.{kind}"])
                _fill(layer.mlp.c_fc, kind, state[f"{at}fc1.{kind}"])
                _fill(layer.mlp.c_proj, kind, state[f"{at}fc2.{kind}"])
                getattr(layer.ln_1, kind).copy_(state[f"{at}self_attn_layer_norm.{kind}"])
                getattr(layer.ln_2, kind).copy_(state[f"{at}final_layer_norm.{kind}"])
        for kind in ("weight", "bias"):
            getattr(theirs.ln_f, kind).copy_(state[f"decoder.layer_norm.{kind}"])


def _fill(layer: Any, kind: str, value: Tensor) -> None:
    """GPT-2's layers hold their matrices the other way round."""
    getattr(layer, kind).copy_(value.T if kind == "weight" else value)
