"""What the grids of several sweeps share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from sweep import hyperparam

from fairseq_lite.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16", "me_fp16")
Key = Callable[[object], str | None]
SCHEDULES = ("polynomial_decay", "inverse_sqrt", "cosine", "fixed")


def key(name: str) -> Key:
    """The usual part of a run's name: "lr" -> lr0.001."""
    return lambda value: f"{name}{value}"


def unless(usual: object, name: str = "") -> Key:
    """A part of the name for a value that is not the usual one."""
    return lambda value: None if value == usual else f"{name}{value}"


def add_precision(parser: argparse.ArgumentParser, default: str = "fp16") -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default,
        help=f"what is computed in (default: {default})",
    )


def precision(name: str) -> list[hyperparam]:
    """The flags of one of PRECISIONS."""
    if name == "fp32":
        return []
    flag = "--memory-efficient-fp16" if name == "me_fp16" else f"--{name}"
    flags = [hyperparam(flag, save_dir_key=lambda _: name)]
    if name != "bf16":
        flags.append(hyperparam("--fp16-init-scale", 4))
    return flags


def schedule(name: str, *, usual: str, max_update: int, warmup: list[int]) -> list[hyperparam]:
    """A schedule of learning rates that reaches its end with the run.

    Args:
        name: which.
        usual: the one that does not enter the run's name.
        max_update: updates of the run.
        warmup: updates of the warm-up, to sweep over.
    """
    flags = [
        hyperparam("--lr-scheduler", name, save_dir_key=unless(usual)),
        hyperparam("--warmup-updates", warmup, save_dir_key=key("wu")),
    ]
    if name == "polynomial_decay":
        flags.append(hyperparam("--total-num-update", max_update))
    return flags


def at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse numbers below `least`, before a run's name is made of them.

    Args:
        args: the options.
        least: the smallest number.
        names: options, of one value or several; a value of None is nobody's.

    Raises:
        ConfigError: in the words that were typed.
    """
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {number}: expected {least} or more")


def num_experts(args: argparse.Namespace) -> int:
    """The experts of a layer, from --epg, the experts a GPU; 0 for a dense model.

    Raises:
        ConfigError: one expert is none.
    """
    num_gpus = args.num_gpus * args.num_nodes
    count = args.epg * num_gpus
    if args.epg < 0 or count == 1:
        raise ConfigError(
            f"--epg {args.epg} on {num_gpus} GPU(s): expected 2 experts or more, or --epg 0"
        )
    return int(count)


def experts(
    count: int, *, eval_fraction: float | None = None, count_key: Key | None = None
) -> list[hyperparam]:
    """Every second layer with experts, and the criterion that keeps them in use, as in gshard.

    Args:
        count: experts of a layer; 0 for none.
        eval_fraction: --moe-eval-capacity-token-fraction, if any.
        count_key: how their number enters the run's name, if at all.
    """
    if count == 0:
        return [hyperparam("--criterion", "cross_entropy")]
    flags = [
        hyperparam("--moe-freq", 2),
        hyperparam("--moe-expert-count", count, save_dir_key=count_key),
        hyperparam("--moe-gating-use-fp32"),
        hyperparam("--moe-normalize-expert-grad", "sqrt_world_size"),
        hyperparam("--criterion", "moe_cross_entropy"),
        hyperparam("--moe-gate-loss-wt", 0.01, save_dir_key=key("moe_w")),
        hyperparam("--moe-gate-loss-combine-method", "sum"),
        hyperparam("--moe-second-expert-policy", "all", save_dir_key=str),
    ]
    if eval_fraction is not None:
        flags.append(hyperparam("--moe-eval-capacity-token-fraction", eval_fraction))
    return flags


def update_freq(flag: str, total: int, *, batch: int, num_gpus: int, unit: str) -> int:
    """How many batches of every process make an update of `total`.

    Args:
        flag: what was typed.
        total: its value.
        batch: what a process takes at a time.
        num_gpus: processes.
        unit: what is counted.

    Raises:
        ConfigError: they do not divide; with the nearest that do. Or a batch is empty.
    """
    step = batch * num_gpus
    if step < 1:
        raise ConfigError(f"batches of {batch} {unit}: expected 1 or more; see --bs and --tps")
    if total % step == 0 and total > 0:
        return total // step
    below, above = total // step * step, (total // step + 1) * step
    nearest = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(
        f"{flag} {total}: {num_gpus} GPU(s) take {step} {unit} at a time; choose {nearest}, or "
        "another --bs"
    )
