"""The flags of the transformer, and the shape of one stack of layers.

`TransformerConfig` is what the user sets, field for field fairseq's. A decoder field left unset
follows the encoder's, exactly where fairseq's does: embedding and inner widths, and the output
width the decoder's own. `StackConfig` is what one stack is built from; an encoder, a decoder and a
decoder-only model each derive theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.moe.flags import MoEConfig, StackFlags
from fairseq_lite.moe.options import MoEOptions

Activation = Literal["gelu", "gelu_accurate", "gelu_fast", "linear", "relu", "tanh"]


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """One stack of transformer layers.

    Attributes:
        embed_dim: D, width of the states.
        input_dim: width of the embeddings; projected to D where it differs.
        output_dim: width before the output projection; projected from D where it differs.
        encoder_dim: width of the states cross-attention reads; None for a stack without it.
        scale_attn, scale_fc, scale_heads, scale_resids: NormFormer's additions (Shleifer et al.
            2021), in decoder layers only; see `TransformerDecoderLayer`.
        moe: the experts of the layers that have some; None for a dense stack.
        alternate: N and the inner width of every N-th layer, where it is not `ffn_embed_dim`.
    """

    embed_dim: int
    ffn_embed_dim: int
    layers: int
    attention_heads: int
    input_dim: int
    output_dim: int
    encoder_dim: int | None
    normalize_before: bool
    final_norm: bool
    learned_pos: bool
    layerdrop: float
    dropout: float
    attention_dropout: float
    activation_dropout: float
    activation_fn: Activation
    positions: bool
    scale_embedding: bool
    layernorm_embedding: bool
    checkpoint_activations: bool
    offload_activations: bool
    min_params_to_wrap: int
    scale_attn: bool = False
    scale_fc: bool = False
    scale_heads: bool = False
    scale_resids: bool = False
    moe: MoEOptions | None = None
    alternate: tuple[int, int] | None = None

    def for_layer(self, index: int) -> StackConfig:
        """What layer `index`, from 0, is built from: without `moe` where it has no experts."""
        cfg = self
        if self.alternate is not None and (index + 1) % self.alternate[0] == 0:
            cfg = dataclasses.replace(cfg, ffn_embed_dim=self.alternate[1])
        if self.moe is not None and not self.moe.has_experts(index):
            cfg = dataclasses.replace(cfg, moe=None)
        return cfg


@dataclasses.dataclass(frozen=True)
class TransformerConfig(MoEConfig):
    """The encoder-decoder transformer (Vaswani et al. 2017)."""

    activation_fn: Activation = flag("relu", "activation of the feed-forward blocks")
    dropout: float = flag(0.1, "probability of dropping an element of a block's output")
    attention_dropout: float = flag(0.0, "probability of dropping an attention weight")
    activation_dropout: float = flag(
        0.0, "probability of dropping an element after the activation", aliases=["--relu-dropout"]
    )
    encoder_embed_dim: int = flag(512, "width of the encoder")
    encoder_ffn_embed_dim: int = flag(2048, "inner width of the encoder's feed-forward blocks")
    encoder_layers: int = flag(6, "number of encoder layers")
    encoder_attention_heads: int = flag(8, "attention heads in an encoder layer")
    encoder_normalize_before: bool = flag(
        False, "normalise before each encoder block and once at the end, not after each block"
    )
    encoder_learned_pos: bool = flag(False, "learn the encoder's positions (default: sinusoidal)")
    encoder_layerdrop: float = flag(0.0, "probability of leaving out an encoder layer in training")
    encoder_layers_to_keep: tuple[int, ...] | None = flag(
        None, "encoder layers to keep when loading a deeper checkpoint, for example 0,2,4"
    )
    decoder_embed_dim: int | None = flag(None, "width of the decoder (default: the encoder's)")
    decoder_ffn_embed_dim: int | None = flag(
        None, "inner width of the decoder's feed-forward blocks (default: the encoder's)"
    )
    decoder_layers: int = flag(6, "number of decoder layers")
    decoder_attention_heads: int = flag(8, "attention heads in a decoder layer")
    decoder_normalize_before: bool = flag(
        False, "normalise before each decoder block and once at the end, not after each block"
    )
    decoder_learned_pos: bool = flag(False, "learn the decoder's positions (default: sinusoidal)")
    decoder_layerdrop: float = flag(0.0, "probability of leaving out a decoder layer in training")
    decoder_layers_to_keep: tuple[int, ...] | None = flag(
        None, "decoder layers to keep when loading a deeper checkpoint, for example 0,2,4"
    )
    decoder_output_dim: int | None = flag(
        None, "width before the output projection (default: the decoder's)"
    )
    share_decoder_input_output_embed: bool = flag(
        False, "one matrix for the decoder's embeddings and the output projection"
    )
    share_all_embeddings: bool = flag(
        False,
        "one matrix for the encoder's and decoder's embeddings and the output projection"
        " (needs a joined dictionary)",
    )
    no_token_positional_embeddings: bool = flag(False, "do without positions")
    no_scale_embedding: bool = flag(False, "do not multiply embeddings by sqrt(width)")
    layernorm_embedding: bool = flag(False, "normalise the embeddings")
    no_decoder_final_norm: bool = flag(
        False, "no normalisation after the last layer of a --decoder-normalize-before decoder"
    )
    checkpoint_activations: bool = flag(
        False, "keep only each layer's input and compute the rest again in the backward pass"
    )
    offload_activations: bool = flag(
        False, "as --checkpoint-activations, and keep the inputs in host memory"
    )
    min_params_to_wrap: int = flag(
        int(1e8), "--ddp-backend fully_sharded wraps only layers with at least this many parameters"
    )
    encoder_moe_freq: int = flag(0, "as --moe-freq, for the encoder's layers")
    alternate_ffn_embed_dim: int = flag(
        0, "as --alternate-decoder-ffn-embed-dim, for the encoder's layers"
    )

    def __post_init__(self) -> None:
        check_heads("encoder", self.encoder_embed_dim, self.encoder_attention_heads)
        check_heads("decoder", self.decoder_dim, self.decoder_attention_heads)
        check_probabilities(self, "dropout", "attention_dropout", "activation_dropout")
        check_probabilities(self, "encoder_layerdrop", "decoder_layerdrop")
        check_depth("encoder", self.encoder_layers, self.encoder_layers_to_keep)
        check_depth("decoder", self.decoder_layers, self.decoder_layers_to_keep)
        if self.share_all_embeddings and self.encoder_embed_dim != self.decoder_dim:
            raise ConfigError(
                f"--share-all-embeddings needs equal widths: --encoder-embed-dim"
                f" {self.encoder_embed_dim} and --decoder-embed-dim {self.decoder_dim}"
            )
        if self.shares_output and self.decoder_out_dim != self.decoder_dim:
            raise ConfigError(
                f"--decoder-output-dim {self.decoder_out_dim} must equal --decoder-embed-dim"
                f" {self.decoder_dim} when the output projection shares the embeddings"
            )
        self.check_experts()

    def stacks(self) -> Mapping[str, StackFlags]:
        encoder = StackFlags(
            layers=self.encoder_layers,
            freq=self.encoder_moe_freq,
            layerdrop=self.encoder_layerdrop,
            keeps_some=bool(self.encoder_layers_to_keep),
            alternate_flag="--alternate-ffn-embed-dim",
            alternate_width=self.alternate_ffn_embed_dim,
        )
        return {"encoder": encoder, "decoder": decoder_flags(self)}

    @property
    def decoder_dim(self) -> int:
        """The decoder's width, resolved."""
        return self.encoder_embed_dim if self.decoder_embed_dim is None else self.decoder_embed_dim

    @property
    def decoder_out_dim(self) -> int:
        """The width before the output projection, resolved."""
        return self.decoder_dim if self.decoder_output_dim is None else self.decoder_output_dim

    @property
    def shares_output(self) -> bool:
        """Whether the output projection is the decoder's embedding matrix."""
        return self.share_all_embeddings or self.share_decoder_input_output_embed

    def resolved(self) -> TransformerConfig:
        """This config with every field that follows another one filled in."""
        ffn = self.decoder_ffn_embed_dim
        return dataclasses.replace(
            self,
            encoder_layers=depth(self.encoder_layers, self.encoder_layers_to_keep),
            decoder_layers=depth(self.decoder_layers, self.decoder_layers_to_keep),
            decoder_embed_dim=self.decoder_dim,
            decoder_ffn_embed_dim=self.encoder_ffn_embed_dim if ffn is None else ffn,
            decoder_output_dim=self.decoder_out_dim,
            share_decoder_input_output_embed=self.shares_output,
            checkpoint_activations=self.checkpoint_activations or self.offload_activations,
        )

    def encoder_stack(self) -> StackConfig:
        """What the encoder is built from."""
        cfg = self.resolved()
        return StackConfig(
            embed_dim=cfg.encoder_embed_dim,
            ffn_embed_dim=cfg.encoder_ffn_embed_dim,
            layers=cfg.encoder_layers,
            attention_heads=cfg.encoder_attention_heads,
            input_dim=cfg.encoder_embed_dim,
            output_dim=cfg.encoder_embed_dim,
            encoder_dim=None,
            normalize_before=cfg.encoder_normalize_before,
            final_norm=cfg.encoder_normalize_before,
            learned_pos=cfg.encoder_learned_pos,
            layerdrop=cfg.encoder_layerdrop,
            **mixture(
                cfg, cfg.encoder_moe_freq, cfg.encoder_ffn_embed_dim, cfg.alternate_ffn_embed_dim
            ),
            **for_every_stack(cfg),
        )

    def decoder_stack(self) -> StackConfig:
        """What the decoder is built from."""
        cfg = self.resolved()
        assert cfg.decoder_ffn_embed_dim is not None
        return dataclasses.replace(
            self.encoder_stack(),
            embed_dim=cfg.decoder_dim,
            ffn_embed_dim=cfg.decoder_ffn_embed_dim,
            layers=cfg.decoder_layers,
            attention_heads=cfg.decoder_attention_heads,
            input_dim=cfg.decoder_dim,
            output_dim=cfg.decoder_out_dim,
            encoder_dim=cfg.encoder_embed_dim,
            normalize_before=cfg.decoder_normalize_before,
            final_norm=cfg.decoder_normalize_before and not cfg.no_decoder_final_norm,
            learned_pos=cfg.decoder_learned_pos,
            layerdrop=cfg.decoder_layerdrop,
            **decoder_mixture(cfg, cfg.decoder_ffn_embed_dim),
        )


