"""Learning-rate schedules: pure functions of the number of updates and the epoch.

Each class docstring is the formula. u is the number of updates already made, so the first update
runs with lr(0); the log shows lr(u) after update u. Formulas, names and defaults are fairseq's.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.optim.api import SCHEDULES, Schedule


def _warmup_flag(default: int = 0) -> Any:
    return flag(default, "raise the learning rate linearly over the first N updates")


def _warmup_init_flag() -> Any:
    return flag(-1.0, "learning rate at the start of the warm-up; below 0: the schedule's own")


def _linear(start: float, end: float, u: int, steps: int) -> float:
    return start + u * ((end - start) / steps)


class WarmedUp(Schedule):
    """What begins with a linear warm-up over --warmup-updates, to the first --lr.

    Formula::

        lr(u) = init + u * (peak - init) / warmup        u < warmup

    init is --warmup-init-lr, by default `lowest()`.
    """

    def prepare(self) -> None:
        """Find where the warm-up begins and ends."""
        self.warmup: int = max(self.cfg.warmup_updates, 0)
        lowest, given = self.lowest(), self.cfg.warmup_init_lr
        self.init: float = given if given >= 0 else lowest

    def lowest(self) -> float:
        """The learning rate that the schedule does not go below."""
        return 0.0

    def warming_up(self, num_updates: int) -> bool:
        """Whether the warm-up goes on after so many updates."""
        return num_updates < self.warmup

    def lr(self, num_updates: int, epoch: int) -> float:
        """See the class docstring; after the warm-up, `warm`."""
        if self.warming_up(num_updates):
            return _linear(self.init, self.peak, num_updates, self.warmup)
        return self.warm(num_updates)

    @abstractmethod
    def warm(self, num_updates: int) -> float:
        """The learning rate once the warm-up is over."""


class _WithMinimum(WarmedUp):
    """What falls to --min-lr."""

    def lowest(self) -> float:
        lowest: float = self.cfg.min_lr
        if self.peak <= lowest:
            raise ConfigError(f"--lr {self.peak:g}: expected more than --min-lr {lowest:g}")
        return lowest


@dataclass(frozen=True)
class FixedConfig:
    """One learning rate an epoch, then shrinking."""

    force_anneal: int | None = flag(
        None, "from this epoch on, shrink the learning rate every epoch", aliases=("--fa",)
    )
    lr_shrink: float = flag(0.1, "shrink the learning rate by this factor")
    warmup_updates: int = _warmup_flag()


@SCHEDULES.register("fixed", config=FixedConfig)
class Fixed(Schedule):
    """`--lr A,B,C` by epoch, shrinking from epoch F = --force-anneal on.

    Formula::

        base(e) = lrs[min(e, len(lrs)) - 1]              e < F, or no F
                  lrs[-1] * shrink ** (e + 1 - F)        e >= F
        lr(u, e) = base(e) * (u + 1) / warmup            u < warmup
                   base(e)                               otherwise
    """

    takes_lr_by_epoch = True
    cfg: FixedConfig

    def lr(self, num_updates: int, epoch: int) -> float:
        """See the class docstring."""
        force = self.cfg.force_anneal
        if force is None or epoch < force:
            base = self.lrs[min(epoch, len(self.lrs)) - 1]
        else:
            base = self.lrs[-1] * self.cfg.lr_shrink ** (epoch + 1 - force)
        if num_updates < self.cfg.warmup_updates:
            return base * ((num_updates + 1) / self.cfg.warmup_updates)
        return base


@dataclass(frozen=True)
class InverseSqrtConfig:
    """Warm-up, then decay by the square root of the updates."""

    warmup_updates: int = _warmup_flag(4000)
    warmup_init_lr: float = _warmup_init_flag()


@SCHEDULES.register("inverse_sqrt", config=InverseSqrtConfig)
class InverseSqrt(WarmedUp):
    """Linear warm-up, then the inverse square root (Vaswani et al., 2017).

    Formula::

        lr(u) = init + u * (peak - init) / warmup        u < warmup
                peak * sqrt(warmup) / sqrt(u)            otherwise

    init is --warmup-init-lr, by default 0. Without a warm-up, lr(u) = peak / sqrt(max(u, 1)).
    """

    cfg: InverseSqrtConfig

    def warm(self, num_updates: int) -> float:
        """See the class docstring."""
        # fairseq divides by zero without a warm-up; the formula's limit is a warm-up of one.
        return float(self.peak * max(self.warmup, 1) ** 0.5 * max(num_updates, 1) ** -0.5)


@dataclass(frozen=True)
class PolynomialDecayConfig:
    """Warm-up, then a polynomial down to an end value."""

    warmup_updates: int = _warmup_flag()
    force_anneal: int | None = flag(
        None, "from this epoch on, decay from the current learning rate", aliases=("--fa",)
    )
    end_learning_rate: float = flag(0.0, "learning rate at the end")
    power: float = flag(1.0, "exponent of the decay")
    total_num_update: float | None = flag(
        None, "updates until the end value is reached (default: --max-update)"
    )


@SCHEDULES.register("polynomial_decay", config=PolynomialDecayConfig)
class PolynomialDecay(Schedule):
    """Linear warm-up, then (1 - progress) ** power.

    Formula::

        lr(u) = base * u / warmup                                          u <= warmup
                (base - end) * (1 - (u - warmup) / (total - warmup)) ** power + end
                end                                                        u >= total

    base is the --lr of the epoch; fairseq counts that list from epoch 0 here, so with several
    values epoch 1 takes the second. From epoch --force-anneal on, base is the learning rate the
    epoch began with, so the decay compounds.
    """

    takes_lr_by_epoch = True
    cfg: PolynomialDecayConfig

    def prepare(self) -> None:
        """Find where the decay ends."""
        given = self.cfg.total_num_update
        total = self.max_update if given is None else given
        if total <= 0:
            raise ConfigError(
                "--lr-scheduler polynomial_decay needs --total-num-update N (or --max-update N)"
            )
        self.total = total
        self._annealed: float | None = None

    def begin_epoch(self, epoch: int, lr: float) -> None:
        """Note where an annealed epoch begins."""
        force = self.cfg.force_anneal
        if force is not None and epoch >= force:
            self._annealed = lr

    def lr(self, num_updates: int, epoch: int) -> float:
        """See the class docstring."""
        cfg, warmup = self.cfg, self.cfg.warmup_updates
        base = self.lrs[min(epoch, len(self.lrs) - 1)]
        if (
            cfg.force_anneal is not None
            and epoch >= cfg.force_anneal
            and self._annealed is not None
        ):
            base = self._annealed
        if warmup > 0 and num_updates <= warmup:
            return num_updates / warmup * base
        if num_updates >= self.total:
            return cfg.end_learning_rate
        remaining = 1 - (num_updates - warmup) / (self.total - warmup)
        return float((base - cfg.end_learning_rate) * remaining**cfg.power + cfg.end_learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """With the rate an annealed epoch began with, for an exact resume inside it."""
        state = super().state_dict()
        return state if self._annealed is None else {**state, "annealed": self._annealed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See the base class."""
        super().load_state_dict(state)
        self._annealed = state.get("annealed")


