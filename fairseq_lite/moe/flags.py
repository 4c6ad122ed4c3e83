"""The flags of mixtures of experts, fairseq's gshard names, for every transformer."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping
from typing import Literal

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.moe.options import MoEOptions, RouterOptions, SecondExpertPolicy

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StackFlags:
    """What the flags say of one stack, for `MoEConfig`.

    Attributes:
        layers: how many it has.
        freq: its own --encoder-moe-freq or --decoder-moe-freq.
        layerdrop: probability of leaving out a layer.
        keeps_some: whether only some layers of a deeper checkpoint are kept.
        alternate_flag: the flag of the dense model to compare with, and its value.
        alternate_width: see `alternate_flag`.
    """

    layers: int
    freq: int
    layerdrop: float
    keeps_some: bool
    alternate_flag: str
    alternate_width: int


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What a transformer's configuration inherits to have experts."""

    moe_freq: int = flag(0, "every N-th layer has experts in place of its feed-forward block")
    decoder_moe_freq: int = flag(0, "the same for the decoder's layers")
    moe_expert_count: int = flag(0, "number of experts of a layer, 2 or more")
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
    moe_jitter: float = flag(
        0.0, "in training multiply what the gate reads by numbers from 1 - X to 1 + X"
    )
    alternate_decoder_ffn_embed_dim: int = flag(
        0,
        "no experts: the decoder's layers that would have some get a feed-forward block of this "
        "inner width, which makes a dense model to compare with",
    )

    def stacks(self) -> Mapping[str, StackFlags]:
        """What the flags say of the model's stacks, by side: "encoder", "decoder"."""
        raise NotImplementedError

    def experts_to_spread(self) -> tuple[int, int | None] | None:
        """The number of experts, and the size of an exchange group where the flags say one.

        Returns:
            None for a model without experts.
        """
        has = any(not s.alternate_width and self._every(s) for s in self.stacks().values())
        return (self.moe_expert_count, None) if has else None

    def check_experts(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: with the first reason.
        """
        self._check_values()
        stacks = self.stacks()
        for side, stack in stacks.items():
            if stack.freq < 0 or stack.freq > stack.layers:
                raise ConfigError(
                    f"--{side}-moe-freq {stack.freq}: expected 0 (none) to --{side}-layers "
                    f"{stack.layers}: every N-th layer has experts"
                )
            if stack.alternate_width < 0:
                raise ConfigError(
                    f"{stack.alternate_flag} {stack.alternate_width}: expected a width, or 0"
                )
            if self._every(stack):
                self._check_stack(side, stack)
        deepest = max(stack.layers for stack in stacks.values())
        if not 0 <= self.moe_freq <= deepest:
            raise ConfigError(
                f"--moe-freq {self.moe_freq}: expected 0 (none) to {deepest}, the number of layers:"
                " every N-th has experts"
            )

    def check_typed(self, names: Collection[str]) -> None:
        """Refuse flags of experts for a model that has none, and say what a capacity leaves out.

        Only those that are typed: the configuration of a dense model may hold any values.

        Raises:
            ConfigError: with the first of them.
        """
        dense = any(s.alternate_width and self._every(s) for s in self.stacks().values())
        if dense or self.experts_to_spread() is not None:
            if "moe_capacity_factor" in names:
                self._say_what_is_dropped()
            return
        for name in self.moe_fields_set():
            if name in names:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: no layer has experts: say which with --moe-freq N"
                    " (every N-th layer), or leave it out"
                )

    def _say_what_is_dropped(self) -> None:
        # All experts together take factor x S of the top_k x S choices, however even they are.
        served = self._capacity_factor / self._top_k
        if 0 < served < 0.5:
            logger.warning(
                "--moe-capacity-factor %g: experts turn away at least %.1f%% of all choices in "
                "training; 0 is for experts that take as many tokens as come",
                self._capacity_factor,
                100 * (1 - served),
            )

    def check_capacity(self, tokens: int | None) -> None:
        """Refuse experts that take no token of any batch.

        Args:
            tokens: of the largest batch of one process; None where that is not known.

        Raises:
            ConfigError: with the least factor that lets them take one.
        """
        if tokens is None or self.experts_to_spread() is None or not self._capacity_factor:
            return
        share = math.ceil(tokens / self.moe_expert_count)
        if int(self._capacity_factor * share) == 0:
            least = math.ceil(1e4 / share) / 1e4
            raise ConfigError(
                f"--moe-capacity-factor {self._capacity_factor:g}: each of "
                f"{self.moe_expert_count} experts takes no token of {tokens}, the largest batch "
                f"(--max-tokens): expected {least:g} or more, or 0 for as many as come"
            )

    @property
    def _top_k(self) -> Literal[1, 2]:
        return 1 if self.moe_top1_expert else 2

    @property
    def _capacity_factor(self) -> float:
        return float(self._top_k) if self.moe_capacity_factor is None else self.moe_capacity_factor

    def moe_fields_set(self) -> list[str]:
        """The fields of mixtures of experts that are not at their defaults."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if is_moe_field(field.name) and getattr(self, field.name) != field.default
        ]

    def _every(self, stack: StackFlags) -> int:
        """N, where every N-th layer has experts; 0 where none has."""
        every = max(self.moe_freq, stack.freq)
        return every if every <= stack.layers else 0

    def _check_values(self) -> None:
        if self.moe_expert_count < 0:
            raise ConfigError(f"--moe-expert-count {self.moe_expert_count}: expected 2 or more")
        if self.moe_expert_ffn_dim is not None and self.moe_expert_ffn_dim < 1:
            raise ConfigError(f"--moe-expert-ffn-dim {self.moe_expert_ffn_dim}: expected 1 or more")
        if self.moe_capacity_factor is not None and not 0 <= self.moe_capacity_factor < math.inf:
            raise ConfigError(
                f"--moe-capacity-factor {self.moe_capacity_factor}: expected more than 0, or 0 for "
                "experts that take as many tokens as come"
            )
        fraction = self.moe_eval_capacity_token_fraction
        if fraction is not None and not (0 < fraction <= 1 or -math.inf < fraction < 0):
            raise ConfigError(
                f"--moe-eval-capacity-token-fraction {fraction}: expected a share above 0, up to 1,"
                " or -1 for the rule of training; leave it out to drop no token"
            )
        if not 0 <= self.moe_jitter < 1:
            raise ConfigError(f"--moe-jitter {self.moe_jitter}: expected 0 to below 1")

    def _check_stack(self, side: str, stack: StackFlags) -> None:
        if stack.keeps_some:
            # Layers are numbered anew then, and every N-th would be another one.
            raise ConfigError(
                f"--{side}-layers-to-keep: a stack in which every N-th layer has experts "
                "(--moe-freq) keeps all its layers; leave it out"
            )
        if stack.alternate_width:
            return
        if self.moe_expert_count < 2:
            raise ConfigError(
                f"--moe-expert-count {self.moe_expert_count}: layers of experts (--moe-freq) need "
                "at least 2"
            )
        if stack.layerdrop > 0 and self._every(stack) == 1:
            raise ConfigError(
                f"--{side}-layerdrop {stack.layerdrop}: layers of experts are never left out, and "
                "every layer is one; leave the flag out, or give fewer layers experts (--moe-freq "
                "2)"
            )

    def alternate_of(self, freq: int, width: int) -> tuple[int, int] | None:
        """Of a dense model to compare with: N and the inner width of every N-th layer.

        Args:
            freq: the stack's own, beside --moe-freq.
            width: the stack's --alternate-ffn-embed-dim or --alternate-decoder-ffn-embed-dim.
        """
        every = max(self.moe_freq, freq)
        return (every, width) if every > 0 and width > 0 else None

    def experts_of(self, freq: int, ffn_dim: int) -> MoEOptions | None:
        """The experts of one stack; None where it is dense.

        Args:
            freq: the stack's own, beside --moe-freq.
            ffn_dim: inner width of its other layers.
        """
        every = max(self.moe_freq, freq)
        if every <= 0:
            return None
        router = RouterOptions(
            num_experts=self.moe_expert_count,
            top_k=self._top_k,
            gate_fp32=self.moe_gating_use_fp32,
            second_policy=self.moe_second_expert_policy,
            normalize_before_dropping=self.moe_normalize_gate_prob_before_dropping,
            capacity_factor=self._capacity_factor or None,
            eval_capacity_fraction=self.moe_eval_capacity_token_fraction,
            prioritized=self.moe_batch_prioritized_routing,
            mask_padding=self.use_moe_pad_mask,
            jitter=self.moe_jitter,
        )
        return MoEOptions(
            every=every,
            router=router,
            ffn_dim=self.moe_expert_ffn_dim or ffn_dim,
            sqrt_gradients=self.moe_normalize_expert_grad == "sqrt_world_size",
        )


def is_moe_field(name: str) -> bool:
    """Whether a field of a transformer's configuration is about experts, by gshard's names."""
    return name.startswith(("moe_", "use_moe_", "encoder_moe_", "decoder_moe_", "alternate_"))
