"""Where the console commands start: one line for a user's error, a traceback for a bug of ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from fairseq_lite.errors import FliteError


def run_command(
    name: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None
) -> int:
    """Call a command and turn what it raises into an exit status.

    Returns:
        0 when all went well, 2 after a user's error (one line on standard error), 130 after Ctrl-C.
    """
    try:
        main(sys.argv[1:] if argv is None else list(argv))
    except FliteError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `flite-generate … | head`
        sys.stderr.close()
        return 141
    return 0


def _start(module: str) -> int:
    main = importlib.import_module(f"fairseq_lite_cli.{module}").main
    return run_command(f"flite-{module}", main)


def preprocess() -> int:
    """flite-preprocess."""
    return _start("preprocess")


def train() -> int:
    """flite-train."""
    return _start("train")


def generate() -> int:
    """flite-generate."""
    return _start("generate")


def interactive() -> int:
    """flite-interactive."""
    return _start("interactive")


def validate() -> int:
    """flite-validate."""
    return _start("validate")


def score() -> int:
    """flite-score."""
    return _start("score")
