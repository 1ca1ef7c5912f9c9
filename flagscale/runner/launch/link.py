"""One connection to one host by SSH: who it is, its key checked, commands run on it.

Paramiko, because it gives errors that can be told apart and any number of connections from one process; the price is
that of the user's ssh configuration it knows HostName, User, Port, IdentityFile, UserKnownHostsFile, ProxyCommand and
ProxyJump only. A key that is not in the known hosts is refused; `accept_new` remembers it. A key that changed is
refused whatever is asked for.

Imported by who needs a connection, and no sooner: Paramiko takes a quarter of a second.
"""

import contextlib
import functools
import getpass
import logging
import shlex
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko

from flagscale.runner.launch.connection import (
    Dialog,
    LinkError,
    ProgramEndedError,
    describe_break,
    describe_changed_key,
    describe_refusal,
    describe_timeout,
    describe_unknown_key,
    describe_unknown_name,
    describe_unreachable,
)
from flagscale.runner.launch.folder import SSH_PORT, Remote

KEEPALIVE_S = 15
OPEN_LIMIT_S = 10.0
_SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
_WRITING, _READING = threading.Lock(), threading.Lock()


class _UnknownKeyError(paramiko.SSHException):
    """The host shows a key and the known hosts have none of it."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a connection goes, and with which keys."""

    hostname: str
    port: int
    user: str
    key_files: tuple[str, ...] = ()
    known_hosts: Path = Path("~/.ssh/known_hosts")
    proxy: str | None = None

    def __str__(self) -> str:
        return f"{self.user}@{self.hostname}" + (f":{self.port}" if self.port != SSH_PORT else "")


def find_route(remote: Remote, config_path: Path | None = None) -> Route:
    """What the hostfile says, over what the user's ssh configuration says, over ssh's own defaults.

    Raises:
        LinkError: the ssh configuration cannot be read.
    """
    path = config_path or Path.home() / ".ssh" / "config"
    entry: dict[str, Any] = {}
    if path.is_file():
        try:
            entry = dict(paramiko.SSHConfig.from_path(str(path)).lookup(remote.name))
        except (OSError, ValueError, paramiko.SSHException) as error:
            raise LinkError(f"{path} cannot be read: {error}") from None
    port = remote.port or int(entry.get("port", SSH_PORT))
    hostname = str(entry.get("hostname", remote.name))
    proxy = entry.get("proxycommand")
    if (jump := entry.get("proxyjump")) and jump != "none":
        proxy = _through_jump(str(jump), f"{hostname}:{port}")
    known = str(entry.get("userknownhostsfile", "~/.ssh/known_hosts")).split()[0]
    return Route(
        hostname=hostname,
        port=port,
        user=remote.user or str(entry.get("user", "")) or getpass.getuser(),
        key_files=tuple(entry.get("identityfile", ())),
        known_hosts=Path.home() / known[2:] if known.startswith("~/") else Path(known),
        proxy=None if proxy == "none" else proxy,
    )


def _through_jump(jump: str, target: str) -> str:
    """A ProxyCommand for what ProxyJump says: `[user@]host[:port]`, several with commas between."""
    *earlier, last = jump.split(",")
    before = ["-J", ",".join(earlier)] if earlier else []
    return shlex.join(["ssh", *before, "-W", target, last if "://" in last else f"ssh://{last}"])


def _find_keys(path: Path, name: str) -> dict[str, paramiko.PKey]:
    """Kind -> key of a host in a file of known hosts, which need not be there."""
    try:
        stat = path.stat()
        with _READING:
            known = _load_known_hosts(path, stat.st_mtime_ns, stat.st_size)
    except OSError:
        return {}
    return dict(known.lookup(name) or {})


@functools.lru_cache(4)
def _load_known_hosts(path: Path, _mtime_ns: int, _size: int) -> paramiko.HostKeys:
    """Read once as long as it stays as it is: a thousand hosts have a thousand lines, and each host needs one."""
    return paramiko.HostKeys(str(path))


class _KeyPolicy(paramiko.MissingHostKeyPolicy):
    """Refuse an unknown key, or remember it by one line at the end of the file: the other lines stay as they are."""

    def __init__(self, path: Path, accept_new: bool) -> None:
        self.path, self.accept_new = path, accept_new

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        del client
        if not self.accept_new:
            raise _UnknownKeyError(f"{key.get_name()} {key.fingerprint}")
        line = f"{hostname} {key.get_name()} {key.get_base64()}\n"
        with _WRITING, contextlib.suppress(FileNotFoundError):
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            with self.path.open("a") as file:
                file.write(line)


def _explain(error: Exception, remote: Remote, route: Route, timeout_s: float) -> str:
    if isinstance(error, paramiko.BadHostKeyException):
        key = f"now {error.key.get_name()} {error.key.fingerprint}, another in {route.known_hosts}"
        return describe_changed_key(remote, key)
    if isinstance(error, _UnknownKeyError):
        return describe_unknown_key(remote, str(error))
    if isinstance(error, paramiko.AuthenticationException):
        return describe_refusal(remote, route.user, str(route))
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        error = next(iter(error.errors.values()), error)
    if isinstance(error, TimeoutError):
        return describe_timeout(timeout_s, str(route))
    if isinstance(error, socket.gaierror):
        return describe_unknown_name(route.hostname)
    said = error.strerror if isinstance(error, OSError) else None
    return describe_unreachable(said or str(error) or type(error).__name__, str(route))


