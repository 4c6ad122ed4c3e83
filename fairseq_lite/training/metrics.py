"""What is added up while training and validating, and the numbers a log line shows of it.

Everything is a value: a `Meters` holds the sums of one interval (since the last log line, or of the
epoch) and turns them into fairseq's keys, in fairseq's order and rounding. The criterion's own
metrics are computed from sums over the whole interval, so they are exact means and not means of
means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Derive = Callable[[Mapping[str, Any]], Mapping[str, float]]
Clock = Callable[[], float]

#: Digits a value is rounded to before it is printed; what is not here is not rounded.
DIGITS: Mapping[str, int] = {
    "loss": 3,
    "inner_loss": 3,
    "nll_loss": 3,
    "ppl": 2,
    "accuracy": 3,
    "bleu": 2,
    "moe_gate_loss": 8,
    "moe_z_loss": 8,
    "overflow_expert1": 3,
    "overflow_expert2": 3,
    "entropy_gating": 3,
    "expert1_balance_top": 3,
    "expert1_balance_bottom": 3,
    "unused_expert1_count": 3,
    "expert2_balance_top": 3,
    "expert2_balance_bottom": 3,
    "unused_expert2_count": 3,
    "wps": 1,
    "ups": 2,
    "wpb": 1,
    "bsz": 1,
    "gnorm": 3,
    "clip": 1,
    "loss_scale": 4,
    "train_wall": 0,
    "gb_free": 1,
    "wall": 0,
}

# fairseq's sort keys. A criterion's and a task's metrics come first, in the order they are given.
_PRIORITY: Mapping[str, int] = {
    "wps": 90,
    "ups": 100,
    "wpb": 180,
    "bsz": 190,
    "num_updates": 200,
    "lr": 300,
    "gnorm": 400,
    "clip": 500,
    "loss_scale": 700,
    "train_wall": 800,
    "gb_free": 1500,
}


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Round each value as fairseq rounds the key of that name, keeping the order."""
    return {k: round(v, DIGITS[k]) if k in DIGITS else v for k, v in values.items()}