def for_every_stack(cfg: Any) -> dict[str, Any]:
    """Fields of `StackConfig` that a model's flags set for all its stacks alike."""
    return {
        "dropout": cfg.dropout,
        "attention_dropout": cfg.attention_dropout,
        "activation_dropout": cfg.activation_dropout,
        "activation_fn": cfg.activation_fn,
        "positions": not cfg.no_token_positional_embeddings,
        "scale_embedding": not cfg.no_scale_embedding,
        "layernorm_embedding": cfg.layernorm_embedding,
        "checkpoint_activations": cfg.checkpoint_activations,
        "offload_activations": cfg.offload_activations,
        "min_params_to_wrap": cfg.min_params_to_wrap,
    }


def mixture(cfg: MoEConfig, freq: int, ffn_dim: int, alternate_width: int) -> dict[str, Any]:
    """Fields of `StackConfig` that say which layers have experts, or another inner width instead.

    Args:
        cfg: the model's flags.
        freq: --encoder-moe-freq or --decoder-moe-freq.
        ffn_dim: inner width of the other layers.
        alternate_width: --alternate-ffn-embed-dim or --alternate-decoder-ffn-embed-dim.
    """
    alternate = cfg.alternate_of(freq, alternate_width)
    experts = None if alternate is not None else cfg.experts_of(freq, ffn_dim)
    return {"moe": experts, "alternate": alternate}


