"""Tiny causal models of Hugging Face's with random weights, and a tokenizer of bytes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.few_shot import WORDS

VOCABULARY = 300
END = "<|end|>"

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 2}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}
# Name of the class of its configuration, and what is small in it.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_positions": 512, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("LlamaConfig", {**_GROUPED, "max_position_embeddings": 512}),
    # Looks back six tokens only, in every second layer.
    "sliding": ("Gemma2Config", {**_GROUPED, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    # Distances instead of positions.
    "alibi": ("BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    # Has no keys and values to remember.
    "state_space": ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
}


def tokenizer(*, begins: bool = False) -> Any:
    """A byte-level tokenizer that has learned a few merges.

    Args:
        begins: it puts the end symbol in front of every text.
    """
    transformers = _transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([" ".join(WORDS) + " Question: Answer:"], trainer)
    if begins:
        found.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", special_tokens=[(END, found.token_to_id(END))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token=END)


@functools.cache
def tiny_model(architecture: str = "llama", seed: int = 1) -> Any:
    """A model with random weights; large ones, so that what it reads matters."""
    transformers = _transformers()
    import torch

    name, sizes = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=None, **sizes
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # A state space's rates are exponents already.
            if parameter.dim() > 1 and key.endswith("weight") and "dt_proj" not in key:
                parameter.mul_(4)
    return model


def save(folder: Path, architecture: str = "llama", **options: bool) -> Path:
    """A folder as Hugging Face has them."""
    tiny_model(architecture).save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return folder


def _transformers() -> Any:
    return pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install -e '.[huggingface]'"
    )
