"""A set of test hosts: made, looked at, broken and mended, taken down."""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from testhosts import machine
from testhosts.layout import (
    BOOT,
    ETC_NETNS_DIR,
    MOST_HOSTS,
    NAME,
    NETWORKS,
    Layout,
    Member,
    plan_host_links,
    plan_layout,
    plan_links,
    render_hosts_file,
    render_known_hosts,
    render_passwd,
    render_sshd_config,
)
from testhosts.machine import HostsError
from testhosts.manifest import Manifest, read_manifest, used_networks, write_manifest

STATE_DIR = Path("/var/lib/flagscale-testhosts")
START_TIMEOUT_S = 30.0
BOOT_TIMEOUT_S = 5.0
"""after this a host without any process is one whose start failed"""
DEFAULT_PRIVATE = (Path("/tmp"),)


@dataclass(frozen=True, slots=True)
class HostStatus:
    """is_up: its sshd listens; is_linked: its cable is in; num_processes: of the host, sshd's own included"""

    name: str
    address: str
    is_up: bool
    is_linked: bool
    num_processes: int


class HostSet:
    """The set called `name`, made or not. Everything about it is in its folder and in the kernel, nothing in here."""

    def __init__(self, name: str = "default", state_dir: Path = STATE_DIR) -> None:
        if not NAME.fullmatch(name):
            raise HostsError(f"--name {name}: expected up to 12 lower-case letters, digits and inner dashes")
        self.name = name
        self.state_dir = state_dir.resolve()
        self.folder = self.state_dir / name

    @property
    def layout(self) -> Layout:
        """The layout of the set as it is.

        Raises:
            HostsError: it is not made.
        """
        return self._manifest().layout

    def up(self, num_hosts: int, private_dirs: Sequence[Path] = ()) -> Layout:
        """Make the set and wait until every sshd listens. What fails half-way is taken down again.

        Raises:
            HostsError: the set is made already, this machine cannot have one, or a host did not start.
        """
        if reason := machine.missing():
            raise HostsError(reason)
        if not 1 <= num_hosts <= MOST_HOSTS:
            raise HostsError(f"{num_hosts} hosts: expected 1 to {MOST_HOSTS}")
        folders = tuple(self._check_private(folder) for folder in private_dirs)
        with machine.lock(self.state_dir):
            layout = self._claim(num_hosts, folders)
            try:
                _make_namespaces(layout)
                _make_files(layout)
                for host in layout.hosts:
                    _boot(layout, host)
                _wait_until_up(layout.hosts)
            except BaseException:
                self._take_down()
                raise
        return layout

    def _check_private(self, folder: Path) -> Path:
        resolved = folder.resolve()
        if not resolved.is_dir():
            raise HostsError(f"{folder} is no folder: only one that is there can be made private")
        programs = (Path(_program(name)).resolve() for name in ("sshd", "mount", "mkdir", "sh"))
        own = (self.state_dir, Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[2])
        for needed in (*own, *programs):
            if needed.is_relative_to(resolved):
                raise HostsError(f"{folder} cannot be private: hosts need {needed}, which is in it")
        return resolved

    def _claim(self, num_hosts: int, private_dirs: tuple[Path, ...]) -> Layout:
        """Write the manifest of a set that does not exist yet."""
        if read_manifest(self.folder) is not None:
            raise HostsError(f"the set `{self.name}` is made already; take it down first, or give another --name")
        taken = used_networks(self.state_dir)
        network = next((number for number in range(NETWORKS) if number not in taken), None)
        if network is None:
            raise HostsError(f"there are {NETWORKS} sets already: take some of them down")
        layout = plan_layout(self.name, self.folder, network, num_hosts, private_dirs)
        for member in layout.members:
            if machine.namespace_id(member.namespace) is not None or member.etc.exists():
                raise HostsError(f"{member.namespace}: a namespace of that name is there, and not by this tool")
        self.folder.mkdir(mode=0o700, exist_ok=True)
        write_manifest(Manifest(layout, {}, made_etc_netns=not ETC_NETNS_DIR.exists()))
        return layout

    def down(self) -> bool:
        """Take down all of the set and nothing else; returns whether there was anything of it."""
        if not self.folder.exists():
            return False
        with machine.lock(self.state_dir):
            return self._take_down()

    def _take_down(self) -> bool:
        manifest = read_manifest(self.folder)
        if manifest is None:
            machine.remove_tree(self.folder)
            return False
        layout = manifest.layout
        names = [member.namespace for member in layout.members if _is_ours(member, manifest)]
        machine.end_processes(names)
        for name in names:
            machine.run(["ip", "netns", "delete", name])
        for member in layout.members:
            machine.remove_tree(member.etc)
        if manifest.made_etc_netns:
            with suppress(OSError):  # another set's files, or somebody else's, lie there meanwhile
                ETC_NETNS_DIR.rmdir()
        machine.remove_tree(layout.folder)
        return True

    def status(self) -> tuple[HostStatus, ...]:
        layout = self.layout
        found = machine.find_processes([host.namespace for host in layout.hosts])
        links = machine.run(["ip", "-n", layout.control.namespace, "-brief", "link", "show", "type", "veth"])
        linked = {line.split("@")[0] for line in links.splitlines() if " UP " in line}
        rows = []
        for host in layout.hosts:
            pids = found.get(host.namespace, ())
            first = machine.find_first_process(pids)
            is_up = first is not None and machine.listens(first)
            # the process outside that holds the pid namespace is the tool's, not the host's
            count = sum(1 for pid in pids if _is_inside(pid))
            rows.append(HostStatus(host.name, host.address, is_up, host.link in linked, count))
        return tuple(rows)

    def host(self, name: str) -> Member:
        """The host called `name`.

        Raises:
            HostsError: there is none.
        """
        hosts = self.layout.hosts
        for host in hosts:
            if host.name == name:
                return host
        raise HostsError(f"there is no host `{name}` in the set `{self.name}`; it has h1 to h{len(hosts)}")

    def cut(self, name: str) -> None:
        """Pull the host's cable: it runs on, and nothing reaches it or comes from it."""
        self._set_link(name, "down")

    def join(self, name: str) -> None:
        """Put the host's cable back."""
        self._set_link(name, "up")

    def _set_link(self, name: str, state: str) -> None:
        host = self.host(name)
        machine.run(["ip", "-n", self.layout.control.namespace, "link", "set", host.link, state])

    def kill(self, name: str) -> None:
        """End a host as a power cut does: every process at once. Its cable stays in."""
        machine.end_processes([self.host(name).namespace])

    def start(self, name: str) -> None:
        """Boot a host that was killed: with its own keys and HOME, and private folders that are empty again.

        Raises:
            HostsError: it runs.
        """
        host = self.host(name)
        with machine.lock(self.state_dir):
            if any(machine.find_processes([host.namespace]).values()):
                raise HostsError(f"{name} runs already")
            _boot(self.layout, host)
            _wait_until_up((host,))

    def command(self, argv: Sequence[str], on: str | None = None) -> list[str]:
        """The words that run `argv` in the control namespace, or within the host `on` (with its /, name and HOME).

        Raises:
            HostsError: the host is not there, or not up.
        """
        layout = self.layout
        member = layout.control if on is None else self.host(on)
        home = ["env", f"HOME={member.home}"]
        if on is None:
            return [_program("ip"), "netns", "exec", member.namespace, *home, *argv]
        first = machine.find_first_process(machine.find_processes([member.namespace])[member.namespace])
        if first is None:
            raise HostsError(f"{on} is not up; start it first")
        return [_program("nsenter"), "--target", str(first), "--all", *home, *argv]

    def _manifest(self) -> Manifest:
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise HostsError(f"the set `{self.name}` is not made: make it with `up N`")
        return manifest


