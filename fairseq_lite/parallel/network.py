"""Through which network interface gloo reaches the other machines.

gloo asks for the address of this machine's own name, and where `/etc/hosts` says that this is
127.0.0.1, as many installations do, machines wait for each other for ever. The interface that leads
to rank 0 is the right one. NCCL looks at the interfaces by itself.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from contextlib import suppress

if sys.platform == "linux":
    import fcntl

# An address of nobody's (RFC 5737): the way there is the default route. Nothing is sent.
_ELSEWHERE = ("192.0.2.1", 9)
_SIOCGIFADDR = 0x8915


def choose_interface(host: str, port: int) -> None:
    """Tell gloo which interface to use, unless `GLOO_SOCKET_IFNAME` already does.

    Args:
        host: rank 0's machine.
        port: any port; nothing is sent.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        name = interface_towards(host, port)
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def use_loopback() -> None:
    """Let gloo look up no name at all, which fails on a laptop without a network."""
    for name in ("lo", "lo0"):
        if name in (n for _, n in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_towards(host: str, port: int) -> str | None:
    """The interface through which this machine reaches `host`; None when it cannot be told.

    A host that is this machine is reached through the loopback, where the others cannot follow:
    then it is the interface of the default route, unless `host` names the loopback itself.
    """
    address = _source_address(host, port)
    if address is not None and _is_loopback(address) and not _names_loopback(host):
        address = _source_address(*_ELSEWHERE) or _only_address() or address
    return None if address is None else _interface_with(address)


def _source_address(host: str, port: int) -> str | None:
    """This machine's IPv4 address as `host` would see it."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((host, port or 9))
        address: str = s.getsockname()[0]
        return address
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _names_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return _is_loopback(host)
    except ValueError:  # any other name
        return False


def _addresses() -> dict[str, str]:
    """IPv4 address -> interface (Linux)."""
    found: dict[str, str] = {}
    if sys.platform != "linux":
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, request)
                found[socket.inet_ntoa(answer[20:24])] = name
    return found


def _only_address() -> str | None:
    """The address of a machine that has one, beside the loopback: a cluster without a way out."""
    outside = [address for address in _addresses() if not _is_loopback(address)]
    return outside[0] if len(outside) == 1 else None


def _interface_with(address: str) -> str | None:
    return _addresses().get(address)
