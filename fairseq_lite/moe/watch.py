"""What becomes of tokens in layers of experts, in numbers that add up over batches and ranks.

A layer's counts are one vector, which travels with the sums of the loss in the same collective; the
figures of a log line, and those of each layer, are made of it when there is something to log.

Axes: E experts, K choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.moe.router import RouterReport

# A layer's vector is called experts.K.NAME: its length and K say what E is.
_PREFIX = "experts."
# What stands behind the counts of each expert and of each choice.
_SINGLE = 5
# gshard's idea of the busiest and the idlest experts: so many of them.
_FRACTION = 0.2


def report_sums(reports: Mapping[str, RouterReport], *, training: bool) -> dict[str, Tensor]:
    """What one batch adds to the sums that are logged: a vector for each layer.

    Args:
        reports: of the layers, by name.
        training: whether the balance of each batch counts, as in the loss, or, in evaluation, that
            of all of them together, which does not depend on how they are cut.
    """
    alike: dict[torch.Size, list[str]] = {}
    for name, report in reports.items():
        alike.setdefault(report.wanted.shape, []).append(name)
    vectors: dict[str, Tensor] = {}
    for names in alike.values():
        rows = _matrix([reports[name] for name in names], training)
        vectors.update(zip(names, rows, strict=True))
    return {
        f"{_PREFIX}{report.wanted.size(0)}.{name}": vectors[name]
        for name, report in reports.items()
    }


def _matrix(reports: Sequence[RouterReport], training: bool) -> Sequence[Tensor]:
    """The vectors of layers of one shape, made together: as few kernels as for one layer."""

    def each(field: str) -> Tensor:
        values = torch.stack([getattr(report, field).detach() for report in reports])
        return values.double().view(len(reports), -1)

    tokens = each("tokens")
    counted = tokens if training else torch.zeros_like(tokens)
    parts = [each(field) for field in ("load", "wanted", "probability", "dropped")]
    parts += [tokens, each("entropy"), counted, counted * each("balance"), tokens * each("z")]
    return torch.cat(parts, dim=1).unbind(0)


@dataclass(frozen=True)
class LayerSums:
    """The sums of one layer.

    Attributes:
        load: (E,) rows computed.
        wanted: (K, E) first, second choices, before dropping.
        probability: (E,) of the gate's.
        dropped: (K,) choices dropped.
        tokens: routed.
        entropy: of the gate's probabilities, in nats.
        counted: tokens of the batches whose own balance was added up; 0 in evaluation.
        balances: the sum of batches' balance x tokens.
        z: the sum of batches' z-loss x tokens.
    """

    load: Tensor
    wanted: Tensor
    probability: Tensor
    dropped: Tensor
    tokens: float
    entropy: float
    counted: float
    balances: float
    z: float

    @classmethod
    def of(cls, vector: Tensor, choices: int) -> LayerSums:
        """Take a layer's vector apart; the inverse of `report_sums`."""
        experts = (vector.numel() - choices - _SINGLE) // (choices + 2)
        load, wanted, probability, dropped, single = vector.split(
            [experts, choices * experts, experts, choices, _SINGLE]
        )
        return cls(load, wanted.view(choices, experts), probability, dropped, *single.tolist())

    @property
    def balance(self) -> float:
        """The balance loss, 1 when balanced: mean over batches; in evaluation that of all data."""
        if self.counted:
            return self.balances / self.counted
        size = self.tokens or 1.0
        return self.load.numel() * float((self.probability / size * (self.wanted[0] / size)).sum())

    @property
    def mean_z(self) -> float:
        """The z-loss."""
        return self.z / (self.tokens or 1.0)

    @property
    def mean_entropy(self) -> float:
        """The entropy of the gate's probabilities, in nats."""
        return self.entropy / (self.tokens or 1.0)

    def shown(self) -> dict[str, Any]:
        """What a log says of the layer; its keys are explained in docs/moe.md."""
        return {
            "balance": _short(self.balance),
            "dropped": _short(_share(self.dropped.sum(), self.wanted.sum())),
            "entropy": _short(self.mean_entropy),
            "unused": int((self.load == 0).sum()),
            "load": _shares(self.load),
            "wanted": _shares(self.wanted.sum(0)),
        }


def layers_of(sums: Mapping[str, Any]) -> dict[str, LayerSums]:
    """The layers of experts that sums tell of, by name, in the model's order."""
    found = {}
    for key, value in sums.items():
        if key.startswith(_PREFIX):
            choices, name = key.removeprefix(_PREFIX).split(".", 1)
            found[name] = LayerSums.of(value, int(choices))
    return found


def shown_layers(sums: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a log says of each layer."""
    return {name: layer.shown() for name, layer in layers_of(sums).items()}


def metadata(sums: Mapping[str, Any]) -> dict[str, float]:
    """gshard's figures, means over layers.

    They are made of the sums of an interval over all batches and ranks, where gshard's are means
    over batches and ranks: an expert is unused when it was so all along.
    """
    rows = [_figures(layer) for layer in layers_of(sums).values()]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows)
        for key in keys
    }


def _figures(layer: LayerSums) -> dict[str, float]:
    figures = {
        f"overflow_expert{k + 1}": 100.0 * _share(layer.dropped[k], wanted.sum())
        for k, wanted in enumerate(layer.wanted)
    }
    figures["entropy_gating"] = layer.mean_entropy
    for k, wanted in enumerate(layer.wanted):
        ranking = wanted.sort(descending=True).values
        several = max(math.ceil(_FRACTION * len(wanted)), 1)
        figures[f"expert{k + 1}_balance_top"] = 100.0 * _share(
            ranking[:several].sum(), wanted.sum()
        )
        figures[f"expert{k + 1}_balance_bottom"] = 100.0 * _share(
            ranking[-several:].sum(), wanted.sum()
        )
        figures[f"unused_expert{k + 1}_count"] = float((wanted == 0).sum())
    return figures


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole.clamp_min(1.0))


def _shares(counts: Tensor) -> list[float]:
    return [_short(share) for share in (counts / counts.sum().clamp_min(1.0)).tolist()]


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
