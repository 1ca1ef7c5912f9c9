"""What a set of hosts consists of, as a value: names, addresses, folders, and the text of every file.

The layout is written down before anything is made, and is all that taking the set down needs to know: what is not in
it is not ours.
"""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

MOST_HOSTS = 200
NETWORKS = 256
NETNS_DIR = Path("/run/netns")
ETC_NETNS_DIR = Path("/etc/netns")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?")

BOOT = """
set -eu
echo "$1" > /proc/sys/kernel/hostname
home=$2; sshd=$3; config=$4; shift 4
mount -t tmpfs -o size=2g,mode=1777 shm /dev/shm
for folder in "$@"; do mount -t tmpfs -o mode=1777 private "$folder"; done
mount -t tmpfs -o mode=755 run /run
mkdir /run/sshd
cd "$home"
exec "$sshd" -D -e -f "$config"
"""
"""What a host's first process does in its namespaces, before it becomes sshd. Its words come as arguments.

/run is the host's own: sshd wants a folder there, and the machine's is not ours to write.
"""


@dataclass(frozen=True, slots=True)
class Member:
    """A host, or the control namespace (`ctl`): `link` is its end of the cable in the control namespace."""

    name: str
    namespace: str
    address: str
    link: str
    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def etc(self) -> Path:
        """What `ip netns exec` lays over /etc in this namespace."""
        return ETC_NETNS_DIR / self.namespace


@dataclass(frozen=True, slots=True)
class Layout:
    """A set of hosts.

    network: K of the addresses 10.77.K.0/24
    private_dirs: folders which every host has for itself, empty at the start
    """

    name: str
    folder: Path
    network: int
    hosts: tuple[Member, ...]
    control: Member
    private_dirs: tuple[Path, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        return (self.control, *self.hosts)


def plan_layout(name: str, folder: Path, network: int, num_hosts: int, private_dirs: tuple[Path, ...] = ()) -> Layout:
    """The layout of a set; `folder` is the one that all its files lie in."""
    subnet = ipaddress.ip_network((f"10.77.{network}.0", 24))

    def member(label: str, number: int) -> Member:
        return Member(label, f"fhosts-{name}-{label}", str(subnet[number]), f"v{number}", folder / label)

    hosts = tuple(member(f"h{number}", number) for number in range(1, num_hosts + 1))
    return Layout(name, folder, network, hosts, member("ctl", 254), private_dirs)


def render_hosts_file(layout: Layout) -> str:
    lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{host.address} {host.name}" for host in layout.members)]
    return "".join(f"{line}\n" for line in lines)


def render_known_hosts(layout: Layout, public_keys: dict[str, str]) -> str:
    """public_keys: host name -> the content of its public host key file."""
    rows = ((host, public_keys[host.name].split()[:2]) for host in layout.hosts)
    return "".join(f"{host.name},{host.address} {kind} {key}\n" for host, (kind, key) in rows)


def render_passwd(machine: str, home: Path) -> str:
    """The machine's /etc/passwd with another home for root."""
    rows = [line.split(":") for line in machine.splitlines()]
    return "".join(":".join([*row[:5], str(home), "/bin/bash"] if row[0] == "root" else row) + "\n" for row in rows)


def render_sshd_config(host: Member) -> str:
    """An sshd that heeds this set's key alone, and no file outside the host's folder."""
    return f"""\
Port 22
ListenAddress {host.address}
HostKey {host.folder}/host_key
AuthorizedKeysFile {host.folder}/authorized_keys
PidFile none
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
MaxStartups 200
MaxSessions 200
Subsystem sftp internal-sftp
"""


def plan_links(layout: Layout) -> str:
    """The commands of `ip -batch` in the control namespace: a bridge, and a cable to each host."""
    lines = [
        "link set lo up",
        "link add br0 type bridge forward_delay 0",
        f"addr add {layout.control.address}/24 dev br0",
        "link set br0 up",
    ]
    for host in layout.hosts:
        lines.append(f"link add {host.link} type veth peer name eth0 netns {host.namespace}")
        lines.append(f"link set {host.link} master br0 up")
    return "".join(f"{line}\n" for line in lines)


def plan_host_links(host: Member) -> str:
    return f"link set lo up\naddr add {host.address}/24 dev eth0\nlink set eth0 up\n"