def _program(name: str) -> str:
    return machine.find_program(name) or name


def _is_ours(member: Member, manifest: Manifest) -> bool:
    """Whether the namespace of that name is there, and is still the one that was made for this set."""
    number = machine.namespace_id(member.namespace)
    return number is not None and manifest.namespaces.get(member.namespace, number) == number


def _is_inside(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
    return False


def _make_namespaces(layout: Layout) -> None:
    machine.run_ip_batch("".join(f"netns add {member.namespace}\n" for member in layout.members))
    numbers = {member.namespace: machine.namespace_id(member.namespace) or 0 for member in layout.members}
    manifest = read_manifest(layout.folder)
    if manifest is not None:
        write_manifest(replace(manifest, namespaces=numbers))
    machine.run_ip_batch(plan_links(layout), layout.control.namespace)
    for host in layout.hosts:
        machine.run_ip_batch(plan_host_links(host), host.namespace)


def _make_key(path: Path) -> str:
    machine.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.parent.name, "-f", str(path)])
    return path.with_name(path.name + ".pub").read_text()


def _make_files(layout: Layout) -> None:
    user_key = _make_key(layout.folder / "id_ed25519")
    public_keys = {}
    for member in layout.members:
        (member.home / ".ssh").mkdir(mode=0o700, parents=True)
        member.etc.mkdir(parents=True)
        (member.etc / "hosts").write_text(render_hosts_file(layout))
        (member.etc / "passwd").write_text(render_passwd(Path("/etc/passwd").read_text(), member.home))
    for host in layout.hosts:
        public_keys[host.name] = _make_key(host.folder / "host_key")
        (host.folder / "authorized_keys").write_text(user_key)
        (host.folder / "sshd_config").write_text(render_sshd_config(host))
    for member in layout.members:
        shutil.copy(layout.folder / "id_ed25519", member.home / ".ssh")
        (member.home / ".ssh" / "known_hosts").write_text(render_known_hosts(layout, public_keys))


