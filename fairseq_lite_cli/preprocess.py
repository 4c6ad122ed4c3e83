"""flite-preprocess: make dictionaries and a binary data folder from text files."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.data import preprocess
from fairseq_lite.data.text import recorded
from fairseq_lite.data.text.api import BPE, TOKENIZERS
from fairseq_lite.data.text.segment import Segmentation
from fairseq_lite_cli.entry import run_command

# Only these: the others would bring PyTorch, which nothing here needs.
_REGISTRIES = {"bpe": BPE, "tokenizer": TOKENIZERS}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and make the data folder."""
    run = parse("flite-preprocess", sys.argv[1:] if argv is None else argv, _REGISTRIES)
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.INFO,
        stream=sys.stdout,
    )
    run = recorded.adopt(run, _REGISTRIES)
    assert run.preprocess is not None
    segmentation = Segmentation(run.tokenizer, run.bpe, run.common.user_dir)
    preprocess.run(run.preprocess, settings(run), segmentation)


def settings(run: RunConfig) -> dict[str, Any]:
    """What the log begins with: every flag and its value."""
    found = {**vars(run.common), **vars(run.preprocess)}
    for section in ("tokenizer", "bpe"):
        choice = getattr(run, section)
        if choice.name is not None:
            found.update({section: choice.name, **vars(choice.config)})
    return found


if __name__ == "__main__":
    sys.exit(run_command("flite-preprocess", main))
