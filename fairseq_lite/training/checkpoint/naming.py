"""Which files a save writes and which older ones it removes: pure functions over names.

The names, their order and the patterns of retention are fairseq's, so that scripts made for its
folders work on ours. One rule differs: `--keep-best-checkpoints K` writes every validated
checkpoint until K of them exist. fairseq skips one that is worse than the worst kept so far even
then, and ends with fewer than K.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from fairseq_lite.config.core import CheckpointConfig

LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"
CRASH = "crash.pt"


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where in training a save happens.

    Attributes:
        epoch: the epoch being trained, from 1; at its end still this one.
        updates: optimizer steps so far.
        end_of_epoch: whether the epoch's data is used up.
        val_loss: the best-checkpoint metric just measured, or None when nothing was validated.
        best: the best value so far, `val_loss` not counted; None before the first.
    """

    epoch: int
    updates: int
    end_of_epoch: bool
    val_loss: float | None = None
    best: float | None = None


def is_better(a: float, b: float, maximize: bool) -> bool:
    """Whether `a` is at least as good as `b`: a tie counts as better."""
    return a >= b if maximize else a <= b


def better_of(val_loss: float | None, best: float | None, maximize: bool) -> float | None:
    """The best value once `val_loss` counts too."""
    if val_loss is None:
        return best
    if best is None:
        return val_loss
    return max(val_loss, best) if maximize else min(val_loss, best)


def with_suffix(name: str, suffix: str) -> str:
    """`checkpoint_last.pt` to `checkpoint_last{suffix}.pt`."""
    if not suffix:
        return name
    stem = name.removesuffix(".pt")
    return f"{stem}{suffix}.pt" if stem != name else name + suffix


def names_to_write(
    cfg: CheckpointConfig, moment: Moment, existing: Iterable[str] = ()
) -> list[str]:
    """The names to write at a moment, the main one first; the others are copies of it.

    Args:
        cfg: the checkpoint flags.
        moment: where training stands.
        existing: names in the folder, for `--keep-best-checkpoints`.
    """
    if cfg.no_save:
        return []
    suffix, maximize = cfg.checkpoint_suffix, cfg.maximize_best_checkpoint_metric
    names = []
    if moment.end_of_epoch:
        if not cfg.no_epoch_checkpoints and moment.epoch % max(cfg.save_interval, 1) == 0:
            names.append(f"checkpoint{moment.epoch}{suffix}.pt")
    elif cfg.save_interval_updates > 0 and moment.updates % cfg.save_interval_updates == 0:
        names.append(f"checkpoint_{moment.epoch}_{moment.updates}{suffix}.pt")
    if moment.val_loss is not None:
        if moment.best is None or is_better(moment.val_loss, moment.best, maximize):
            names.append(with_suffix(BEST, suffix))
        if cfg.keep_best_checkpoints > 0:
            kept = _sorted(existing, _best_pattern(cfg))
            worst = (kept[-1] if maximize else kept[0])[0] if kept else None
            if (
                worst is None
                or len(kept) < cfg.keep_best_checkpoints
                or is_better(moment.val_loss, worst, maximize)
            ):
                names.append(best_name(cfg, moment))
    if not cfg.no_last_checkpoints:
        names.append(with_suffix(LAST, suffix))
    return names


def best_name(cfg: CheckpointConfig, moment: Moment) -> str:
    """`checkpoint.best_{metric}_{value:.3f}{r}.pt`: r keeps equal values apart.

    r is drawn from [0, K) as fairseq draws it: numpy seeded by a hash of (epoch, updates, value).
    """
    assert moment.val_loss is not None
    seed = int(hash((moment.epoch, moment.updates, moment.val_loss)) % 1e6)
    digit = np.random.RandomState(seed).randint(0, cfg.keep_best_checkpoints)
    metric = cfg.best_checkpoint_metric
    return f"checkpoint.best_{metric}_{moment.val_loss:.3f}{digit}{cfg.checkpoint_suffix}.pt"


def names_to_remove(
    cfg: CheckpointConfig, existing: Iterable[str], *, end_of_epoch: bool
) -> list[str]:
    """The names that retention drops, given what the folder holds after a save."""
    existing = list(existing)
    suffix = re.escape(cfg.checkpoint_suffix)
    removed: list[str] = []
    if not end_of_epoch and cfg.keep_interval_updates > 0:
        found = _sorted(existing, rf"checkpoint_\d+_(\d+){suffix}\.pt")
        pattern = cfg.keep_interval_updates_pattern
        if pattern != -1:
            found = [(value, name) for value, name in found if int(value) % pattern != 0]
        removed += [name for _, name in found[cfg.keep_interval_updates :]]
    if cfg.keep_last_epochs > 0:
        found = _sorted(existing, rf"checkpoint(\d+){suffix}\.pt")
        removed += [name for _, name in found[cfg.keep_last_epochs :]]
    if cfg.keep_best_checkpoints > 0:
        found = _sorted(existing, _best_pattern(cfg))
        if not cfg.maximize_best_checkpoint_metric:
            found = found[::-1]
        removed += [name for _, name in found[cfg.keep_best_checkpoints :]]
    return removed


def _best_pattern(cfg: CheckpointConfig) -> str:
    metric, suffix = re.escape(cfg.best_checkpoint_metric), re.escape(cfg.checkpoint_suffix)
    return rf"checkpoint\.best_{metric}_(-?\d+\.?\d*){suffix}\.pt"


def _sorted(names: Iterable[str], pattern: str) -> Sequence[tuple[float, str]]:
    """Names that match, with the number in the first group, the largest first."""
    compiled = re.compile(pattern)
    found = []
    for name in names:
        match = compiled.fullmatch(name)
        if match:
            found.append((float(match.group(1)), name))
    return sorted(found, reverse=True)
