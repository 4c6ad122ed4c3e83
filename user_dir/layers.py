"""The mixture of experts of a layer, computed by DeepSpeed or by this project, on one set of names.

Both have `gate.wg` and `experts.0`, `experts.1`, …, start from the same weights and read each
other's checkpoints. Axes: S tokens, D width, E experts, K choices of a token, P ranks that share
the experts, C slots of an expert for one rank's tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lite.errors import MissingDependency
from fairseq_lite.moe.experts import Experts
from fairseq_lite.moe.layer import MoELayer, together
from fairseq_lite.moe.router import RouterReport
from fairseq_lite.parallel.deepspeed_moe import comm

from .gate import Gate
from .options import DeepSpeedOptions, GateOptions

Make = Callable[[], nn.Module]


class NativeMixture(MoELayer):
    """This project's layer with DeepSpeed's rules.

    Padding does not reach the gate: it goes to no expert, takes no place, and no mean counts it.

    Args:
        dim: D.
        options: of the stack.
        make: makes one expert, (N, D) -> (N, D).
        name: the layer's, as in `decoder.layers.1`.
    """

    gate: Gate
    experts: Experts

    def __init__(self, dim: int, options: DeepSpeedOptions, make: Make, name: str) -> None:
        assert isinstance(options.router, GateOptions)
        gate = Gate(dim, options.router)
        super().__init__(dim, options, make, name, gate=gate, group_size=options.group_size)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, RouterReport]:
        """Run the layer; see `MoELayer.forward`."""
        flat = x.reshape(-1, x.size(-1))
        if padding is None:
            out, report = self.mix(flat)
            return out.view_as(x), report
        real = (~padding).reshape(-1).nonzero()[:, 0]
        out, report = self.mix(flat.index_select(0, real))
        whole = torch.zeros(flat.shape, dtype=out.dtype, device=out.device)
        return whole.index_copy(0, real, out).view_as(x), report

    def mix(self, rows: Tensor) -> tuple[Tensor, RouterReport]:
        """Send tokens (S, D) to their experts and add up what comes back: (S, D)."""
        return super().forward(rows)


class DeepSpeedMixture(NativeMixture):
    """DeepSpeed's MOELayer and TopKGate over our gate's weights and our experts, in training.

    In evaluation the native layer computes. DeepSpeed's needs all processes of a group in the same
    layer at the same moment, which they are not while they translate, each at its own pace; and so
    a result does not depend on their number, and DeepSpeed need not be there.
    """

    def __init__(self, dim: int, options: DeepSpeedOptions, make: Make, name: str) -> None:
        super().__init__(dim, options, make, name)
        # DeepSpeed's parts come with the first batch: a model may be built without memory. They are
        # no submodules (a tuple hides them), since all their parameters are those of the gate.
        self._parts: tuple[Any, _CommonSlots] | None = None

    def mix(self, rows: Tensor) -> tuple[Tensor, RouterReport]:
        if not self.training:
            return super().mix(rows)
        if self._parts is None:
            self._parts = self._build(rows.device)
        layer, gate = self._parts
        gate.follow(self.gate.options, rows.size(0))
        out = layer(rows, None)
        report = self._report(rows, layer.l_aux, gate.chosen, layer.exp_counts)
        out, balance, z = together(out, report.balance, report.z)
        return out, report._replace(balance=balance, z=z)

    def _build(self, device: torch.device) -> tuple[Any, _CommonSlots]:
        moe = deepspeed_moe(device)
        exchange = self.experts.exchange
        if exchange.group.size > 1:
            comm.ensure_comm(device)
        with torch.device("meta"):
            gate = moe.TopKGate(self.gate.wg.in_features, self.gate.options.num_experts)
        gate.wg = self.gate.wg  # the very module: whatever shards or moves it does so for both
        slots = _CommonSlots(gate, exchange.group)
        layer = moe.MOELayer(
            slots,
            self._run_slots,
            "",
            exchange.layout.group_size,
            len(exchange.owned),
        )
        layer.ep_group = exchange.group.handle
        return layer, slots

    def _run_slots(self, slots: Tensor) -> Tensor:
        """(P, local experts, C, D), as they came from the ranks, to the same."""
        places, local, capacity, dim = slots.shape
        rows = slots.transpose(0, 1).reshape(-1, dim)
        out: Tensor = self.experts(rows, [places * capacity] * local)
        return out.view(local, places, capacity, dim).transpose(0, 1)

    def _report(
        self, rows: Tensor, balance: Tensor, chosen: Tensor, counts: Tensor
    ) -> RouterReport:
        """What DeepSpeed says, and what it does not say, from the gate without noise.

        Args:
            rows: (S, D).
            balance: DeepSpeed's `l_aux`.
            chosen: (K, S), -1 where a token was turned away.
            counts: (E,) choices before any was.
        """
        experts = self.gate.options.num_experts
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.float(), self.gate.wg.weight.float())
        z = logits.logsumexp(dim=-1).square().mean()
        with torch.no_grad():
            probs = F.softmax(logits, dim=-1)
            kept = chosen >= 0
            wanted = counts[None]
            if chosen.size(0) == 2:
                # With Jitter the first choice may be another in a few cases.
                first = torch.bincount(probs.argmax(dim=-1), minlength=experts)
                wanted = torch.stack([first, counts - first])
            tokens = counts.new_tensor(rows.size(0))
            entropy = -(probs * probs.clamp_min(1e-30).log()).sum()
        return RouterReport(
            balance=balance,
            z=z,
            load=torch.bincount(chosen[kept], minlength=experts),
            wanted=wanted,
            dropped=tokens - kept.sum(dim=1),
            tokens=tokens,
            entropy=entropy,
            probability=probs.sum(dim=0),
        )


class _CommonSlots:
    """DeepSpeed's gate with as many slots an expert as the rank of the group that needs most has.

    A rank's capacity follows from its own tokens, and ranks rarely have equally many. DeepSpeed
    lets the sizes of what they send differ then, and the exchange fails; without dropping, top-1
    cuts the common size down to the rank's own tokens, with the same end. A slot more is a row of
    zeros that nobody reads.

    Args:
        gate: DeepSpeed's.
        group: the ranks.

    Attributes:
        chosen: (K, S) the experts of the last batch, -1 where a token was turned away.
    """

    def __init__(self, gate: Any, group: Any) -> None:
        self.gate = gate
        self.group = group
        self.chosen = torch.empty(0)

    def follow(self, cfg: GateOptions, tokens: int) -> None:
        """Set the rules for the next batch.

        Args:
            cfg: the rules.
            tokens: S.
        """
        gate = self.gate
        gate.k = cfg.top_k
        gate.drop_tokens = cfg.capacity_factor is not None
        gate.capacity_factor = cfg.capacity_factor or 1.0
        # No expert gets more than S, and DeepSpeed insists that there be so many.
        gate.min_capacity = min(cfg.min_capacity, tokens) if gate.drop_tokens else 0
        gate.noisy_gate_policy = "RSample" if cfg.rsample else "Jitter" if cfg.jitter else None
        gate.use_rts = cfg.random_tokens
        gate.top2_2nd_expert_sampling = cfg.second_policy == "sampling"

    def __call__(self, rows: Tensor, *more: Any) -> tuple[Any, ...]:
        """As TopKGate's, in float32 under autocast too."""
        with torch.autocast(rows.device.type, enabled=False):
            l_aux, slots, experts, chosen, places, weights, counts = self.gate(rows, *more)
        self.chosen = chosen.detach().long()
        most = torch.as_tensor(slots, dtype=torch.int64).to(rows.device).reshape(1)
        slots = int(self.group.all_reduce(most.clone(), "max"))
        return l_aux, slots, experts, chosen, places, weights, counts


_INSTEAD = "or add --moe-layer native, which has the same parameters and results"


def require_deepspeed() -> None:
    """Say what to install where DeepSpeed is not, without importing it.

    Raises:
        MissingDependency: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependency(
            f"--moe-layer deepspeed needs DeepSpeed: {comm.INSTALL}, {_INSTEAD}"
        )


def deepspeed_moe(device: torch.device | str) -> Any:
    """DeepSpeed's module of mixtures of experts.

    Raises:
        MissingDependency: DeepSpeed does not work here, or is too old.
    """
    comm.load(device)
    sharded_moe = importlib.import_module("deepspeed.moe.sharded_moe")
    if not hasattr(sharded_moe, "_sparse_encode"):
        raise MissingDependency(
            "--moe-layer deepspeed needs a DeepSpeed that dispatches sparsely: pip install -U"
            f" 'deepspeed>=0.19', {_INSTEAD}"
        )
    return sharded_moe
