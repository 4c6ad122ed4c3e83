"""The flags of the decoder-only transformer, field for field fairseq's.

`transformer_lm` itself has fixed widths of 512 for its embeddings and before its output projection;
the named architectures leave both unset, and unset they follow the decoder's width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.models.config import (
    Activation,
    StackConfig,
    check_depth,
    check_heads,
    check_probabilities,
    decoder_flags,
    decoder_mixture,
    depth,
    for_every_stack,
)
from fairseq_lite.moe.flags import MoEConfig, StackFlags


@dataclasses.dataclass(frozen=True)
class TransformerLMConfig(MoEConfig):
    """The transformer language model (Vaswani et al. 2017, Radford et al. 2019)."""

    activation_fn: Activation = flag("relu", "activation of the feed-forward blocks")
    dropout: float = flag(0.1, "probability of dropping an element of a block's output")
    attention_dropout: float = flag(0.0, "probability of dropping an attention weight")
    activation_dropout: float = flag(
        0.0, "probability of dropping an element after the activation", aliases=["--relu-dropout"]
    )
    decoder_embed_dim: int = flag(512, "width of the model")
    decoder_output_dim: int | None = flag(
        512, "width before the output projection; None: the model's"
    )
    decoder_input_dim: int | None = flag(512, "width of the embeddings; None: the model's")
    decoder_ffn_embed_dim: int | None = flag(
        2048, "inner width of the feed-forward blocks; None: four times the model's"
    )
    decoder_layers: int = flag(6, "number of layers")
    decoder_attention_heads: int = flag(8, "attention heads in a layer")
    decoder_normalize_before: bool = flag(
        False, "normalise before each block and once at the end, not after each block"
    )
    no_decoder_final_norm: bool = flag(
        False, "no normalisation after the last layer of a --decoder-normalize-before model"
    )
    no_token_positional_embeddings: bool = flag(False, "do without positions")
    share_decoder_input_output_embed: bool = flag(
        False, "one matrix for the embeddings and the output projection"
    )
    decoder_learned_pos: bool = flag(False, "learn the positions (default: sinusoidal)")
    layernorm_embedding: bool = flag(False, "normalise the embeddings")
    no_scale_embedding: bool = flag(False, "do not multiply embeddings by sqrt(width)")
    checkpoint_activations: bool = flag(
        False, "keep only each layer's input and compute the rest again in the backward pass"
    )
    offload_activations: bool = flag(
        False, "as --checkpoint-activations, and keep the inputs in host memory"
    )
    decoder_layerdrop: float = flag(0.0, "probability of leaving out a layer in training")
    decoder_layers_to_keep: tuple[int, ...] | None = flag(
        None, "layers to keep when loading a deeper checkpoint, for example 0,2,4"
    )
    min_params_to_wrap: int = flag(
        int(1e8), "--ddp-backend fully_sharded wraps only layers with at least this many parameters"
    )
    scale_fc: bool = flag(False, "NormFormer: normalise inside the feed-forward blocks")
    scale_attn: bool = flag(False, "NormFormer: normalise what attention gives")
    scale_heads: bool = flag(False, "NormFormer: learn a factor for each attention head")
    scale_resids: bool = flag(
        False, "NormFormer: learn a factor for each element of the feed-forward blocks' residuals"
    )
    max_target_positions: int | None = flag(
        None, "the longest input the model was built for; None: what the task says", typed=False
    )

    def __post_init__(self) -> None:
        check_heads("decoder", self.decoder_embed_dim, self.decoder_attention_heads)
        check_probabilities(self, "dropout", "attention_dropout", "activation_dropout")
        check_probabilities(self, "decoder_layerdrop")
        check_depth("decoder", self.decoder_layers, self.decoder_layers_to_keep)
        if self.share_decoder_input_output_embed and self.input_dim != self.output_dim:
            raise ConfigError(
                f"--share-decoder-input-output-embed needs equal widths: --decoder-input-dim"
                f" {self.input_dim} and --decoder-output-dim {self.output_dim}"
            )
        self.check_experts()

    def stacks(self) -> Mapping[str, StackFlags]:
        return {"decoder": decoder_flags(self)}

    @property
    def input_dim(self) -> int:
        """The width of the embeddings, resolved."""
        return self.decoder_embed_dim if self.decoder_input_dim is None else self.decoder_input_dim

    @property
    def output_dim(self) -> int:
        """The width before the output projection, resolved."""
        given = self.decoder_output_dim
        return self.decoder_embed_dim if given is None else given

    def resolved(self) -> TransformerLMConfig:
        """This config with every field that follows another one filled in."""
        ffn = self.decoder_ffn_embed_dim
        return dataclasses.replace(
            self,
            decoder_input_dim=self.input_dim,
            decoder_output_dim=self.output_dim,
            decoder_ffn_embed_dim=4 * self.decoder_embed_dim if ffn is None else ffn,
            decoder_layers=depth(self.decoder_layers, self.decoder_layers_to_keep),
            checkpoint_activations=self.checkpoint_activations or self.offload_activations,
        )

    def decoder_stack(self) -> StackConfig:
        """What the decoder is built from."""
        cfg = self.resolved()
        assert cfg.decoder_ffn_embed_dim is not None
        return StackConfig(
            embed_dim=cfg.decoder_embed_dim,
            ffn_embed_dim=cfg.decoder_ffn_embed_dim,
            layers=cfg.decoder_layers,
            attention_heads=cfg.decoder_attention_heads,
            input_dim=cfg.input_dim,
            output_dim=cfg.output_dim,
            encoder_dim=None,
            normalize_before=cfg.decoder_normalize_before,
            final_norm=cfg.decoder_normalize_before and not cfg.no_decoder_final_norm,
            learned_pos=cfg.decoder_learned_pos,
            layerdrop=cfg.decoder_layerdrop,
            **decoder_mixture(cfg, cfg.decoder_ffn_embed_dim),
            **for_every_stack(cfg),
            scale_attn=cfg.scale_attn,
            scale_fc=cfg.scale_fc,
            scale_heads=cfg.scale_heads,
            scale_resids=cfg.scale_resids,
        )
