"""What a command makes of a hostile place: other encodings, full disks, readers that have gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from fairseq_lite_cli.entry import run_command
def main(argv):
    {body}
sys.exit(run_command("flite-test", main, sys.argv[1:]))
"""
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def python(body: str, *argv: bytes, **options) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, **C_LOCALE}
    script = SCRIPT.format(body=body)
    pipes = {"stdout": subprocess.PIPE, **options}
    words = [sys.executable, "-c", script, *argv]
    return subprocess.run(words, env=env, stderr=subprocess.PIPE, timeout=60, **pipes)


def test_text_is_utf8_in_every_locale():
    done = python("print(sys.stdin.readline(), end='')", input="grüße ▁\n".encode())
    assert (done.returncode, done.stdout.decode()) == (0, "grüße ▁\n")


def test_an_argument_that_is_not_utf8_can_be_named_in_an_error():
    body = "from fairseq_lite.errors import DataError; raise DataError(argv[0])"
    done = python(body, b"a\xff")
    assert done.returncode == 2
    assert done.stderr.startswith(b"flite-test: error: a") and done.stderr.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        done = python("print('x' * 10)", stdout=full)
    assert done.returncode == 2
    assert done.stderr == b"flite-test: error: the output: No space left on device\n"


def test_sigterm_goes_past_every_finally():
    body = (
        "import os, signal, time\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)\n"
        "    finally: print('clean')"
    )
    done = python(body)
    assert (done.returncode, done.stdout) == (143, b"clean\n")
    assert done.stderr == b"flite-test: terminated\n"
