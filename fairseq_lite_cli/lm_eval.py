"""lm-evaluation-harness's own command, which knows `--model fairseq_lite` however it is called.

Besides, a model may be on several processes: those that torchrun or Slurm started, or as many as
`--distributed-world-size N` says. They share the work, and the experts of a mixture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fairseq_lite import lm_eval_hook
from fairseq_lite.config.core import DistributedTrainingConfig
from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite.hub.led import follow, leading
from fairseq_lite.parallel.launch import launch_for
from fairseq_lite.parallel.world import World
from fairseq_lite_cli.entry import prepare_rank, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Do what `lm_eval` does with the same arguments."""
    processes, device, words = split(sys.argv[1:] if argv is None else argv)
    launch_for(
        DistributedTrainingConfig(distributed_world_size=processes),
        evaluate,
        words,
        command="lm_eval",
        cpu=device == "cpu",
        setup=prepare_rank,
        if_asked=True,
    )


def split(argv: Sequence[str]) -> tuple[int | None, str | None, tuple[str, ...]]:
    """The number of processes, the device, and what the harness is told, the device included.

    Raises:
        ConfigError: a number that is none.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--distributed-world-size")
    ours, words = parser.parse_known_args(argv)
    parser.add_argument("--device")
    found, _ = parser.parse_known_args(argv)
    processes = ours.distributed_world_size
    if processes is not None and (not processes.isdecimal() or int(processes) < 1):
        raise ConfigError(f"--distributed-world-size {processes}: expected 1 or more")
    return None if processes is None else int(processes), found.device, tuple(words)


def evaluate(words: tuple[str, ...], world: World) -> None:
    """Run the harness on rank 0, which the others follow."""
    if world.size == 1:
        harness(words)
    elif world.is_main:
        with leading(world):
            harness(words)
    else:
        follow(world)


def harness(words: Sequence[str]) -> None:
    """Run the harness's command in this process.

    Raises:
        MissingDependency: it is not installed, or too old.
    """
    try:
        lm_eval_hook.register()
        from lm_eval.__main__ import cli_evaluate
    except ImportError as e:
        raise MissingDependency(
            f"lm-evaluation-harness 0.4.10 or newer is needed ({e}):"
            " pip install 'fairseq-lite[lm-eval]'"
        ) from None
    before = sys.argv
    sys.argv = ["lm_eval", *words]  # it reads its arguments nowhere else
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(run_command("lm_eval", main))
