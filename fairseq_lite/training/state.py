"""Where a run stands: plain values that a checkpoint holds and a restart takes over."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def is_better(value: float, than: float | None, maximize: bool, ties: bool = False) -> bool:
    """Whether a validation metric improves on an earlier one; anything improves on None."""
    if than is None:
        return True
    if ties and value == than:
        return True
    return value > than if maximize else value < than


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        num_updates: parameter updates made so far, over all restarts.
        epoch: the epoch under way, from 1.
        best: the best validation metric so far; None before the first validation.
        previous_training_time: seconds spent by earlier runs.
    """

    num_updates: int = 0
    epoch: int = 1
    best: float | None = None
    previous_training_time: float = 0.0
    _started: float = field(default_factory=time.monotonic, repr=False)

    def run_time(self) -> float:
        """Seconds since this run began."""
        return time.monotonic() - self._started

    def training_time(self) -> float:
        """Seconds of training altogether, earlier runs included."""
        return self.previous_training_time + self.run_time()

    def observe_best(self, value: float, maximize: bool) -> bool:
        """Take note of a validation metric; True when it is at least as good as the best."""
        improved = is_better(value, self.best, maximize, ties=True)
        if improved:
            self.best = value
        return improved


@dataclass
class EarlyStopping:
    """Stop after `patience` validations in a row without improvement (`--patience`).

    Unlike the best metric that decides about `checkpoint_best.pt`, a tie is no improvement here.
    The count is kept in checkpoints, so a restart does not begin it anew.
    """

    patience: int
    maximize: bool
    best: float | None = None
    runs: int = 0

    def observe(self, value: float | None) -> bool:
        """Take note of a validation metric; True when training is to stop."""
        if value is None or self.patience <= 0:
            return False
        if is_better(value, self.best, self.maximize):
            self.best, self.runs = value, 0
            return False
        self.runs += 1
        return self.runs >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"best": self.best, "runs": self.runs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.best, self.runs = state["best"], int(state["runs"])
