"""After each update: stop? validate? save? A pure function of the flags and the counters."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq_lite.config.core import RunConfig


@dataclass(frozen=True)
class Decision:
    """What to do now.

    Attributes:
        stop: why training ends here, or None.
        validate: go through the valid subsets.
        save: write checkpoints.
    """

    stop: str | None
    validate: bool
    save: bool


def decide(
    run: RunConfig,
    *,
    epoch: int,
    num_updates: int,
    end_of_epoch: bool,
    hours: float,
    updated: bool = True,
    signalled: bool = False,
) -> Decision:
    """What fairseq does at the same point.

    Args:
        run: the run's flags.
        epoch: the epoch under way.
        num_updates: updates so far.
        end_of_epoch: whether its data is used up.
        hours: of training so far, earlier runs included.
        updated: whether the parameters just changed; an update skipped for overflow leaves
            `num_updates` where it was, and what was done then is not done again.
        signalled: whether the process was asked to end.
    """
    optimization, dataset, checkpoint = run.optimization, run.dataset, run.checkpoint
    stop = None
    if 0 < optimization.max_update <= num_updates:
        stop = (
            f"Stopping training due to num_updates: {num_updates} >= max_update: "
            f"{optimization.max_update}"
        )
    elif 0 < optimization.stop_time_hours < hours:
        stop = (
            f"Stopping training due to cumulative_training_time: {hours} > stop_time_hours: "
            f"{optimization.stop_time_hours} hour(s)"
        )
    elif signalled:
        stop = "Stopping training because the process was asked to end"
    old_enough = num_updates >= dataset.validate_after_updates

    def falls_on(interval: int) -> bool:
        return interval > 0 and updated and num_updates > 0 and num_updates % interval == 0

    save = (
        (end_of_epoch and epoch % max(checkpoint.save_interval, 1) == 0)
        or stop is not None
        or (falls_on(checkpoint.save_interval_updates) and old_enough)
    )
    validate = (
        (
            (save and not end_of_epoch)  # what is saved in mid-epoch is validated
            or (end_of_epoch and epoch % max(dataset.validate_interval, 1) == 0)
            or stop is not None
            or falls_on(dataset.validate_interval_updates)
        )
        and not dataset.disable_validation
        and not signalled  # there may be seconds left: save what there is
        and old_enough
    )
    return Decision(stop, validate, save)
