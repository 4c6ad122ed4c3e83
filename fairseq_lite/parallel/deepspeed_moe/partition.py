"""ZeRO's partition of a model's parameters, and what this rank updates of each.

DeepSpeed lays parameters end to end in rows: the shared ones in one row that is cut over all ranks,
those of experts in another that is cut over the ranks which own the same experts. It reduces
gradients so that each rank gets its piece, and gathers the pieces once they are updated. Its own
optimizer step is not used: between the two, the trainer scales, clips and steps as with any
backend, on the fragments of parameters that a piece is made of.

In float32 the weights that a rank updates are those that it computes with, so there is no second
copy of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.deepspeed_moe.settings import ZeroSettings
from fairseq_lite.parallel.shards.spans import Span, whole_span
from fairseq_lite.parallel.world import World


class _Rows:
    """What DeepSpeed takes for an optimizer: groups of parameters. It never steps."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.state: dict[Any, Any] = {}


@dataclass(frozen=True)
class Fragment:
    """What this rank updates of a parameter, possibly nothing.

    Attributes:
        param: the parameter.
        span: the stretch of it.
        tensor: the same numbers, in the parameter's shape or as some of its rows where they are;
            its `grad` is what they are updated by.
        group: the number of the row it lies in.
        place: where in this rank's piece of the row it begins.
        factor: what its gradient is multiplied by.
    """

    param: nn.Parameter
    span: Span
    tensor: Tensor
    group: int
    place: int
    factor: float