def decoder_mixture(cfg: MoEConfig, ffn_dim: int) -> dict[str, Any]:
    """`mixture` of a decoder."""
    return mixture(cfg, cfg.decoder_moe_freq, ffn_dim, cfg.alternate_decoder_ffn_embed_dim)


def decoder_flags(cfg: Any) -> StackFlags:
    """What the flags say of a decoder, for `MoEConfig`."""
    return StackFlags(
        layers=cfg.decoder_layers,
        freq=cfg.decoder_moe_freq,
        layerdrop=cfg.decoder_layerdrop,
        keeps_some=bool(cfg.decoder_layers_to_keep),
        alternate_flag="--alternate-decoder-ffn-embed-dim",
        alternate_width=cfg.alternate_decoder_ffn_embed_dim,
    )


def depth(layers: int, keep: tuple[int, ...] | None) -> int:
    """How many layers are built: as many as are kept."""
    return layers if not keep else len(keep)


def check_heads(side: str, dim: int, heads: int) -> None:
    """Refuse a width that the heads do not divide."""
    if dim < 1 or heads < 1 or dim % heads:
        raise ConfigError(
            f"--{side}-embed-dim {dim} is not divisible by --{side}-attention-heads {heads}"
        )


def check_probabilities(config: object, *fields: str) -> None:
    """Refuse a field of `config` that is no probability."""
    for field in fields:
        p = getattr(config, field)
        if not 0.0 <= p <= 1.0:
            raise ConfigError(f"--{field.replace('_', '-')} {p}: expected a number from 0 to 1")


def check_depth(side: str, layers: int, keep: tuple[int, ...] | None) -> None:
    """Refuse a stack without layers, and layers to keep that cannot exist."""
    if layers < 1:
        raise ConfigError(f"--{side}-layers {layers}: expected at least 1")
    if keep and min(keep) < 0:
        raise ConfigError(
            f"--{side}-layers-to-keep {','.join(map(str, keep))}: layers are numbered from 0"
        )