@dataclass(frozen=True)
class CosineConfig:
    """Cosine annealing with restarts."""

    warmup_updates: int = _warmup_flag()
    warmup_init_lr: float = _warmup_init_flag()
    min_lr: float = flag(0.0, "learning rate at the bottom of a period")
    t_mult: float = flag(1.0, "each period is this many times as long as the one before")
    lr_period_updates: float = flag(
        -1.0, "updates of the first period (default: --max-update less the warm-up)"
    )
    lr_shrink: float = flag(0.1, "shrink the learning rate by this factor each period")


@SCHEDULES.register("cosine", config=CosineConfig)
class Cosine(_WithMinimum):
    """Warm-up, then cosine annealing with restarts (Loshchilov and Hutter, 2017).

    Formula::

        lr(u) = init + u * (peak - init) / warmup                          u < warmup
        i     = index of the period that holds u - warmup
        t     = updates since that period began, T = its length (period * t_mult ** i)
        s     = shrink ** i
        lr(u) = s * (min + (peak - min) / 2 * (1 + cos(pi t / T)))

    init is --warmup-init-lr, by default min.
    """

    cfg: CosineConfig

    def prepare(self) -> None:
        """Find the length of the first period."""
        super().prepare()
        self.period: float = self.cfg.lr_period_updates
        if self.period <= 0:
            self.period = self.max_update - self.cfg.warmup_updates
            if self.max_update <= 0 or self.period <= 0:
                raise ConfigError(
                    "--lr-scheduler cosine needs --max-update N above --warmup-updates "
                    "(or --lr-period-updates N)"
                )

    def warm(self, num_updates: int) -> float:
        """See the class docstring."""
        index, t, length = self._period(num_updates - self.warmup)
        shrink = self.cfg.lr_shrink**index
        low, high = self.cfg.min_lr * shrink, self.peak * shrink
        return float(low + 0.5 * (high - low) * (1 + math.cos(math.pi * t / length)))

    def _period(self, u: int) -> tuple[int, float, float]:
        mult, first = self.cfg.t_mult, self.period
        if mult == 1:
            index = math.floor(u / first)
            return index, u - first * index, first
        index = math.floor(math.log(1 - u / first * (1 - mult), mult))
        return index, u - (1 - mult**index) / (1 - mult) * first, first * mult**index


