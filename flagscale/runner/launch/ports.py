"""Free ports on this machine, and who holds one that is not free."""

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

CHOICE = range(20000, 32768)
"""Below where Linux takes the ports of outgoing connections from, so that none takes ours before the job binds it."""
NUM_TRIES = 200
_LISTEN = "0A"


def is_port_free(port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> bool:
    """Whether a server could listen on it, on every address of this machine; by TCP unless another `kind` is given."""
    for family, address in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, kind) as probe:
                if kind == socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in (socket.EAI_ADDRFAMILY, 97, 99):
                continue  # a machine without IPv6
            return False
    return True


def find_free_port(draw: "random.Random | None" = None) -> int | None:
    """A port that was free a moment ago, by TCP and by UDP; None where 200 draws found none."""
    import random

    source = draw or random.SystemRandom()
    ports = (source.choice(CHOICE) for _ in range(NUM_TRIES))
    return next((port for port in ports if is_port_free(port) and is_port_free(port, socket.SOCK_DGRAM)), None)


def _listening_inodes(port: int) -> set[str]:
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(fields[9])
    return inodes


def find_port_owner(port: int) -> str | None:
    """`process 123 (python train.py)` that listens on the port; None where it is hidden from us."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for folder in Path("/proc").glob("[0-9]*") if wanted else ():
        with contextlib.suppress(OSError):
            if any(str(entry.readlink()) in wanted for entry in (folder / "fd").iterdir()):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                return f"process {folder.name} ({b' '.join(words).decode(errors='replace').strip()[:80]})"
    return None
