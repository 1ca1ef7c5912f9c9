"""The network interfaces of this host, and which of them leads to another: standard library, part of both archives.

Collective libraries choose an interface by rules of their own. Where a host has several, or its name stands beside
127.0.1.1 in /etc/hosts as Debian writes it, they may choose one that the other hosts cannot reach. The one by which the
kernel sends to another host of the job is right on any network, so that one is named to them, by the variables of the
host's chip. It is the lowest word: the host's environment, `cmds.before_start` and `experiment.envs` go before it.
"""

import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

LOOPBACK = "lo"
_SIOCGIFCONF, _SIOCGIFFLAGS = 0x8912, 0x8913
_UP_AND_RUNNING = 0x1 | 0x40
_ROW = struct.Struct("16sH2x4s16x")
"""of SIOCGIFCONF: name, address family, IPv4 address"""
_MOST_ROWS = 4096


def list_interfaces() -> dict[str, bool]:
    """Name -> whether it is up and has a carrier, of every interface of this host."""
    found: dict[str, bool] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it went away meanwhile
                row = fcntl.ioctl(probe, _SIOCGIFFLAGS, struct.pack("16s16x", name.encode()))
                flags: int = struct.unpack_from("H", row, 16)[0]
                found[name] = flags & _UP_AND_RUNNING == _UP_AND_RUNNING
    return found


def find_interface(host: str) -> str | None:
    """The interface by which this host sends to `host`; None where that has no address or no route, or is this host."""
    from ipaddress import ip_address

    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # of a datagram socket: the kernel looks for the route, and nothing is sent
            source = ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None
    return next((name for name, address in _list_addresses() if address == source and name != LOOPBACK), None)


def interface_env(names: Sequence[str], host: str) -> dict[str, str]:
    """The variables `names`, each with the interface that leads to `host`; none where there is no such interface."""
    interface = find_interface(host) if names and host else None
    return dict.fromkeys(names, interface) if interface else {}


def _list_addresses() -> "Iterator[tuple[str, IPv4Address | IPv6Address]]":
    import array
    from ipaddress import IPv4Address, IPv6Address

    rows = array.array("B", bytes(_ROW.size * _MOST_ROWS))
    start, size = rows.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        used, _ = struct.unpack("iP", fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iP", size, start)))
    for name, _, address in _ROW.iter_unpack(rows[:used]):
        # an alias (`eth0:1`) is another address of the same interface
        yield name.rstrip(b"\0").decode().partition(":")[0], IPv4Address(address)
    with contextlib.suppress(OSError):  # a kernel without IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            yield line.split()[-1], IPv6Address(bytes.fromhex(line.split()[0]))