@dataclass(frozen=True)
class TriStageConfig:
    """Warm up, hold, decay exponentially."""

    warmup_steps: int = flag(0, "updates of the warm-up")
    hold_steps: int = flag(0, "updates at the peak")
    decay_steps: int = flag(0, "updates of the decay")
    phase_ratio: tuple[float, ...] | None = flag(
        None, "the three phases as shares of --max-update, as in 0.1,0.4,0.5"
    )
    init_lr_scale: float = flag(0.01, "learning rate at the start, as a share of --lr")
    final_lr_scale: float = flag(0.01, "learning rate at the end, as a share of --lr")

    def __post_init__(self) -> None:
        ratio = self.phase_ratio
        if ratio is not None and (len(ratio) != 3 or abs(sum(ratio) - 1) > 1e-6):
            raise ConfigError(f"--phase-ratio {ratio}: expected three numbers that sum to 1")
        if self.final_lr_scale <= 0:
            raise ConfigError(f"--final-lr-scale {self.final_lr_scale:g}: expected more than 0")


@SCHEDULES.register("tri_stage", config=TriStageConfig)
class TriStage(Schedule):
    """Linear up, constant, exponential down (Park et al., 2019).

    Formula::

        lr(u) = i p + u * (p - i p) / warmup             u < warmup
                p                                        u < warmup + hold
                p * f ** ((u - warmup - hold) / decay)   u <= warmup + hold + decay
                f p                                      after

    p is --lr, i --init-lr-scale, f --final-lr-scale.
    """

    cfg: TriStageConfig

    def prepare(self) -> None:
        """Find where the phases end."""
        cfg = self.cfg
        self.warmup, self.hold, self.decay = cfg.warmup_steps, cfg.hold_steps, cfg.decay_steps
        if cfg.phase_ratio is not None:
            if self.max_update <= 0:
                raise ConfigError("--phase-ratio needs --max-update N")
            phases = [int(self.max_update * share) for share in cfg.phase_ratio]
            self.warmup, self.hold, self.decay = phases
        if self.warmup + self.hold + self.decay <= 0:
            raise ConfigError(
                "--lr-scheduler tri_stage needs --warmup-steps, --hold-steps and --decay-steps, "
                "or --phase-ratio with --max-update"
            )

    def lr(self, num_updates: int, epoch: int) -> float:
        """See the class docstring."""
        peak, end = self.peak, self.cfg.final_lr_scale
        if num_updates < self.warmup:
            return _linear(self.cfg.init_lr_scale * peak, peak, num_updates, self.warmup)
        u = num_updates - self.warmup
        if u < self.hold:
            return peak
        u -= self.hold
        if self.decay > 0 and u <= self.decay:
            return float(peak * end ** (u / self.decay))
        return end * peak