class Partition:
    """The trained parameters of a model under ZeRO 1 or 2.

    Args:
        model: on its device, the same on all ranks but for their experts.
        world: the ranks.
        asked: the settings.
        expert_groups: DeepSpeed's name of the groups of each expert parameter, and the factor of
            its gradients.

    Attributes:
        fragments: by the first name of a parameter, in the model's order.

    Raises:
        ConfigError: parameters that are not float32, or none at all.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        asked: ZeroSettings,
        expert_groups: Mapping[nn.Parameter, tuple[str, float]],
    ) -> None:
        self._world = world
        self._names = {
            param: name
            for name, param in model.named_parameters()
            if param.requires_grad and param.numel()
        }
        if not self._names:
            raise ConfigError("the model has no parameter that needs a gradient: nothing to train")
        for param, name in self._names.items():
            if param.dtype != torch.float32:
                raise ConfigError(
                    f"ZeRO {asked.stage} takes float32 parameters, and {name} is "
                    f"{str(param.dtype).removeprefix('torch.')}: use --zero-stage 0"
                )
        self._used = dict.fromkeys(self._names, False)
        self._zero = self._cut(asked, expert_groups)
        self.fragments = {
            self._names[param]: self._fragment(i, param, expert_groups.get(param, ("", 1.0))[1])
            for i, params in enumerate(self._zero.bit16_groups)
            for param in params
        }
        self._by_place = {
            (each.param.data_ptr(), each.param.numel()): each for each in self.fragments.values()
        }

    def _cut(
        self, asked: ZeroSettings, expert_groups: Mapping[nn.Parameter, tuple[str, float]]
    ) -> Any:
        """DeepSpeed's object over the parameters, which become views of its rows."""
        groups = importlib.import_module("deepspeed.utils.groups")
        rows: dict[str, dict[str, Any]] = {}
        for param in self._names:
            name = expert_groups[param][0] if param in expert_groups else ""
            row = rows.setdefault(name, {"params": [], "name": name, "moe": bool(name)})
            row["params"].append(param)
        # In an order that is the same on every rank, unlike that of DeepSpeed's own function.
        ordered = [rows[name] for name in sorted(rows)]
        experts = any(row["moe"] for row in ordered)
        zero = importlib.import_module(
            "deepspeed.runtime.zero.stage_1_and_2"
        ).DeepSpeedZeroOptimizer(
            _Rows(ordered),
            self._names,
            timers=importlib.import_module("deepspeed.utils.timer").NoopTimer(),
            optimizer_params=None,
            contiguous_gradients=True,
            # DeepSpeed allocates a whole bucket; a larger one than all gradients never fills.
            reduce_bucket_size=min(
                asked.reduce_bucket_size, sum(param.numel() for param in self._names)
            ),
            use_multi_rank_bucket_allreduce=asked.use_multi_rank_bucket_allreduce,
            dp_process_group=groups._get_data_parallel_group(),
            expert_parallel_group=groups._get_expert_parallel_group_dict() if experts else None,
            expert_data_parallel_group=(
                groups._get_expert_data_parallel_group_dict() if experts else None
            ),
            reduce_scatter=True,
            overlap_comm=False,
            communication_data_type=torch.float32,
            partition_grads=asked.stage == 2,
            round_robin_gradients=asked.round_robin_gradients,
            has_moe_layers=experts,
        )
        # Its hooks reduce gradients while backward produces them, in the order in which it does;
        # ranks that use different parameters would then add up what does not belong together.
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()
        for i, pieces in enumerate(zero.parallel_partitioned_bit16_groups):
            own = pieces[self._place(zero, i)]
            zero.single_partition_of_fp32_groups[i] = own
            zero.optimizer.param_groups[i]["params"] = [own]
        for param in self._names:
            param._hp_mapping = None  # type: ignore[attr-defined]  # views of the copy
        return zero

    @staticmethod
    def _place(zero: Any, group: int) -> int:
        """This rank's place among those that a row is cut over."""
        return dist.get_rank(group=zero.real_dp_process_group[group])

    def _fragment(self, group: int, param: nn.Parameter, factor: float) -> Fragment:
        row, size = self._zero.bit16_groups_flat[group], int(self._zero.partition_size[group])
        offset = (param.data_ptr() - row.data_ptr()) // param.element_size()
        begin = self._place(self._zero, group) * size
        start = min(max(begin - offset, 0), param.numel())
        stop = max(min(begin + size - offset, param.numel()), start)
        values = param.detach().view(-1)[start:stop]
        if not values.numel():
            start = 0
        span = Span(tuple(param.shape), start, values)
        return Fragment(param, span, span.in_shape(), group, offset + start - begin, factor)

    # -- gradients ------------------------------------------------------------------------------

    def reduce(self, *, last: bool) -> None:
        """Sum up the parameters' gradients over ranks, each keeping its piece.

        Args:
            last: whether no more come in this update; then fragments get theirs.
        """
        for param in self._names:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            else:
                self._used[param] = True
        self._zero.set_gradient_accumulation_boundary(last)
        self._zero.reduce_gradients(pipeline_parallel=True)  # "backward is handled outside"
        for param in self._names:
            param.grad = None
        if last:
            self._hand_out()

    def _hand_out(self) -> None:
        used = self._used_by_any()
        averaged = self._zero.averaged_gradients
        pieces = {i: _by_place(grads) for i, grads in averaged.items() if grads is not None}
        for fragment in self.fragments.values():
            tensor = fragment.tensor
            if not used[fragment.param]:
                tensor.grad = None
            elif not tensor.numel():
                tensor.grad = torch.zeros_like(tensor)
            else:
                grad = pieces[fragment.group][fragment.place]
                assert grad.numel() == tensor.numel(), "DeepSpeed cuts otherwise"
                tensor.grad = grad.reshape(tensor.shape)
                if fragment.factor != 1:
                    tensor.grad.mul_(fragment.factor)
        for i in averaged:
            averaged[i] = self._zero.all_grad_tensors[i] = None
        self._used = dict.fromkeys(self._names, False)

    def _used_by_any(self) -> dict[nn.Parameter, bool]:
        """Whether a parameter had a gradient on any rank; experts of a layer are used together."""
        mine = list(self._used.values())
        flags = torch.tensor(mine, dtype=torch.float32, device=self._world.device)
        self._world.all_reduce(flags, "max")
        if all(mine):  # no need to wait for what a GPU says
            return self._used
        return {p: flag > 0 for p, flag in zip(self._used, flags.tolist(), strict=True)}

    # -- weights --------------------------------------------------------------------------------

    def span_of(self, tensor: Tensor) -> Span:
        """What this rank updates of a tensor of the model's state; all of what is not trained."""
        fragment = self._by_place.get((tensor.data_ptr(), tensor.numel()))
        return whole_span(tensor) if fragment is None else fragment.span

    def gather(self) -> None:
        """Fetch the pieces of weights that other ranks have updated."""
        self._zero.update_lp_params()


def _by_place(grads: list[Tensor]) -> dict[int, Tensor]:
    """Gradients by where they begin in a piece, of which they are the parts in order."""
    found: dict[int, Tensor] = {}
    place = 0
    for grad in grads:
        if grad.numel():
            found[place] = grad
            place += grad.numel()
    return found
