"""The flags of mixtures of experts, fairseq's gshard names, for every transformer."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.moe.options import MoEOptions, RouterOptions, SecondExpertPolicy


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What a transformer's configuration inherits to have experts."""

    moe_freq: int = flag(0, "every N-th layer has experts in place of its feed-forward block")
    decoder_moe_freq: int = flag(0, "the same for the decoder's layers")
    moe_expert_count: int = flag(0, "number of experts of a layer")
    moe_expert_ffn_dim: int | None = flag(
        None, "inner width of an expert; None: that of the other layers"
    )
    moe_top1_expert: bool = flag(False, "send a token to one expert (default: to two)")
    moe_gating_use_fp32: bool = flag(False, "compute the gate in float32")
    moe_second_expert_policy: SecondExpertPolicy = flag(
        "sampling", "in training, how the second expert is taken"
    )
    moe_normalize_gate_prob_before_dropping: bool = flag(
        False, "make a token's two weights sum to one before experts that are full turn it away"
    )
    moe_capacity_factor: float | None = flag(
        None,
        "in training an expert takes this many times a rank's tokens / --moe-expert-count; None: 1 "
        "for --moe-top1-expert, else 2; 0: as many as come",
    )
    moe_eval_capacity_token_fraction: float | None = flag(
        None,
        "in evaluation an expert takes this share of a batch's tokens; None: as many as come, so "
        "that no result depends on its batch; negative: as in training (fairseq's default is 0.25)",
    )
    moe_normalize_expert_grad: Literal["world_size", "sqrt_world_size"] = flag(
        "world_size",
        "divide the experts' gradients, as all others, by the number of processes that share them, "
        "or by its square root",
    )
    use_moe_pad_mask: bool = flag(False, "send padding to no expert")
    moe_batch_prioritized_routing: bool = flag(
        False, "experts that are full turn away the tokens with the lowest probability"
    )

    def experts_of(self, freq: int, ffn_dim: int) -> MoEOptions | None:
        """The experts of one stack; None where it is dense.

        Args:
            freq: of its own, beside --moe-freq.
            ffn_dim: inner width of its other layers.

        Raises:
            ConfigError: the flags do not fit together.
        """
        every = max(self.moe_freq, freq)
        if every <= 0:
            return None
        if self.moe_expert_count < 2:
            raise ConfigError(
                f"--moe-expert-count {self.moe_expert_count}: layers of experts (--moe-freq) need "
                "at least 2"
            )
        top_k: Literal[1, 2] = 1 if self.moe_top1_expert else 2
        factor = float(top_k) if self.moe_capacity_factor is None else self.moe_capacity_factor
        router = RouterOptions(
            num_experts=self.moe_expert_count,
            top_k=top_k,
            gate_fp32=self.moe_gating_use_fp32,
            second_policy=self.moe_second_expert_policy,
            normalize_before_dropping=self.moe_normalize_gate_prob_before_dropping,
            capacity_factor=factor or None,
            eval_capacity_fraction=self.moe_eval_capacity_token_fraction,
            prioritized=self.moe_batch_prioritized_routing,
            mask_padding=self.use_moe_pad_mask,
        )
        return MoEOptions(
            every=every,
            router=router,
            ffn_dim=self.moe_expert_ffn_dim or ffn_dim,
            sqrt_gradients=self.moe_normalize_expert_grad == "sqrt_world_size",
        )