@dataclass(frozen=True)
class TriangularConfig:
    """Up and down between two learning rates."""

    max_lr: float | None = flag(None, "learning rate at the top, above --lr")
    lr_period_updates: float = flag(5000.0, "updates of one cycle")
    lr_shrink: float = flag(0.1, "shrink the top by this factor each cycle")
    shrink_min: bool = flag(False, "shrink the bottom as well")


@SCHEDULES.register("triangular", config=TriangularConfig)
class Triangular(Schedule):
    """Cyclical learning rates (Smith, 2017), with h = lr_period_updates // 2.

    Formula::

        c     = floor(u / 2h)
        top   = max_lr * shrink ** c,  bottom = lr (* shrink ** c with --shrink-min)
        lr(u) = bottom + (top - bottom) * max(0, 1 - |u / h - 2c - 1|)
    """

    cfg: TriangularConfig

    def prepare(self) -> None:
        """Find the top and half a cycle."""
        cfg = self.cfg
        if cfg.max_lr is None or cfg.max_lr <= self.peak:
            raise ConfigError(
                f"--lr-scheduler triangular needs --max-lr X above --lr {self.peak:g}"
            )
        self.top: float = cfg.max_lr
        self.half = cfg.lr_period_updates // 2
        if self.half <= 0:
            raise ConfigError(f"--lr-period-updates {cfg.lr_period_updates:g}: expected 2 or more")

    def lr(self, num_updates: int, epoch: int) -> float:
        """See the class docstring."""
        cycle = math.floor(num_updates / (2 * self.half))
        shrink = self.cfg.lr_shrink**cycle
        top = self.top * shrink
        bottom = self.peak * shrink if self.cfg.shrink_min else self.peak
        distance = abs(num_updates / self.half - 2 * cycle - 1)
        return float(bottom + (top - bottom) * max(0.0, 1 - distance))


@dataclass(frozen=True)
class StepConfig:
    """A fixed factor every so many updates."""

    warmup_updates: int = _warmup_flag()
    warmup_init_lr: float = _warmup_init_flag()
    min_lr: float = flag(0.0, "the learning rate never falls below this")
    lr_decay_period: int = flag(25000, "updates between two decays")
    lr_decay: float = flag(0.5, "factor of a decay")

    def __post_init__(self) -> None:
        if self.lr_decay_period < 1:
            raise ConfigError(f"--lr-decay-period {self.lr_decay_period}: expected 1 or more")
        if not 0 < self.lr_decay <= 1:
            raise ConfigError(f"--lr-decay {self.lr_decay:g}: expected more than 0 and at most 1")


@SCHEDULES.register("step", config=StepConfig)
class Step(_WithMinimum):
    """Warm-up, then a staircase.

    Formula::

        lr(u) = init + u * (peak - init) / warmup                    u < warmup
                max(min, peak * decay ** ((u - warmup) // period))   otherwise

    init is --warmup-init-lr, by default min.
    """

    cfg: StepConfig

    def warm(self, num_updates: int) -> float:
        """See the class docstring."""
        stairs = (num_updates - self.warmup) // self.cfg.lr_decay_period
        return float(max(self.peak * self.cfg.lr_decay**stairs, self.cfg.min_lr))


@dataclass(frozen=True)
class ManualConfig:
    """Learning rates written out by hand."""

    epoch2lr: dict[str, Any] = flag({}, 'learning rates by epoch, as in {"1": 1e-3, "3-5": 1e-4}')
    update2lr: dict[str, Any] = flag({}, "learning rates by number of updates, which come first")


