"""Ranks meet in a store that may hold what earlier attempts left; gloo gets the right interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import Store, TCPStore

from fairseq_lite.errors import DistributedError
from fairseq_lite.parallel import meeting, network, watchdog

Connect = Callable[[], Store]


@pytest.fixture
def connect() -> Connect:
    """A store, as one connection a rank."""
    wait = timedelta(seconds=10)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)

    def client() -> Store:
        return TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=wait)

    return client


def come(connect: Connect, rank: int, size: int, seconds: float = 10) -> str:
    return meeting.meet(connect(), rank, size, place="here:1", seconds=seconds)


def all_come(connect: Connect, ranks: list[int]) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: come(connect, rank, len(ranks)), ranks))


def test_ranks_meet_whoever_comes_first(connect: Connect) -> None:
    assert len(set(all_come(connect, [2, 1, 0]))) == 1


def test_an_earlier_attempt_does_not_count(connect: Connect) -> None:
    first = all_come(connect, [0, 1, 2])
    again: dict[int, Future[str]] = {}
    with ThreadPoolExecutor(3) as pool:
        again[2] = pool.submit(come, connect, 2, 3)
        again[0] = pool.submit(come, connect, 0, 3)
        # Rank 1 was announced and confirmed in the first attempt; now it is not here.
        threading.Event().wait(0.4)
        assert not any(future.done() for future in again.values())
        room = meeting.current(connect())
        assert room is not None and watchdog.missing(room, 3) == [1]
        again[1] = pool.submit(come, connect, 1, 3)
        names = {future.result() for future in again.values()}
    assert len(names) == 1 and names.isdisjoint(first)


def test_without_names_of_their_own_attempts_mix(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above is there for: with one name for all attempts rank 0 meets ghosts."""
    monkeypatch.setattr(meeting.uuid, "uuid4", lambda: SimpleNamespace(hex="same"))
    all_come(connect, [0, 1, 2])
    assert come(connect, 0, 3) == "same"


def test_a_process_that_replaces_another_is_the_one_confirmed(connect: Connect) -> None:
    with ThreadPoolExecutor(3) as pool:
        lead = pool.submit(come, connect, 0, 3)
        with pytest.raises(DistributedError):  # this one is ended before all were there
            come(connect, 1, 3, seconds=0.2)
        replacement, last = (pool.submit(come, connect, rank, 3) for rank in (1, 2))
        assert lead.result() == replacement.result() == last.result()


def test_who_does_not_come_is_named(connect: Connect) -> None:
    with pytest.raises(DistributedError, match="1 of 3 ranks met at here:1 within 0.1 s; rank.*1"):
        come(connect, 0, 3, seconds=0.1)
    with pytest.raises(DistributedError, match="2 of 3 ranks .* rank.s. 2 did not come"):
        come(connect, 1, 3, seconds=0.1)


def test_rank_0_does_not_come(connect: Connect) -> None:
    with pytest.raises(DistributedError, match="rank 0 did not come to here:1 within 0.1 s"):
        come(connect, 1, 2, seconds=0.1)


def test_a_meeting_is_called_off(connect: Connect) -> None:
    meeting.call_off(connect(), "rank 5 died")
    with pytest.raises(DistributedError, match="^rank 5 died$"):
        come(connect, 1, 2)


def test_what_is_called_off_later_reaches_those_who_have_met(connect: Connect) -> None:
    name = all_come(connect, [0, 1])[0]
    meeting.call_off(connect(), "rank 5 died")
    assert watchdog.read_reason(meeting.room(connect(), name)) == "rank 5 died"


# -- interfaces --------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two networks whose own name is at 127.0.1.1, as Debian makes it."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    ways = {
        "192.0.2.1": "10.1.0.5",
        "node1": "10.2.0.5",
        "me": "127.0.0.1",
        "127.0.0.1": "127.0.0.1",
    }
    ways["localhost"] = "127.0.0.1"
    addresses = {"127.0.0.1": "lo", "10.1.0.5": "eth0", "10.2.0.5": "ib0"}
    monkeypatch.setattr(network, "_source_address", lambda host, port: ways.get(host))
    monkeypatch.setattr(network, "_addresses", lambda: addresses)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("node1", "ib0"),
        ("me", "eth0"),  # the others cannot reach a loopback
        ("localhost", "lo"),  # nobody else is meant
        ("127.0.0.1", "lo"),
        ("unknown", None),
    ],
)
def test_the_interface_that_leads_to_rank_0(host: str, name: str | None) -> None:
    assert network.interface_towards(host, 29500) == name


@pytest.mark.usefixtures("machine")
def test_an_interface_that_was_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    network.choose_interface("node1", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.skipif(not os.path.exists("/sys/class/net/lo"), reason="needs Linux's loopback")
def test_this_machines_loopback() -> None:
    assert network.interface_towards("127.0.0.1", 9) == "lo"
