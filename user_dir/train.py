"""flite-train with this folder's plugin: `python user_dir/train.py DATA-BIN --arch … …`.

Takes the flags of flite-train. `--user-dir` need not be typed. Without GPUs as many processes are
started as share one set of experts (--ep-world-size), unless --distributed-world-size or a launcher
says how many there are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_lite.parallel.api import Machine
from fairseq_lite_cli import train
from fairseq_lite_cli.entry import run_command


def completed(argv: Sequence[str], machine: Machine) -> list[str]:
    """The command line with what was left out.

    Args:
        argv: as typed.
        machine: its GPUs and environment.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--user-dir")
    parser.add_argument("--config")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--ep-world-size", default="1")
    parser.add_argument("--distributed-world-size")
    typed, _ = parser.parse_known_args(list(argv))
    words = list(argv)
    if typed.user_dir is None and typed.config is None:
        words += ["--user-dir", str(Path(__file__).resolve().parent)]
    gpus = 0 if typed.cpu else machine.cuda_devices
    launched = {"RANK", "SLURM_PROCID"} & set(machine.environ)
    # A size that is none is refused by its own name later.
    whole = typed.ep_world_size.isdecimal() and int(typed.ep_world_size)
    if whole and typed.distributed_world_size is None and not gpus and not launched:
        words += ["--distributed-world-size", typed.ep_world_size]
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Complete the command line and train."""
    train.main(completed(sys.argv[1:] if argv is None else argv, Machine.here()))


if __name__ == "__main__":
    sys.exit(run_command(os.path.basename(__file__), main))