@SCHEDULES.register("manual", config=ManualConfig)
class Manual(Schedule):
    """Two tables, --update2lr before --epoch2lr before --lr.

    Formula::

        lr(u, e) = update2lr[largest key <= u], else epoch2lr[largest key <= e], else lr

    A key may be a number, "1,2,7" or "1-5".
    """

    cfg: ManualConfig

    def prepare(self) -> None:
        """Read the tables."""
        self.by_epoch = _table("--epoch2lr", self.cfg.epoch2lr)
        self.by_update = _table("--update2lr", self.cfg.update2lr)

    def lr(self, num_updates: int, epoch: int) -> float:
        """See the class docstring."""
        for table, at in ((self.by_update, num_updates), (self.by_epoch, epoch)):
            keys = [k for k in table if k <= at]
            if keys:
                return table[max(keys)]
        return self.peak


def _table(name: str, given: Mapping[str, Any]) -> dict[int, float]:
    table: dict[int, float] = {}
    for key, lr in given.items():
        try:
            text = str(key)
            if "," in text:
                numbers = [int(k) for k in text.split(",")]
            elif "-" in text:
                first, last = (int(k) for k in text.split("-"))
                numbers = list(range(first, last + 1))
            else:
                numbers = [int(text)]
            table.update(dict.fromkeys(numbers, float(lr)))
        except (TypeError, ValueError):
            raise ConfigError(
                f'{name}: {key!r}: {lr!r} is not understood; expected {{"1": 1e-3, "2-5": 1e-4}}'
            ) from None
    return table


@dataclass(frozen=True)
class ReduceOnPlateauConfig:
    """Shrink when validation stops improving."""

    lr_shrink: float = flag(0.1, "shrink the learning rate by this factor")
    lr_threshold: float = flag(0.0001, "smallest relative change that counts as an improvement")
    lr_patience: int = flag(0, "epochs without improvement that are borne before shrinking")
    warmup_updates: int = _warmup_flag()
    warmup_init_lr: float = _warmup_init_flag()


@SCHEDULES.register("reduce_lr_on_plateau", config=ReduceOnPlateauConfig)
class ReduceOnPlateau(WarmedUp):
    """Warm-up, then shrink whenever validation has not improved for `patience` epochs.

    Formula::

        lr(u) = init + u * (peak - init) / warmup        u <= warmup
                peak * shrink ** (times shrunk)          otherwise

    A value v improves on the best b when v < b (1 - threshold), or v > b (1 + threshold) with
    --maximize-best-checkpoint-metric. Validations during the warm-up do not count. init is
    --warmup-init-lr, by default 0.
    """

    cfg: ReduceOnPlateauConfig

    def prepare(self) -> None:
        """Begin to count."""
        super().prepare()
        self.shrunk = 0
        self.bad_epochs = 0

    def warming_up(self, num_updates: int) -> bool:
        """See the class docstring: its last update counts, other than elsewhere."""
        return num_updates <= self.warmup and self.warmup > 0

    def warm(self, num_updates: int) -> float:
        """See the class docstring."""
        return float(self.peak * self.cfg.lr_shrink**self.shrunk)

    def observe(self, value: float | None, num_updates: int) -> None:
        """Count epochs without improvement; shrink when patience is exceeded."""
        if value is None or self.warming_up(num_updates):
            return
        if self._improves(value):
            self.best, self.bad_epochs = value, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > self.cfg.lr_patience:
            self.shrunk, self.bad_epochs = self.shrunk + 1, 0

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        if self.maximize:
            return value > self.best * (1 + self.cfg.lr_threshold)
        return value < self.best * (1 - self.cfg.lr_threshold)

    def state_dict(self) -> dict[str, Any]:
        """`best` and `num_bad_epochs` as fairseq has them, and how often the rate was shrunk."""
        return {**super().state_dict(), "num_bad_epochs": self.bad_epochs, "shrunk": self.shrunk}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See the base class; a state of fairseq's has no `shrunk` and starts at --lr."""
        super().load_state_dict(state)
        self.bad_epochs = int(state.get("num_bad_epochs", 0))
        self.shrunk = int(state.get("shrunk", 0))


@SCHEDULES.register("pass_through")
def pass_through(*_: object, **__: object) -> Schedule:
    """The companion of fairseq's composite optimizer, which is not here.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "--lr-scheduler pass_through belongs to --optimizer composite, which fairseq-lite does "
        "not have: choose another schedule"
    )