class _Rate:
    """Something per second, since the meter was made or reset.

    The first interval of a run counts from the end of the first update, as fairseq's does: that
    update pays for allocation and warm-up, and would be the only one in a short interval.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.started = False
        self.n = 0.0
        self._since = 0.0

    def add(self, n: float) -> None:
        if self.started:
            self.n += n
        else:
            self.reset()

    def reset(self, n: float = 0.0, seconds: float = 0.0) -> None:
        self.started, self.n, self._since = True, n, self._clock() - seconds

    @property
    def seconds(self) -> float:
        return self._clock() - self._since if self.started else 0.0

    @property
    def value(self) -> float:
        seconds = self.seconds
        return self.n / seconds if seconds > 0 else 0.0


class Meters:
    """The sums of one interval.

    Args:
        derive: from the criterion's and the task's sums to their metrics, in log order: loss,
            nll_loss, ppl, accuracy, then BLEU and the like.
        clock: seconds from some point in the past.
    """

    def __init__(self, derive: Derive, clock: Clock = time.perf_counter) -> None:
        self._derive = derive
        self._wps, self._ups = _Rate(clock), _Rate(clock)
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Any] = {}
        self.batches = 0
        self.updates = 0
        self.gnorm = 0.0
        self.clip: float | None = None
        self.train_wall: float | None = None
        self.latest: dict[str, float] = {}

    def start(self) -> None:
        """Count tokens a second from now on; otherwise from the end of the first batch on."""
        self._wps.reset()

    def add(self, sums: Mapping[str, Any], batches: int = 1) -> None:
        """Add the sums of a batch (over all ranks and micro-batches).

        Args:
            sums: `loss`, `ntokens`, `nsentences`, `sample_size` and what else the criterion and the
                task count; numbers, one-element tensors or vectors.
            batches: how many batches the sums stand for; `wpb` and `bsz` are means over them.
        """
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + _summand(value)
        self.batches += batches
        self._wps.add(float(sums.get("ntokens", 0)))

    def add_update(
        self,
        *,
        grad_norm: float | Tensor,
        clip_norm: float,
        num_updates: int,
        lr: float,
        seconds: float,
        loss_scale: float | None = None,
        gb_free: float | None = None,
    ) -> None:
        """Add what concerns an update and not its data.

        Args:
            grad_norm: global norm before clipping.
            clip_norm: `--clip-norm`; with 0 there is no `clip`.
            num_updates: updates made, this one included.
            lr: the learning rate set after it.
            seconds: time the update took, without waiting for data.
            loss_scale: of float16.
            gb_free: free GPU memory.
        """
        norm = float(grad_norm)
        self._ups.add(1.0)
        self.updates += 1
        self.gnorm += norm
        if clip_norm > 0:
            self.clip = (self.clip or 0.0) + (100.0 if norm > clip_norm else 0.0)
        self.add_seconds(seconds)
        self.latest.update(num_updates=num_updates, lr=lr)
        if loss_scale is not None:
            self.latest["loss_scale"] = loss_scale
        if gb_free is not None:
            self.latest["gb_free"] = gb_free

    def add_seconds(self, seconds: float) -> None:
        """Add time spent training without an update to show for it (an overflow)."""
        self.train_wall = (self.train_wall or 0.0) + seconds

    def values(self) -> dict[str, float]:
        """The metrics so far, in fairseq's order, not rounded."""
        values: dict[str, float] = {}
        if self.batches:
            values.update(self._derive(self.sums))
        own: dict[str, float] = dict(self.latest)
        if self.batches:
            own["wps"] = self._wps.value
            own["wpb"] = self.sums.get("ntokens", 0.0) / self.batches
            own["bsz"] = self.sums.get("nsentences", 0.0) / self.batches
        if self.updates:
            own["ups"] = self._ups.value
            own["gnorm"] = self.gnorm / self.updates
            if self.clip is not None:
                own["clip"] = self.clip / self.updates
        if self.train_wall is not None:
            own["train_wall"] = self.train_wall
        values.update(sorted(own.items(), key=lambda item: _PRIORITY[item[0]]))
        return values

    def reset(self) -> None:
        """Begin the next interval; the latest learning rate and the like stay."""
        latest = self.latest
        self._clear()
        self.latest = latest
        if self._wps.started:
            self._wps.reset()
        if self._ups.started:
            self._ups.reset()

    def state(self) -> list[tuple[int, str, str, dict[str, Any]]]:
        """The interval as fairseq's list of (priority, key, meter class, meter state).

        fairseq reads the visible keys; the sums behind them stand under keys that begin with an
        underscore, which fairseq loads but never prints, and make our own resume exact.
        """
        rows: list[tuple[int, str, str, dict[str, Any]]] = []
        if self.batches:
            weight = self.sums.get("sample_size", 0.0)
            tokens = self.sums.get("ntokens", 0.0)
            for key, value in self._derive(self.sums).items():
                if key in ("loss", "nll_loss"):
                    count = weight if key == "loss" else tokens
                    rows.append(_mean(10, key, value * count, count, value))
        for key, value in self.sums.items():
            stored = value.tolist() if isinstance(value, Tensor) else value
            rows.append(_mean(10, f"_{key}", stored, self.batches, stored))
        for key, rate, digits in (("wps", self._wps, 1), ("ups", self._ups, 2)):
            if rate.started:
                state = {"init": rate.seconds, "n": rate.n, "round": digits}
                rows.append((_PRIORITY[key], key, "TimeMeter", state))
        if self.batches:
            for key, of in (("wpb", "ntokens"), ("bsz", "nsentences")):
                total = self.sums.get(of, 0.0)
                rows.append(_mean(_PRIORITY[key], key, total, self.batches, total))
        for key, value in self.latest.items():
            rows.append(_mean(_PRIORITY[key], key, 0, 0, value))
        if self.updates:
            rows.append(_mean(400, "gnorm", self.gnorm, self.updates, self.gnorm))
            if self.clip is not None:
                rows.append(_mean(500, "clip", self.clip, self.updates, self.clip))
        if self.train_wall is not None:
            state = {"sum": self.train_wall, "n": 0.0, "round": 0}
            rows.append((_PRIORITY["train_wall"], "train_wall", "StopwatchMeter", state))
        return sorted(rows, key=lambda row: row[0])

    def load_state(self, rows: Sequence[Sequence[Any]]) -> None:
        """Take over an interval written by `state`, or by fairseq.

        fairseq stores means instead of sums: those of `loss` and `nll_loss` are turned back.
        """
        self._clear()
        meters = {str(key): state for _, key, _, state in rows}
        for key in ("num_updates", "lr", "loss_scale"):
            if key in meters and meters[key].get("val") is not None:
                self.latest[key] = _number(meters[key]["val"])
        if "num_updates" in self.latest:
            self.latest["num_updates"] = int(self.latest["num_updates"])
        if "wpb" in meters:
            self.batches = int(_number(meters["wpb"]["count"]))
        self.sums = _sums(meters)
        if "gnorm" in meters:
            self.gnorm = _number(meters["gnorm"]["sum"])
            self.updates = int(_number(meters["gnorm"]["count"]))
        if "clip" in meters and self.updates:
            self.clip = _number(meters["clip"]["sum"])
        if "train_wall" in meters:
            self.train_wall = _number(meters["train_wall"]["sum"])
        for key, rate in (("wps", self._wps), ("ups", self._ups)):
            if key in meters:
                rate.reset(_number(meters[key]["n"]), _number(meters[key]["init"]))