def _boot(layout: Layout, host: Member) -> None:
    words = [str(word) for word in (host.name, host.home, _program("sshd"), host.folder / "sshd_config")]
    machine.start_detached(
        [
            *(_program("ip"), "netns", "exec", host.namespace),
            *(_program("unshare"), "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "--uts", "--ipc"),
            *("/bin/sh", "-c", BOOT, "boot", *words, *map(str, layout.private_dirs)),
        ],
        host.folder / "sshd.log",
    )


def _wait_until_up(hosts: Sequence[Member]) -> None:
    begin = time.monotonic()
    waiting = list(hosts)
    while True:
        found = machine.find_processes([host.namespace for host in waiting])
        firsts = {host.name: machine.find_first_process(found.get(host.namespace, ())) for host in waiting}
        waiting = [host for host in waiting if not ((pid := firsts[host.name]) and machine.listens(pid))]
        if not waiting:
            return
        waited_s = time.monotonic() - begin
        dead = [host for host in waiting if waited_s > BOOT_TIMEOUT_S and not found.get(host.namespace)]
        if dead or waited_s > START_TIMEOUT_S:
            host = (dead or waiting)[0]
            log = (host.folder / "sshd.log").read_text(errors="replace").splitlines()
            raise HostsError(f"{host.name} did not start within {waited_s:.0f} s: {' / '.join(log[-3:])}")
        time.sleep(0.02)


@contextmanager
def hosts_up(
    num_hosts: int, name: str, private_dirs: Sequence[Path] = (), state_dir: Path = STATE_DIR
) -> Iterator[HostSet]:
    """A set for the length of a `with`; it is taken down however that ends."""
    hosts = HostSet(name, state_dir)
    hosts.up(num_hosts, private_dirs)
    try:
        yield hosts
    finally:
        hosts.down()
