"""One training step of a peer toolkit as a function: the same sizes, the same token ids.

Each `*_step(shape)` builds the peer's own model, loss and optimizer through its public API and
returns a function from a `Batch` to None that does what its trainer does for one update: forward,
label-smoothed loss, backward, clipping at norm 1, optimizer step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PAD, EOS = 1, 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of the model and of the batches; the default is transformer_iwslt_de_en's."""

    vocab: int = 10_000
    dim: int = 512
    ffn: int = 1024
    heads: int = 4
    layers: int = 6
    dropout: float = 0.1
    smoothing: float = 0.1
    lr: float = 5e-4


@dataclasses.dataclass(frozen=True)
class Batch:
    """Token ids: source (B, S) and target (B, T) padded on the right, the target ending in eos."""

    source: Tensor
    target: Tensor
    ntokens: int

    @property
    def decoder_input(self) -> Tensor:
        """The target moved right, eos in front, pads kept: (B, T)."""
        shifted = self.target.roll(1, dims=1)
        shifted[:, 0] = EOS
        return shifted.masked_fill(self.target == PAD, PAD)


def make_batches(count: int, shape: Shape, sentences: int = 128, mean: int = 26) -> list[Batch]:
    """Batches of uneven lengths, as bucketed batches of real text have."""
    generator = torch.Generator().manual_seed(1)

    def side(longest: int) -> Tensor:
        ids = torch.randint(4, shape.vocab, (sentences, longest), generator=generator)
        cut = torch.randint(max(2, longest - 4), longest + 1, (sentences,), generator=generator)
        cut[0] = longest
        place = torch.arange(longest).expand(sentences, longest)
        ids = ids.masked_fill(place == (cut - 1)[:, None], EOS)
        return ids.masked_fill(place >= cut[:, None], PAD)

    batches = []
    for i in range(count):
        source, target = side(mean + i % 7), side(mean + (i + 3) % 7)
        batches.append(Batch(source, target, int((target != PAD).sum())))
    return batches


Step = Callable[[Batch], None]


def transformers_step(shape: Shape, bf16: bool = False) -> Step:
    """Hugging Face transformers: MarianMT from a config, AdamW as its Trainer sets it up."""
    from transformers import MarianConfig, MarianMTModel

    sizes: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = shape.layers
        sizes[f"{side}_attention_heads"] = shape.heads
        sizes[f"{side}_ffn_dim"] = shape.ffn
    config = MarianConfig(
        vocab_size=shape.vocab,
        d_model=shape.dim,
        dropout=shape.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        activation_function="relu",
        max_position_embeddings=1024,
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        **sizes,
    )
    torch.manual_seed(1)
    model = MarianMTModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.lr, betas=(0.9, 0.98), fused=True)
    loss_of = torch.nn.CrossEntropyLoss(ignore_index=PAD, label_smoothing=shape.smoothing)

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(
                input_ids=batch.source,
                attention_mask=(batch.source != PAD).long(),
                decoder_input_ids=batch.decoder_input,
                use_cache=False,
            ).logits
            loss = loss_of(logits.view(-1, shape.vocab), batch.target.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def joeynmt_step(shape: Shape, bf16: bool = False) -> Step:
    """JoeyNMT: its build_model, its XentLoss, its optimizer builder and its clipper."""
    from joeynmt.builders import build_gradient_clipper, build_optimizer
    from joeynmt.model import build_model
    from joeynmt.vocabulary import Vocabulary

    specials = SimpleNamespace(
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        sep_token=None,
        unk_id=0,
        pad_id=PAD,
        bos_id=2,  # its order of specials is fixed; which id ends a sentence costs nothing
        eos_id=3,
        sep_id=None,
        lang_tags=[],
    )
    vocabulary = Vocabulary([f"t{i}" for i in range(shape.vocab - 4)], specials)
    side = {
        "type": "transformer",
        "num_layers": shape.layers,
        "num_heads": shape.heads,
        "embeddings": {"embedding_dim": shape.dim, "scale": True, "dropout": shape.dropout},
        "hidden_size": shape.dim,
        "ff_size": shape.ffn,
        "dropout": shape.dropout,
        "layer_norm": "post",
    }
    torch.manual_seed(1)
    model = build_model(
        {
            "encoder": dict(side),
            "decoder": dict(side),
            "tied_embeddings": True,
            "tied_softmax": True,
            "initializer": "xavier_uniform",
            "embed_initializer": "xavier_uniform",
        },
        src_vocab=vocabulary,
        trg_vocab=vocabulary,
    ).train()
    model.loss_function = ("crossentropy", shape.smoothing)
    optimizer = build_optimizer(
        {"optimizer": "adam", "learning_rate": shape.lr, "adam_betas": [0.9, 0.98]},
        parameters=model.parameters(),
    )
    clip = build_gradient_clipper({"clip_grad_norm": 1.0, "clip_grad_val": None})

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, *_ = model(
                return_type="loss",
                src=batch.source,
                src_length=(batch.source != PAD).sum(1),
                src_mask=(batch.source != PAD).unsqueeze(1),
                trg_input=batch.decoder_input,
                trg=batch.target,
                trg_mask=(batch.target != PAD).unsqueeze(1),
            )
        (loss / batch.ntokens).backward()
        clip(model.parameters())
        optimizer.step()
        optimizer.zero_grad()

    return step