def _mean(
    priority: int, key: str, total: Any, count: float, value: Any
) -> tuple[int, str, str, dict[str, Any]]:
    state = {"val": value, "sum": total, "count": count, "round": DIGITS.get(key)}
    return (priority, key, "AverageMeter", state)


def _number(value: Any) -> float:
    return float(value.item() if hasattr(value, "item") else value)


def _summand(value: Any) -> Any:
    """A number as float; a vector, also one that was stored as a list, as it is to be added."""
    if isinstance(value, list):
        return torch.tensor(value, dtype=torch.float64)
    if isinstance(value, Tensor) and value.numel() > 1:
        return value.detach().to("cpu", torch.float64)
    return _number(value)


def _sums(meters: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Our own sums; without them, what can be had from fairseq's means (base 2, so times ln 2)."""
    if "_sample_size" in meters:
        return {key[1:]: _summand(state["sum"]) for key, state in meters.items() if key[:1] == "_"}
    sums: dict[str, Any] = {}
    ln2 = 0.6931471805599453
    for key, total, counts in (
        ("loss", "loss", "sample_size"),
        ("nll_loss", "nll_loss", "ntokens"),
        ("wpb", "ntokens", None),
        ("bsz", "nsentences", None),
    ):
        if key in meters:
            scale = 1.0 if counts is None else ln2
            sums[total] = _number(meters[key]["sum"]) * scale
            if counts is not None:
                sums[counts] = _number(meters[key]["count"])
    return sums


class TrainMetrics:
    """The two intervals of training: since the last log line, and since the epoch began.

    Args:
        derive: see `Meters`.
        clock: see `Meters`.
    """

    def __init__(self, derive: Derive, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._born = clock()
        self.inner = Meters(derive, clock)
        self.epoch = Meters(derive, clock)

    def add(self, sums: Mapping[str, Any], **update: Any) -> None:
        """Add one update to both; `update` are the arguments of `Meters.add_update`."""
        for meters in (self.inner, self.epoch):
            meters.add(sums)
            meters.add_update(**update)

    def add_seconds(self, seconds: float) -> None:
        """Add the time of an update that was skipped."""
        for meters in (self.inner, self.epoch):
            meters.add_seconds(seconds)

    def report(self, meters: Meters) -> dict[str, float]:
        """One of the two as it is logged: rounded, with `wall`, the time since the run began."""
        return rounded({**meters.values(), "wall": self._clock() - self._born})

    def state_dict(self) -> dict[str, list[tuple[int, str, str, dict[str, Any]]]]:
        """What fairseq stores under `extra_state["metrics"]`."""
        return {"train": self.epoch.state(), "train_inner": self.inner.state()}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """Take over a state written by `state_dict` or by fairseq; what it lacks stays empty."""
        for name, meters in (("train", self.epoch), ("train_inner", self.inner)):
            if name in state:
                meters.load_state(state[name])


def valid_report(
    meters: Meters, *, num_updates: int, best: tuple[str, float] | None = None
) -> dict[str, float]:
    """A validation as it is logged: rounded, with the number of updates and the best so far.

    Args:
        meters: what was added while validating.
        num_updates: updates made so far.
        best: ("best_loss", 4.2): key and value of the best, this validation included; None before
            the first checkpoint.
    """
    values = rounded(meters.values())
    values["num_updates"] = num_updates
    if best is not None:
        values[best[0]] = best[1]
    return values
