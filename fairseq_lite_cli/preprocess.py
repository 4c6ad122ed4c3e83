"""flite-preprocess: make dictionaries and a binary data folder from text files."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from fairseq_lite.config.parse import parse
from fairseq_lite.data import preprocess
from fairseq_lite_cli.entry import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and make the data folder."""
    run = parse("flite-preprocess", sys.argv[1:] if argv is None else argv, {})
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.INFO,
        stream=sys.stdout,
    )
    assert run.preprocess is not None
    preprocess.run(run.preprocess, {**vars(run.common), **vars(run.preprocess)})


if __name__ == "__main__":
    sys.exit(run_command("flite-preprocess", main))
