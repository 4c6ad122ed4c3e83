"""flite-train: train a model on a data folder made by flite-preprocess."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.data.text.recorded import adopt
from fairseq_lite.parallel.launch import launch
from fairseq_lite.training.assembly import check
from fairseq_lite.training.run import train
from fairseq_lite_cli.entry import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, check it, start the processes."""
    registries = load_builtins()
    run = parse("flite-train", sys.argv[1:] if argv is None else argv, registries)
    run = adopt(run, registries)
    check(run)
    launch(train, run, setup=load_builtins)


if __name__ == "__main__":
    sys.exit(run_command("flite-train", main))
