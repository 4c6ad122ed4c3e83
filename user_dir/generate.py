"""flite-generate with this folder's plugin: `python user_dir/generate.py DATA-BIN --path … …`.

Takes the flags of flite-generate; those of training that mean nothing here (--save-dir,
--tensorboard-logdir, --max-tokens-valid) are accepted with a warning. `--user-dir` need not be
typed. With `--distributed-world-size N` the experts are shared out over N processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_lite_cli import generate
from fairseq_lite_cli.entry import run_command


def completed(argv: Sequence[str]) -> list[str]:
    """The command line with `--user-dir`, if it was left out."""
    if any(word.split("=")[0] in ("--user-dir", "--config") for word in argv):
        return list(argv)
    return [*argv, "--user-dir", str(Path(__file__).resolve().parent)]


def main(argv: Sequence[str] | None = None) -> None:
    """Complete the command line and translate."""
    generate.main(completed(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(run_command(os.path.basename(__file__), main))
