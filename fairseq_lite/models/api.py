"""What an architecture offers to criteria, generation, backends and checkpoints.

An architecture is a `Model` subclass registered in `ARCHITECTURES` with the frozen dataclass its
flags come from. Tensors are batch first everywhere: tokens (B, T), states (B, T, D).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lite.config.core import RunConfig
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.parallel.experts import expert_modules
from fairseq_lite.parallel.shards.experts import without_others
from fairseq_lite.registry import Registry

ARCHITECTURES = Registry("architecture", "--arch")

StateDict = dict[str, Tensor]
NetOutput = tuple[Tensor, dict[str, Any]]


class Vocabulary(Protocol):
    """What a model needs to know of a dictionary."""

    def __len__(self) -> int: ...

    def pad(self) -> int:
        """The index of the padding symbol."""
        ...


class ModelTask(Protocol):
    """What a model needs to know of the task it is built for."""

    @property
    def source_dictionary(self) -> Any:
        """The `Vocabulary` of the input."""
        ...

    @property
    def target_dictionary(self) -> Any:
        """The `Vocabulary` of the output."""
        ...

    def max_positions(self) -> Any:
        """(longest source, longest target) in tokens."""
        ...


@runtime_checkable
class OwnedDropout(Protocol):
    """A dropout module that `--retain-dropout-modules` can select.

    Attributes:
        owner: the class name it is selected by.
        apply_during_inference: stay on in evaluation mode.
    """

    owner: str
    apply_during_inference: bool


class EncoderOut(NamedTuple):
    """What an encoder hands to a decoder.

    Attributes:
        states: (B, S, D).
        padding_mask: (B, S), True where the source is padding; None when nothing is.
        reports: what mixtures of experts report, by layer; see `moe.router.RouterReport`.
    """

    states: Tensor
    padding_mask: Tensor | None
    reports: Mapping[str, Any] = {}


class Model(nn.Module):
    """Base of every architecture."""

    @classmethod
    def check_run(cls, run: RunConfig, world_size: int) -> None:
        """Refuse what cannot work, before any process is started and any model is built.

        Args:
            run: what was asked for.
            world_size: how many processes it will have.

        Raises:
            ConfigError: with what to type instead.
        """

    @classmethod
    def build(cls, cfg: Any, task: ModelTask) -> Model:
        """Make a model with fresh weights for a task's dictionaries and lengths."""
        raise NotImplementedError(f"{cls.__name__}.build(cfg, task)")

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None,
        prev_output_tokens: Tensor,
        features_only: bool = False,
    ) -> NetOutput:
        """Score the next token at every position.

        Args:
            src_tokens: (B, S).
            src_lengths: (B,), or None where the model does not need it.
            prev_output_tokens: (B, T), the target shifted right by one (teacher forcing).
            features_only: stop before the output projection.

        Returns:
            Logits (B, T, V), or features (B, T, D), and a dict of extras.
        """
        raise NotImplementedError

    def encode(self, src_tokens: Tensor, src_lengths: Tensor | None = None) -> EncoderOut:
        """Run the encoder alone."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def output_layer(self, features: Tensor) -> Tensor:
        """Features (B, T, D) to logits (B, T, V)."""
        raise NotImplementedError

    @property
    def output_weight(self) -> Tensor | None:
        """The (V, D) matrix of a plain output projection, for fused losses.

        None where logits are not `features @ weight.T`: criteria then take the plain path.
        """
        return None

    def get_normalized_probs(
        self, net_output: NetOutput, log_probs: bool, sample: Mapping[str, Any] | None = None
    ) -> Tensor:
        """(Log-)probabilities (B, T, V) in fp32 of what `forward` returned."""
        logits = net_output[0].float()
        return F.log_softmax(logits, dim=-1) if log_probs else F.softmax(logits, dim=-1)

    def get_targets(self, sample: Mapping[str, Any], net_output: NetOutput) -> Tensor:
        """The tokens the model should have predicted, (B, T)."""
        target: Tensor = sample["target"]
        return target

    def max_positions(self) -> Any:
        """The longest input(s) the model takes, in tokens."""
        return None

    def layers_to_shard(self) -> list[nn.Module]:
        """The blocks a sharded backend wraps one by one, innermost first."""
        return []

    def layers_to_compile(self) -> list[nn.Module]:
        """The layers that `--compile` compiles one by one; none where an architecture has none."""
        return []

    def tie_weights(self) -> None:
        """Make shared parameters one object again, after storage was replaced."""

    def reset_parameters(self) -> None:
        """Draw fresh weights and rebuild computed buffers.

        Every module with weights of its own has a `reset_parameters`, so a sharding backend may
        also call them one by one; but not those of experts, which the module that holds them draws
        from random numbers of their own.
        """
        own = {id(part) for _, expert, _ in expert_modules(self) for part in expert.modules()}
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and id(module) not in own and callable(reset):
                reset()

    def materialize(self, device: torch.device | str) -> Model:
        """Give storage and fresh weights to a model that was built on the meta device."""
        self.to_empty(device=device)
        self.tie_weights()
        self.reset_parameters()
        return self

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> StateDict:
        """A copy of `state` with the names this version uses; the tensors are shared."""
        return dict(state)

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Load a checkpoint's `model` entry, whatever version of fairseq wrote it.

        Raises:
            CheckpointError: names or shapes do not fit; the message names the first of them.
        """
        self.load_state_dict(self.fitting_weights(state))

    def fitting_weights(self, state: Mapping[str, Tensor]) -> StateDict:
        """`upgrade_state_dict`, and a check that names and shapes are this model's.

        Experts that other ranks have are passed over.

        Nothing is copied: a backend whose ranks hold parts of the model takes them from the result.

        Raises:
            CheckpointError: they are not; the message names the first.
        """
        state = without_others(self, self.upgrade_state_dict(state))
        own = self.state_dict()
        for what, names in (
            ("lacks", sorted(own.keys() - state.keys())),
            ("has unknown", sorted(state.keys() - own.keys())),
        ):
            if names:
                raise CheckpointError(
                    f"the checkpoint {what} {names[0]}"
                    + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                    + ": it was made with another architecture or other flags; give the flags it"
                    " was trained with"
                )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(state[name].shape)} in the checkpoint and"
                    f" {tuple(tensor.shape)} in the model: the dictionaries or the --*-dim flags"
                    " differ"
                )
        return state

    def retain_dropout(self, modules: tuple[str, ...] | None = None) -> None:
        """Keep dropout on in evaluation mode (`--retain-dropout`).

        Args:
            modules: class names of the modules concerned; None for all.

        Raises:
            ConfigError: a name that no module with dropout has.
        """
        # fairseq's class names may end in Base where ours do not.
        wanted = None if modules is None else {m.removesuffix("Base") for m in modules}
        dropouts = [m for m in self.modules() if isinstance(m, OwnedDropout)]
        owners = {module.owner for module in dropouts}
        for name in sorted((wanted or set()) - owners):
            raise ConfigError(
                f"--retain-dropout-modules {name}: expected some of {', '.join(sorted(owners))}"
            )
        for module in dropouts:
            if wanted is None or module.owner in wanted:
                module.apply_during_inference = True
