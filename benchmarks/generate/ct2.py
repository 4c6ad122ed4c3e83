"""Our weights as a CTranslate2 model, through its Python specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ctranslate2.specs.transformer_spec import TransformerSpec
from torch import nn

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.models.transformer import TransformerModel


def convert(model: TransformerModel, dictionary: Dictionary, folder: Path) -> None:
    """Write `model` (post-norm, one dictionary, sinusoidal positions) to `folder`."""
    cfg = model.cfg
    spec = TransformerSpec.from_config(
        (cfg.encoder_layers, len(model.decoder.layers)),
        cfg.encoder_attention_heads,
        pre_norm=False,
    )
    for part, stack in ((spec.encoder, model.encoder), (spec.decoder, model.decoder)):
        embeddings = part.embeddings[0] if isinstance(part.embeddings, list) else part.embeddings
        embeddings.weight = _array(stack.embed_tokens.weight)
        # Row 0 of theirs is the first position; ours are counted from after the padding symbol.
        positions = stack.embed_positions.weights[dictionary.pad() + 1 :]
        part.position_encodings.encodings = _array(positions)
        for theirs, ours in zip(part.layer, stack.layers, strict=True):
            _attention(theirs.self_attention, ours.self_attn, ours.self_attn_layer_norm)
            if stack is model.decoder:
                _attention(theirs.attention, ours.encoder_attn, ours.encoder_attn_layer_norm, True)
            _norm(theirs.ffn.layer_norm, ours.final_layer_norm)
            _linear(theirs.ffn.linear_0, ours.fc1)
            _linear(theirs.ffn.linear_1, ours.fc2)
    spec.decoder.projection.weight = _array(model.decoder.output_projection.weight)
    symbols = [dictionary[i] for i in range(len(dictionary))]
    spec.register_source_vocabulary(symbols)
    spec.register_target_vocabulary(symbols)
    spec.config.bos_token = spec.config.eos_token = spec.config.decoder_start_token = "</s>"
    spec.config.unk_token = "<unk>"
    spec.validate()
    spec.optimize()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().float().contiguous().numpy()


def _norm(theirs: Any, ours: nn.LayerNorm) -> None:
    theirs.gamma, theirs.beta = _array(ours.weight), _array(ours.bias)


def _linear(theirs: Any, *ours: nn.Linear) -> None:
    theirs.weight = _array(torch.cat([each.weight for each in ours]))
    theirs.bias = _array(torch.cat([each.bias for each in ours]))


def _attention(theirs: Any, ours: Any, norm: nn.LayerNorm, cross: bool = False) -> None:
    _norm(theirs.layer_norm, norm)
    if cross:
        _linear(theirs.linear[0], ours.q_proj)
        _linear(theirs.linear[1], ours.k_proj, ours.v_proj)
    else:
        _linear(theirs.linear[0], ours.q_proj, ours.k_proj, ours.v_proj)
    _linear(theirs.linear[-1], ours.out_proj)
