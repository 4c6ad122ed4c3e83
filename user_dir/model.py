"""The transformer with DeepSpeed's mixtures of experts in every second layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.flags import default_of, flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.models import presets
from fairseq_lite.models.api import ARCHITECTURES, NetOutput
from fairseq_lite.models.config import StackConfig, TransformerConfig
from fairseq_lite.models.layers import Embedding
from fairseq_lite.models.transformer import (
    TransformerDecoder,
    TransformerEncoder,
    TransformerModel,
)
from fairseq_lite.models.transformer_layers import (
    Expert,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fairseq_lite.moe.flags import is_moe_field

from .criterion import GATE_LOSS
from .layers import DeepSpeedMixture, NativeMixture, require_deepspeed
from .options import JITTER, DeepSpeedOptions, GateOptions, LayerKind, NoisyGatePolicy

# Flags of the other family that mean the same here.
_ALSO_HERE = {"moe_expert_ffn_dim", "moe_normalize_expert_grad"}
_INSTEAD = {
    "moe_freq": "--deepspeed_moe enc,dec",
    "encoder_moe_freq": "--deepspeed_moe enc",
    "decoder_moe_freq": "--deepspeed_moe dec",
    "moe_expert_count": "--num-experts",
    "moe_top1_expert": "--top-k 1",
    "moe_capacity_factor": "--capacity-factor",
    "moe_eval_capacity_token_fraction": "--eval-capacity-factor",
    "moe_second_expert_policy": "--top2-2nd-expert-sampling",
    "moe_jitter": "--noisy-gate-policy Jitter",
    "alternate_ffn_embed_dim": "--deepspeed_moe '' for a dense model",
    "alternate_decoder_ffn_embed_dim": "--deepspeed_moe '' for a dense model",
    "use_moe_pad_mask": "nothing: padding never goes to an expert here",
    "moe_gating_use_fp32": "nothing: the gate always computes in float32 here",
}


@dataclasses.dataclass(frozen=True)
class TransformerDSMoEConfig(TransformerConfig):
    """Flags of the transformer, and DeepSpeed's of its experts."""

    deepspeed_moe: tuple[str, ...] | None = flag(
        None,
        "which stacks have experts, in every second layer: enc, dec, or enc,dec; '' for none",
        aliases=("--deepspeed_moe",),
    )
    ep_world_size: int = flag(
        1, "processes that share one set of experts; it divides the number of processes"
    )
    num_experts: int = flag(1, "experts of a layer; --ep-world-size divides it")
    top_k: Literal[1, 2] = flag(1, "experts that a token goes to")
    min_capacity: int = flag(0, "an expert takes at least so many tokens of a process")
    capacity_factor: float = flag(
        1.0,
        "in training an expert takes this many times --top-k * tokens / --num-experts of a process",
    )
    eval_capacity_factor: float | None = flag(
        None,
        "the same for evaluation; None: as many as come, so that no result depends on its batch",
    )
    noisy_gate_policy: NoisyGatePolicy = flag(
        "None",
        "noise of the gate in training: RSample draws the expert (--top-k 1), Jitter multiplies the"
        " gate's input by numbers about one",
    )
    no_drop_tokens: bool = flag(
        False, "in training an expert takes as many tokens as come (DeepSpeed's drop_tokens=False)"
    )
    use_rts: bool = flag(
        False, "a full expert of --top-k 1 turns away tokens at random, not the last ones"
    )
    top2_2nd_expert_sampling: bool = flag(
        False, "in training draw the second expert of --top-k 2 with Gumbel noise"
    )
    moe_layer: LayerKind = flag(
        "deepspeed",
        "whose layer computes, on the same parameters and checkpoints: DeepSpeed's or this"
        " project's",
    )

    def check_experts(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: with the first reason.
        """
        self._refuse_the_other_family()
        for reason in self._reasons():
            raise ConfigError(reason)

    def check_typed(self, names: Collection[str]) -> None:
        """Refuse flags of experts where nothing is said of which layers have them.

        Raises:
            ConfigError: with the first of them.
        """
        if self.deepspeed_moe is not None:
            return
        own = {f.name for f in dataclasses.fields(self)} - {
            f.name for f in dataclasses.fields(TransformerConfig)
        }
        for name in sorted((own | _ALSO_HERE) & set(names)):
            raise ConfigError(
                f"--{name.replace('_', '-')}: which layers have experts? add --deepspeed_moe"
                " enc,dec (or '' for a dense model)"
            )

    def _refuse_the_other_family(self) -> None:
        family = {f.name for f in dataclasses.fields(TransformerConfig) if is_moe_field(f.name)}
        for field in dataclasses.fields(self):
            foreign = field.name in family - _ALSO_HERE
            if foreign and getattr(self, field.name) != default_of(field):
                instead = _INSTEAD.get(field.name, "nothing: DeepSpeed's gate has no such rule")
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} is not for --arch transformer_ds_moe*: type"
                    f" {instead}"
                )

    def _reasons(self) -> list[str]:
        sides, count, ep = self.deepspeed_moe or (), self.num_experts, self.ep_world_size
        top1, noise = self.top_k == 1, self.noisy_gate_policy
        factors = (self.capacity_factor, self.eval_capacity_factor)
        stacks = [{"enc": "encoder", "dec": "decoder"}.get(side, "encoder") for side in sides]
        layers = [getattr(self, f"{stack}_layers") for stack in stacks] or [2]
        drop = [getattr(self, f"{stack}_layerdrop") for stack in stacks] or [0.0]
        keep = [getattr(self, f"{stack}_layers_to_keep") for stack in stacks]
        drops = not self.no_drop_tokens or self.eval_capacity_factor is not None
        checks = {
            f"--deepspeed_moe {','.join(sides)}: expected enc, dec, enc,dec or ''": (
                set(sides) <= {"enc", "dec"} and len(set(sides)) == len(sides)
            ),
            f"--num-experts {count}: expected 1 or more": count >= 1,
            f"--top-k 2 needs two experts: --num-experts is {count}": top1 or count >= 2,
            "--deepspeed_moe: experts are in every second layer, and a stack has one only: give it"
            " two": min(layers) >= 2,
            "--encoder-layerdrop, --decoder-layerdrop: a stack with experts is run whole: leave"
            " them out": max(drop) == 0.0,
            "--encoder-layers-to-keep, --decoder-layers-to-keep: a stack with experts keeps all its"
            " layers: leave them out": not any(keep),
            f"--ep-world-size {ep}: expected 1 or more": ep >= 1,
            f"--num-experts {count} is not divisible by --ep-world-size {ep}": (
                ep < 1 or count % ep == 0
            ),
            f"--min-capacity {self.min_capacity}: expected 0 or more": self.min_capacity >= 0,
            "--capacity-factor and --eval-capacity-factor: expected numbers above 0": all(
                factor is None or 0 < factor < math.inf for factor in factors
            ),
            "--capacity-factor means nothing with --no-drop-tokens: leave one out": (
                not self.no_drop_tokens or self.capacity_factor == 1.0
            ),
            "--min-capacity means nothing with --no-drop-tokens: leave one out": (
                drops or self.min_capacity == 0
            ),
            "--noisy-gate-policy RSample is a rule of --top-k 1: for --top-k 2 type"
            " --top2-2nd-expert-sampling": top1 or noise != "RSample",
            "--use-rts is a rule of --top-k 1: leave it out": top1 or not self.use_rts,
            "--use-rts means nothing with --no-drop-tokens: leave one out": not (
                self.use_rts and self.no_drop_tokens
            ),
            "--top2-2nd-expert-sampling is a rule of --top-k 2: for --top-k 1 type"
            " --noisy-gate-policy RSample": not (top1 and self.top2_2nd_expert_sampling),
        }
        return [reason for reason, fine in checks.items() if not fine]

    def experts_to_spread(self) -> tuple[int, int | None] | None:
        """The number of experts and the size of a group that shares them; None: there are none."""
        return (self.num_experts, self.ep_world_size) if self.deepspeed_moe else None

    def encoder_stack(self) -> StackConfig:
        """What the encoder is built from."""
        ffn = self.resolved().encoder_ffn_embed_dim
        return dataclasses.replace(super().encoder_stack(), moe=self._experts("enc", ffn))

    def decoder_stack(self) -> StackConfig:
        """What the decoder is built from."""
        ffn = self.resolved().decoder_ffn_embed_dim
        assert ffn is not None
        return dataclasses.replace(super().decoder_stack(), moe=self._experts("dec", ffn))

    def _experts(self, side: str, ffn_dim: int) -> DeepSpeedOptions | None:
        if side not in (self.deepspeed_moe or ()):
            return None
        router = GateOptions(
            num_experts=self.num_experts,
            top_k=self.top_k,
            gate_fp32=True,
            second_policy="sampling" if self.top2_2nd_expert_sampling else "all",
            capacity_factor=None if self.no_drop_tokens else self.capacity_factor,
            mask_padding=True,
            jitter=JITTER if self.noisy_gate_policy == "Jitter" else 0.0,
            min_capacity=self.min_capacity,
            eval_capacity_factor=self.eval_capacity_factor,
            rsample=self.noisy_gate_policy == "RSample",
            random_tokens=self.use_rts,
        )
        return DeepSpeedOptions(
            every=2,
            router=router,
            ffn_dim=self.moe_expert_ffn_dim or ffn_dim,
            sqrt_gradients=self.moe_normalize_expert_grad == "sqrt_world_size",
            kind=self.moe_layer,
            group_size=self.ep_world_size,
        )


def _mixture(cfg: StackConfig, name: str, owner: str) -> nn.Module:
    options = cfg.moe
    assert isinstance(options, DeepSpeedOptions)
    layer = DeepSpeedMixture if options.kind == "deepspeed" else NativeMixture
    return layer(cfg.embed_dim, options, lambda: Expert(cfg, owner), name)


class MoEEncoderLayer(TransformerEncoderLayer):
    """An encoder layer whose experts follow DeepSpeed's rules."""

    def build_mixture(self, cfg: StackConfig) -> nn.Module:
        return _mixture(cfg, self.name, type(self).__name__)


class MoEDecoderLayer(TransformerDecoderLayer):
    """A decoder layer whose experts follow DeepSpeed's rules."""

    def build_mixture(self, cfg: StackConfig) -> nn.Module:
        return _mixture(cfg, self.name, type(self).__name__)


class MoEEncoder(TransformerEncoder):
    """Source tokens to states."""

    def build_layer(self, cfg: StackConfig, name: str) -> nn.Module:
        return MoEEncoderLayer(cfg, name)


class MoEDecoder(TransformerDecoder):
    """Target prefixes and the encoder's states to features and logits."""

    def build_layer(self, cfg: StackConfig, name: str) -> nn.Module:
        return MoEDecoderLayer(cfg, name)


@ARCHITECTURES.register("transformer_ds_moe", config=TransformerDSMoEConfig)
class TransformerDSMoE(TransformerModel):
    """Encoder and decoder, with experts in either, both or none."""

    losses: ClassVar[tuple[str, ...]] = (GATE_LOSS,)
    """The names of `get_losses`, known before there is a model."""
    decoder_type = MoEDecoder

    @classmethod
    def check_run(cls, run: RunConfig, world_size: int) -> None:
        """Refuse what cannot work, before any process is started.

        Raises:
            ConfigError: the groups of experts do not fit the number of processes.
            MissingDependency: DeepSpeed is not installed, and its layer is asked for.
        """
        cfg: TransformerDSMoEConfig = run.model.config
        if not cfg.deepspeed_moe:
            return
        if world_size % cfg.ep_world_size:
            fits = math.gcd(world_size, cfg.num_experts)
            raise ConfigError(
                f"--ep-world-size {cfg.ep_world_size} does not divide the number of processes,"
                f" {world_size}: type --ep-world-size {fits}, or add"
                f" --distributed-world-size {cfg.ep_world_size}"
            )
        if cfg.moe_layer == "deepspeed":
            require_deepspeed()

    @classmethod
    def build_encoder(cls, cfg: StackConfig, embed: Embedding, max_positions: int) -> MoEEncoder:
        return MoEEncoder(cfg, embed, max_positions)

    def get_losses(self, net_output: NetOutput) -> Mapping[str, Tensor]:
        """Losses beside the criterion's, of one batch.

        Returns:
            `experts_gate_loss`: the balance losses of all layers with experts, added up (each is 1
            when its experts are evenly used); zero without experts.
        """
        reports: Mapping[str, Any] = net_output[1].get("experts", {})
        total = net_output[0].new_zeros((), dtype=net_output[0].float().dtype)
        return {GATE_LOSS: sum((report.balance for report in reports.values()), total)}


for _name, _overrides in presets.TRANSFORMER.items():
    ARCHITECTURES.preset(
        _name.replace("transformer", "transformer_ds_moe", 1),
        of="transformer_ds_moe",
        **_overrides,
    )
