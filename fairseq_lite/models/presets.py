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

# All named language models normalise before each block, and their embeddings and output have the
# model's width.
_LM: dict[str, Any] = {
    "decoder_normalize_before": True,
    "decoder_input_dim": None,
    "decoder_output_dim": None,
}


def _lm(width: int, layers: int, heads: int, ffn: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        **_LM,
        "decoder_embed_dim": width,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
        "decoder_ffn_embed_dim": 4 * width if ffn is None else ffn,
        **more,
    }


_GPT2: dict[str, Any] = {"attention_dropout": 0.1, "activation_fn": "gelu"}
# The inner width is unset: it is four times whatever width is typed.
_GPT3: dict[str, Any] = {
    "decoder_ffn_embed_dim": None,
    "decoder_learned_pos": True,
    "share_decoder_input_output_embed": True,
    "activation_fn": "gelu",
    "dropout": 0.0,
}
_GBW = _lm(512, 12, 16, 4096, attention_dropout=0.1, no_decoder_final_norm=True)

TRANSFORMER_LM: dict[str, dict[str, Any]] = {
    "transformer_lm_big": _lm(1024, 12, 16),
    "transformer_lm_gbw": _GBW,
    "transformer_lm_baevski_gbw": _GBW,
    "transformer_lm_gpt": _lm(768, 12, 12, **_GPT2),
    "transformer_lm_gpt2_tiny": _lm(64, 2, 1, 64, **_GPT2),
    "transformer_lm_gpt2_small": _lm(1024, 24, 16, **_GPT2),
    "transformer_lm_gpt2_medium": _lm(1280, 36, 20, **_GPT2),
    "transformer_lm_gpt2_big": _lm(1600, 48, 25, **_GPT2),
    "transformer_lm_gpt2_big_wide": _lm(2048, 24, 32, **_GPT2),
    "transformer_lm_gpt2_bigger": _lm(2048, 48, 32, **_GPT2),
    "transformer_lm_gpt3_small": _lm(768, 12, 12, **_GPT3),
    "transformer_lm_gpt3_medium": _lm(1024, 24, 16, **_GPT3),
    "transformer_lm_gpt3_large": _lm(1536, 24, 16, **_GPT3),
    "transformer_lm_gpt3_xl": _lm(2048, 24, 32, **_GPT3),
    "transformer_lm_gpt3_2_7": _lm(2560, 32, 32, **_GPT3),
    "transformer_lm_gpt3_6_7": _lm(4096, 32, 32, **_GPT3),
    "transformer_lm_gpt3_13": _lm(5120, 40, 40, **_GPT3),
    "transformer_lm_gpt3_175": _lm(12288, 96, 96, **_GPT3),
}

# Names fairseq has whose models need adaptive embeddings and softmax -> what to use instead.
ADAPTIVE_LM = {
    "transformer_lm_wiki103": "transformer_lm_big",
    "transformer_lm_baevski_wiki103": "transformer_lm_big",
}