class Link:
    """An open connection; it owns the socket and Paramiko's thread.

    Raises:
        LinkError: from here and from `run`.
    """

    def __init__(self, remote: Remote, accept_new: bool = False, timeout_s: float = 10.0) -> None:
        logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # what goes wrong is raised, and told once
        self.remote = remote
        self.route = route = find_route(remote)
        self.client = paramiko.SSHClient()
        name = route.hostname if route.port == SSH_PORT else f"[{route.hostname}]:{route.port}"
        for path in (_SYSTEM_KNOWN_HOSTS, route.known_hosts):
            for kind, key in _find_keys(path, name).items():
                self.client.get_host_keys().add(name, kind, key)
        self.client.set_missing_host_key_policy(_KeyPolicy(route.known_hosts, accept_new))
        keys: Any = list(route.key_files) or None
        try:
            self.client.connect(
                route.hostname,
                route.port,
                route.user,
                key_filename=keys,
                timeout=timeout_s,
                banner_timeout=timeout_s,
                auth_timeout=timeout_s,
                channel_timeout=timeout_s,
                sock=paramiko.ProxyCommand(route.proxy) if route.proxy else None,
            )
        except (OSError, EOFError, paramiko.SSHException) as error:
            self.client.close()
            raise LinkError(_explain(error, remote, route, timeout_s)) from None
        if transport := self.client.get_transport():
            transport.set_keepalive(KEEPALIVE_S)

    def start(self, words: list[str]) -> Dialog:
        try:
            transport = self.client.get_transport()
            if transport is None:
                raise EOFError("the connection is closed")
            channel = transport.open_session(timeout=OPEN_LIMIT_S)
            channel.exec_command(shlex.join(words))
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise LinkError(describe_break(str(error) or "broke off", str(self.route))) from None
        return ChannelDialog(channel, str(self.route))

    def run(self, words: list[str], text: bytes, limit_s: float) -> tuple[int, bytes, bytes]:
        """Exit code, output and errors of a command; `text` is its input. Its words arrive as they are."""
        deadline = time.monotonic() + limit_s
        out, err = bytearray(), bytearray()
        try:
            transport = self.client.get_transport()
            if transport is None:
                raise EOFError("the connection is closed")
            with transport.open_session(timeout=limit_s) as channel:
                channel.settimeout(limit_s)
                channel.exec_command(shlex.join(words))
                channel.sendall(text)
                channel.shutdown_write()
                channel.settimeout(0.2)
                while not _drain(channel, out, err):
                    if time.monotonic() > deadline:
                        raise TimeoutError
                return channel.recv_exit_status(), bytes(out), bytes(err)
        except (OSError, EOFError, paramiko.SSHException) as error:
            how = f"no answer within {limit_s:g} s" if isinstance(error, TimeoutError) else str(error) or "broke off"
            raise LinkError(describe_break(how, str(self.route))) from None

    def close(self) -> None:
        self.client.close()


class ChannelDialog:
    """A dialog through one channel of a connection, which it owns."""

    def __init__(self, channel: paramiko.Channel, route: str) -> None:
        self.channel, self.route = channel, route
        self.said = bytearray()

    def ask(self, text: bytes, limit_s: float) -> bytes:
        deadline = time.monotonic() + limit_s
        try:
            self.channel.settimeout(limit_s)
            with contextlib.suppress(OSError):  # of a program that has ended is said how
                self.channel.sendall(text)
            while (end := self.said.find(b"\n")) < 0:
                self.channel.settimeout(max(0.01, deadline - time.monotonic()))
                chunk = self.channel.recv(1 << 16)
                if not chunk:
                    raise self._explain_end()
                self.said += chunk
        except (OSError, EOFError, paramiko.SSHException) as error:
            how = f"no answer within {limit_s:g} s" if isinstance(error, TimeoutError) else str(error) or "broke off"
            raise LinkError(describe_break(how, self.route)) from None
        line = bytes(self.said[:end])
        del self.said[: end + 1]
        return line

    def _explain_end(self) -> Exception:
        err = bytearray()
        while more := self.channel.recv_stderr(1 << 16):
            err += more
        code = self.channel.recv_exit_status()
        return ProgramEndedError(code, bytes(err)) if code >= 0 else EOFError("the connection was closed")

    def close(self) -> None:
        self.channel.close()


def _drain(channel: paramiko.Channel, out: bytearray, err: bytearray) -> bool:
    """Take what has come; True once the command has ended and nothing more can come."""
    while channel.recv_stderr_ready():
        err += channel.recv_stderr(1 << 16)
    with contextlib.suppress(TimeoutError):
        chunk = channel.recv(1 << 16)
        out += chunk
        if not chunk:
            while more := channel.recv_stderr(1 << 16):
                err += more
            return True
    return False
