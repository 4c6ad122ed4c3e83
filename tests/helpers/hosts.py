"""Several hosts for tests: network namespaces where this machine allows them, or itself twice."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY

_MARK = "FLITE_TEST_PROCESS"


@dataclass(frozen=True)
class Host:
    """Where processes can be started.

    Attributes:
        address: at which the other hosts reach it.
        enter: the beginning of a command line that runs the rest there.
    """

    address: str
    enter: tuple[str, ...] = ()


@contextmanager
def loopback(count: int) -> Iterator[list[Host]]:
    """This machine, `count` times."""
    yield [Host("127.0.0.1")] * count


def may_have_namespaces() -> bool:
    """Whether it is worth a try; a kernel may still refuse."""
    return sys.platform == "linux" and shutil.which("ip") is not None and os.geteuid() == 0


@contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """Network namespaces joined by a bridge: each has an address of its own and its own loopback.

    Needs root, iproute2 and a kernel that allows it; skips the test otherwise.
    """
    if not may_have_namespaces():
        pytest.skip("network namespaces need Linux, root and iproute2")
    tag = f"fl{os.getpid() % 100000}"
    names = [f"{tag}h{i}" for i in range(count)]
    hub = f"{tag}hub"
    try:
        for name in (hub, *names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "hub", "type", "bridge")
        _ip("-n", hub, "link", "set", "hub", "up")
        hosts = [_join(name, hub, number) for number, name in enumerate(names, 1)]
    except (subprocess.CalledProcessError, OSError) as e:
        _remove(hub, *names)
        said = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else str(e)
        pytest.skip(f"this machine makes no network namespaces: {said}")
    try:
        yield hosts
    finally:
        _remove(hub, *names)


def _join(name: str, hub: str, number: int) -> Host:
    """Give the namespace `name` a cable to the hub, and an address."""
    port, address = f"port{number}", f"10.231.77.{number}"
    cable = ("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port)
    _ip(*cable, "netns", hub)
    _ip("-n", hub, "link", "set", port, "master", "hub")
    _ip("-n", hub, "link", "set", port, "up")
    _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    _ip("-n", name, "link", "set", "eth0", "up")
    return Host(address, ("ip", "netns", "exec", name))


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


def _remove(*names: str) -> None:
    for name in names:
        with suppress(subprocess.SubprocessError, OSError):
            _ip("netns", "del", name)


class Processes:
    """Processes started for one test, and all that these start; none outlives the `with` block.

    Args:
        folder: for what they print, one file each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        for process in self.started:
            process.wait(timeout=20)

    def start(
        self, words: Sequence[object], *, host: Host | None = None, **environ: str
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, one thread a process unless `environ` says otherwise."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "GLOO"))}
        clean |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", _MARK: self._mark}
        enter = () if host is None else host.enter
        with (self._folder / f"process{len(self.started)}.out").open("wb") as out:
            process = subprocess.Popen(
                [*enter, *map(str, words)], env={**clean, **environ}, stdout=out, stderr=out
            )
        self.started.append(process)
        return process

    def wait(self, seconds: float) -> list[int]:
        """The exit statuses of all that were started, in order."""
        end = time.monotonic() + seconds
        for process in self.started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"did not end within {seconds} s:\n{self.output()[-4000:]}")
        return [process.returncode for process in self.started]

    def output(self) -> str:
        """What all of them printed."""
        files = sorted(self._folder.glob("process*.out"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def alive(self) -> list[int]:
        """The processes that still run, those started by others among them too (Linux)."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (folder / "environ").read_bytes()
                if f"{_MARK}={self._mark}".encode() in variables and not _is_dead(folder):
                    found.append(int(folder.name))
        return found


def _is_dead(folder: Path) -> bool:
    return (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def free_port() -> int:
    """A port of the loopback that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
