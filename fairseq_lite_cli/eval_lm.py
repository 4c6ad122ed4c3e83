"""flite-eval-lm: how well language models predict a split of a data folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.data.text.recorded import adopt
from fairseq_lite.training.lm_evaluation import evaluate
from fairseq_lite.training.loggers import setup_logging
from fairseq_lite_cli.entry import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    registries = load_builtins()
    run = parse("flite-eval-lm", sys.argv[1:] if argv is None else argv, registries)
    setup_logging(run.common)
    evaluate(adopt(run, registries), registries)


if __name__ == "__main__":
    sys.exit(run_command("flite-eval-lm", main))
