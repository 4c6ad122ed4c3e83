"""The encoder-decoder transformer, with fairseq's parameter names, initialisation and numerics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fairseq_lite.config.core import RunConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.models import presets
from fairseq_lite.models.api import (
    ARCHITECTURES,
    EncoderOut,
    Model,
    ModelTask,
    NetOutput,
    StateDict,
)
from fairseq_lite.models.attention import attention_bias, causal_blocked
from fairseq_lite.models.config import StackConfig, TransformerConfig
from fairseq_lite.models.dropout import Dropout
from fairseq_lite.models.layers import (
    Embedding,
    LayerNorm,
    OutputProjection,
    XavierLinear,
    kept_layers,
    make_positions,
    positions_of,
    run_layer,
    to_compute_dtype,
)
from fairseq_lite.models.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer
from fairseq_lite.models.upgrade import drop_old_final_norm, upgrade_names
from fairseq_lite.moe.flags import MoEConfig
from fairseq_lite.moe.router import RouterReport
from fairseq_lite.parallel.experts import shared_parameters


class _Stack(nn.Module):
    """What encoder and decoder share: embeddings in, layers, a last normalisation.

    `version` marks the layout of the parameters, as in fairseq: 3 has had a final `layer_norm` only
    where blocks normalise first.
    """

    side: ClassVar[str]
    version: Tensor
    layers: nn.ModuleList
    layer_norm: LayerNorm | None

    def __init__(self, cfg: StackConfig, embed_tokens: Embedding, max_positions: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.padding_idx = int(embed_tokens.padding_idx or 0)
        self.max_positions = max_positions
        self.embed_scale = math.sqrt(cfg.embed_dim) if cfg.scale_embedding else 1.0
        self.register_buffer("version", torch.tensor([3.0]))
        self.dropout_module = Dropout(cfg.dropout, type(self).__name__)
        # From here on the order is that of fairseq's checkpoints.
        self.embed_tokens = embed_tokens
        self.project_in_dim = (
            XavierLinear(cfg.input_dim, cfg.embed_dim, bias=False)
            if cfg.input_dim != cfg.embed_dim
            else None
        )
        self.embed_positions = (
            make_positions(max_positions, cfg.embed_dim, self.padding_idx, cfg.learned_pos)
            if cfg.positions
            else None
        )
        self.layernorm_embedding = LayerNorm(cfg.embed_dim) if cfg.layernorm_embedding else None
        self.layers = nn.ModuleList(
            self.build_layer(cfg.for_layer(i), f"{self.side}.layers.{i}") for i in range(cfg.layers)
        )
        self.layer_norm = LayerNorm(cfg.embed_dim) if cfg.final_norm else None

    def build_layer(self, cfg: StackConfig, name: str) -> nn.Module:
        """Make a layer; a stack with other layers overrides this.

        Args:
            cfg: the shape; `cfg.moe` is None unless this layer has experts.
            name: as in `decoder.layers.0`.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.version.fill_(3.0)

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens (B, T) to states (B, T, D), dropout included.

        Args:
            tokens: token ids.
            positions: their position numbers; counted from the tokens when None.
        """
        x = self.embed_tokens(tokens)
        scale = self.embed_scale
        if self.project_in_dim is not None:
            x, scale = self.project_in_dim(x * scale), 1.0
        if self.embed_positions is not None:
            if positions is None:
                positions = positions_of(tokens, self.padding_idx)
            x = torch.add(self.embed_positions(positions), x, alpha=scale)
        elif scale != 1.0:
            x = x * scale
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        out: Tensor = self.dropout_module(to_compute_dtype(x))
        return out

    def padding_of(self, tokens: Tensor) -> Tensor | None:
        """(B, T), True on padding; None when there is none, which spares the kernels a mask."""
        mask = tokens.eq(self.padding_idx)
        return mask if bool(mask.any()) else None

    def layers_to_shard(self) -> list[nn.Module]:
        """The layers with at least `min_params_to_wrap` parameters; all when checkpointed.

        Experts do not count: ranks may have different numbers of them, and they are split apart.
        """
        least = 0 if self.cfg.checkpoint_activations else self.cfg.min_params_to_wrap
        return [m for m in self.layers if sum(p.numel() for p in shared_parameters(m)) >= least]

    def layers_to_compile(self) -> list[nn.Module]:
        """All of them; the compiler leaves out mixtures of experts itself."""
        return list(self.layers)

    def _run(self, layer: nn.Module, *args: Any) -> Any:
        checkpoint = self.cfg.checkpoint_activations and self.training
        return run_layer(layer, *args, checkpoint=checkpoint, offload=self.cfg.offload_activations)


class TransformerEncoder(_Stack):
    """Source tokens to states."""

    side = "encoder"

    def build_layer(self, cfg: StackConfig, name: str) -> nn.Module:
        return TransformerEncoderLayer(cfg, name)

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None) -> EncoderOut:
        """Encode.

        Args:
            src_tokens: (B, S).
            src_lengths: not needed; padding is seen in the tokens.
        """
        padding = self.padding_of(src_tokens)
        x = self.embed(src_tokens)
        bias = None
        if padding is not None:
            x = x * (~padding).to(x.dtype)[:, :, None]
            bias = attention_bias(padding[:, None, None, :], x.dtype)
        reports: dict[str, RouterReport] = {}
        for layer in kept_layers(self.layers, self.cfg.layerdrop, self.training):
            x, report = self._run(layer, x, bias, padding)
            if report is not None:
                reports[str(layer.name)] = report
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return EncoderOut(x, padding, reports)


class TransformerDecoder(_Stack):
    """Target prefixes, and the encoder's states where there is one, to features and logits.

    Without an encoder (`cfg.encoder_dim` None) this is a language model.

    Args:
        cfg: the shape.
        embed_tokens: the embeddings.
        max_positions: the longest target.
        num_tokens: V, number of logits.
        share_output: use the embeddings as the output projection.
    """

    side = "decoder"

    def __init__(
        self,
        cfg: StackConfig,
        embed_tokens: Embedding,
        max_positions: int,
        *,
        num_tokens: int,
        share_output: bool,
    ) -> None:
        super().__init__(cfg, embed_tokens, max_positions)
        self._has_experts = cfg.moe is not None
        self.project_out_dim = (
            XavierLinear(cfg.embed_dim, cfg.output_dim, bias=False)
            if cfg.embed_dim != cfg.output_dim
            else None
        )
        self.output_projection = OutputProjection(
            cfg.output_dim, num_tokens, tied_to=embed_tokens if share_output else None
        )

    def build_layer(self, cfg: StackConfig, name: str) -> nn.Module:
        return TransformerDecoderLayer(cfg, name)

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: EncoderOut | None = None,
        *,
        features_only: bool = False,
        need_alignment: bool = False,
        alignment_layer: int | None = None,
    ) -> NetOutput:
        """Run over whole prefixes (teacher forcing).

        Args:
            prev_output_tokens: (B, T).
            encoder_out: what the encoder returned; None for a language model.
            features_only: stop before the output projection.
            need_alignment: put the cross-attention, averaged over heads, in extra["attn"],
                (B, T, S).
            alignment_layer: the layer it is taken from; the last when None.

        Returns:
            Logits (B, T, V), or features (B, T, D'), and the extras: `attn`; `experts`, what
            mixtures of experts report, by layer, the encoder's first.
        """
        x = self.embed(prev_output_tokens)
        bias, causal = self._causal_bias(prev_output_tokens, x.dtype)
        states, encoder_bias = None, None
        if encoder_out is not None:
            states = encoder_out.states
            if encoder_out.padding_mask is not None:
                encoder_bias = attention_bias(encoder_out.padding_mask[:, None, None, :], x.dtype)
        chosen = self.layers[-1 if alignment_layer is None else alignment_layer]
        padding = prev_output_tokens.eq(self.padding_idx) if self._has_experts else None
        extra: dict[str, Any] = {}
        reports = {} if encoder_out is None else dict(encoder_out.reports)
        for layer in kept_layers(self.layers, self.cfg.layerdrop, self.training):
            wanted = need_alignment and layer is chosen
            x, weights, report = self._run(
                layer, x, bias, causal, states, encoder_bias, wanted, padding
            )
            if weights is not None:
                extra["attn"] = weights.mean(dim=1)
            if report is not None:
                reports[str(layer.name)] = report
        if reports:
            extra["experts"] = reports
        x = self.finish(x)
        return (x if features_only else self.output_projection(x)), extra

    def _causal_bias(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
        """What hides the future, and whether nothing else is to be hidden.

        Padding at the end is the future of every real token and needs no hiding; padding on the
        left does. A language model's is never there, so that nothing waits for the device.
        """
        length, device = tokens.size(1), tokens.device
        if self.cfg.encoder_dim is None or not bool(tokens[:, 0].eq(self.padding_idx).any()):
            if device.type != "cpu":  # kernels there need no bias
                return None, True
            return attention_bias(causal_blocked(length), dtype), True
        padding = tokens.eq(self.padding_idx)[:, None, None, :]
        return attention_bias(causal_blocked(length, device) | padding, dtype), False

    def finish(self, x: Tensor) -> Tensor:
        """The last layer's states (…, D) to features (…, D')."""
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        if self.project_out_dim is not None:
            x = self.project_out_dim(x)
        return x


class DecodingModel(Model):
    """What models that end in a transformer decoder share."""

    decoder: TransformerDecoder
    decoder_type: ClassVar[type[TransformerDecoder]] = TransformerDecoder
    """What `build_decoder` makes; an architecture with another one overrides this."""

    @classmethod
    def check_run(cls, run: RunConfig, world_size: int) -> None:
        """Refuse experts that would take no token of any batch."""
        flags = run.model.config
        if isinstance(flags, MoEConfig):
            flags.check_capacity(run.dataset.max_tokens)

    @classmethod
    def build_decoder(
        cls,
        cfg: StackConfig,
        embed: Embedding,
        max_positions: int,
        num_tokens: int,
        share_output: bool,
    ) -> TransformerDecoder:
        """Make the decoder."""
        return cls.decoder_type(
            cfg, embed, max_positions, num_tokens=num_tokens, share_output=share_output
        )

    def output_layer(self, features: Tensor) -> Tensor:
        logits: Tensor = self.decoder.output_projection(features)
        return logits

    @property
    def output_weight(self) -> Tensor | None:
        return self.decoder.output_projection.weight


@ARCHITECTURES.register("transformer", config=TransformerConfig)
class TransformerModel(DecodingModel):
    """Encoder and decoder."""

    def __init__(
        self, cfg: TransformerConfig, encoder: TransformerEncoder, decoder: TransformerDecoder
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = encoder
        self.decoder = decoder

    @classmethod
    def build(cls, cfg: TransformerConfig, task: ModelTask) -> TransformerModel:
        """Make a model with fresh weights.

        Raises:
            ConfigError: --share-all-embeddings with two different dictionaries; a task without a
                source and a target.
        """
        source, target = task.source_dictionary, task.target_dictionary
        longest = task.max_positions()
        if not isinstance(longest, tuple):
            raise ConfigError(
                "--arch transformer translates: use --task translation, or --arch transformer_lm"
                " for a language model"
            )
        max_source, max_target = longest
        encoder_cfg, decoder_cfg = cfg.encoder_stack(), cfg.decoder_stack()
        embed_source = Embedding(len(source), encoder_cfg.input_dim, source.pad())
        if cfg.share_all_embeddings:
            if source != target:
                raise ConfigError(
                    "--share-all-embeddings needs one dictionary for both languages: preprocess"
                    " with --joined-dictionary, or use --share-decoder-input-output-embed"
                )
            embed_target = embed_source
        else:
            embed_target = Embedding(len(target), decoder_cfg.input_dim, target.pad())
        return cls(
            cfg,
            cls.build_encoder(encoder_cfg, embed_source, max_source),
            cls.build_decoder(
                decoder_cfg, embed_target, max_target, len(target), cfg.shares_output
            ),
        )

    @classmethod
    def build_encoder(
        cls, cfg: StackConfig, embed: Embedding, max_positions: int
    ) -> TransformerEncoder:
        """Make the encoder; an architecture with another one overrides this."""
        return TransformerEncoder(cfg, embed, max_positions)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None,
        prev_output_tokens: Tensor,
        features_only: bool = False,
        need_alignment: bool = False,
        alignment_layer: int | None = None,
    ) -> NetOutput:
        """See `Model.forward` and `TransformerDecoder.forward`."""
        out: NetOutput = self.decoder(
            prev_output_tokens,
            self.encoder(src_tokens, src_lengths),
            features_only=features_only,
            need_alignment=need_alignment,
            alignment_layer=alignment_layer,
        )
        return out

    def encode(self, src_tokens: Tensor, src_lengths: Tensor | None = None) -> EncoderOut:
        out: EncoderOut = self.encoder(src_tokens, src_lengths)
        return out

    def max_positions(self) -> tuple[int, int]:
        return self.encoder.max_positions, self.decoder.max_positions

    def layers_to_shard(self) -> list[nn.Module]:
        return [*self.encoder.layers_to_shard(), *self.decoder.layers_to_shard()]

    def layers_to_compile(self) -> list[nn.Module]:
        return [*self.encoder.layers_to_compile(), *self.decoder.layers_to_compile()]

    def tie_weights(self) -> None:
        if self.cfg.share_all_embeddings:
            self.decoder.embed_tokens = self.encoder.embed_tokens
        if self.cfg.shares_output:
            self.decoder.output_projection.tie(self.decoder.embed_tokens)

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> StateDict:
        """Rename what older versions wrote; see `models/upgrade.py`.

        A checkpoint from before the final normalisation existed switches it off in this model.
        """
        new = upgrade_names(
            state,
            tied_output=self.cfg.shares_output,
            keep={
                "encoder": self.cfg.encoder_layers_to_keep,
                "decoder": self.cfg.decoder_layers_to_keep,
            },
        )
        for side, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            if drop_old_final_norm(new, side):
                stack.layer_norm = None
        return new


for _name, _overrides in presets.TRANSFORMER.items():
    ARCHITECTURES.preset(_name, of="transformer", **_overrides)
