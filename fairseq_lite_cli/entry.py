"""Where the console commands start: one line for a user's error, a traceback for a bug of ours."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from fairseq_lite.builtins import load_builtins
from fairseq_lite.errors import DataError, FliteError, OutputClosed

# Errors of the machine's, not of ours: no space, over quota, file too large, device error.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def run_command(
    name: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None
) -> int:
    """Call a command and turn what it raises into an exit status.

    Returns:
        0 when all went well, 2 after a user's error (one line on standard error), 130 after Ctrl-C;
        after SIGTERM the process ends with 143.
    """
    _speak_utf8()
    try:
        with _termination_cleans_up(name):
            main(sys.argv[1:] if argv is None else list(argv))
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is heard here, not in the ruins of the interpreter
    except (BrokenPipeError, OutputClosed):  # the reader has gone, as in `flite-generate … | head`
        sys.stderr.close()
        return 141
    except FliteError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except OSError as e:
        if e.errno not in _FULL:
            raise
        _drop_stdout()
        print(f"{name}: error: {e.filename or 'the output'}: {e.strerror}", file=sys.stderr)
        return 2
    return 0


def prepare_rank() -> None:
    """What a process that a command starts does before it reads its configuration."""
    _speak_utf8()
    load_builtins()


@contextlib.contextmanager
def output_errors_told() -> Iterator[None]:
    """Turn errors of standard output into those that reach the process which started this one.

    Raises:
        OutputClosed: its reader has gone.
        DataError: the disk is full.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise OutputClosed("nobody reads the output any more") from None
    except OSError as e:
        if e.errno not in _FULL:
            raise
        _drop_stdout()
        raise DataError(f"{e.filename or 'the output'}: {e.strerror}") from None


@contextlib.contextmanager
def _termination_cleans_up(name: str) -> Iterator[None]:
    """SIGTERM takes the way of an error, past every `finally`: no half-made folder stays behind.

    Training has handlers of its own while it runs, to save first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends what hangs
        print(f"{name}: terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _speak_utf8() -> None:
    """Text is UTF-8 in files, so it is on standard streams, whatever the locale says."""
    os.environ.setdefault("PYTHONIOENCODING", "utf-8")  # of processes we start
    # Bytes that are not UTF-8 are refused on the way in and shown as \x… on the way out; Python's
    # own way for the C locale would take them in as words nobody has typed.
    for stream, errors in (
        (sys.stdin, "strict"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _drop_stdout() -> None:
    """What could not be written must not be tried again when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _start(module: str) -> int:
    main = importlib.import_module(f"fairseq_lite_cli.{module}").main
    return run_command(f"flite-{module.replace('_', '-')}", main)


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


def eval_lm() -> int:
    """flite-eval-lm."""
    return _start("eval_lm")


def score() -> int:
    """flite-score."""
    return _start("score")
