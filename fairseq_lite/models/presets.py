"""Named shapes of the transformer: data only, as fairseq resolves them.

A preset lists the decoder's widths even where they equal the encoder's: in fairseq too, changing
`--encoder-embed-dim` of a preset leaves its decoder as it is.
"""

from __future__ import annotations

from typing import Any

_BIG: dict[str, Any] = {
    "encoder_embed_dim": 1024,
    "encoder_ffn_embed_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_embed_dim": 1024,
    "decoder_ffn_embed_dim": 4096,
    "decoder_attention_heads": 16,
    "dropout": 0.3,
}

TRANSFORMER: dict[str, dict[str, Any]] = {
    "transformer_tiny": {
        "encoder_embed_dim": 64,
        "encoder_ffn_embed_dim": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_embed_dim": 64,
        "decoder_ffn_embed_dim": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
    },
    "transformer_iwslt_de_en": {
        "encoder_embed_dim": 512,
        "encoder_ffn_embed_dim": 1024,
        "encoder_attention_heads": 4,
        "decoder_embed_dim": 512,
        "decoder_ffn_embed_dim": 1024,
        "decoder_attention_heads": 4,
    },
    "transformer_wmt_en_de": {},
    "transformer_vaswani_wmt_en_de_big": _BIG,
    "transformer_vaswani_wmt_en_fr_big": {**_BIG, "dropout": 0.1},
    "transformer_wmt_en_de_big": {**_BIG, "attention_dropout": 0.1},
    "transformer_wmt_en_de_big_t2t": {
        **_BIG,
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
    },
}
