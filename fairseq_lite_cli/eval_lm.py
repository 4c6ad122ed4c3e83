"""flite-eval-lm: how well language models predict a split of a data folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.data.text.recorded import adopt
from fairseq_lite.parallel.launch import launch
from fairseq_lite.parallel.world import World
from fairseq_lite.training.lm_evaluation import evaluate
from fairseq_lite.training.loggers import setup_logging
from fairseq_lite_cli.entry import output_errors_told, prepare_rank, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    run = parse("flite-eval-lm", sys.argv[1:] if argv is None else argv, load_builtins())
    launch(measure, run, setup=prepare_rank, if_asked=True)


def measure(run: RunConfig, world: World) -> None:
    """Measure, as one process of `world`."""
    registries = load_builtins()
    setup_logging(run.common, is_main=world.is_main)
    with output_errors_told():
        evaluate(adopt(run, registries), world, registries)


if __name__ == "__main__":
    sys.exit(run_command("flite-eval-lm", main))
