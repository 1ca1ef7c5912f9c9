"""What is done to the machine: namespaces, links and processes, all of them by the names of one layout.

A process is ours by the network namespace that it runs in, not by its number or its command line: numbers are given
out anew, and command lines are anybody's. So whatever is ended is held by a file descriptor first, and its namespace is
looked at again through that.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from testhosts.layout import NETNS_DIR

SSH_PORT_HEX = "0016"
LISTENING = "0A"
PROGRAMS = ("ip", "sshd", "ssh-keygen", "unshare", "nsenter", "setsid", "mount")


class HostsError(Exception):
    """What was asked for cannot be done; the message says why, and what to do."""


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


def missing() -> str | None:
    """Why this machine cannot have test hosts, None where it can."""
    if os.geteuid() != 0:
        return "test hosts are network namespaces: they need root"
    absent = [name for name in PROGRAMS if find_program(name) is None]
    if absent:
        return f"there is no {', '.join(absent)}: apt-get install openssh-server iproute2 util-linux"
    return None


def run(argv: Sequence[str], text: str | None = None) -> str:
    """Run a program of the machine to its end; `text` is its input.

    Raises:
        HostsError: it failed.
    """
    program = find_program(argv[0])
    done = subprocess.run([program or argv[0], *argv[1:]], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostsError(f"{' '.join(argv)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def run_ip_batch(commands: str, namespace: str | None = None) -> None:
    run(["ip", *(["-n", namespace] if namespace else []), "-batch", "-"], commands)


def start_detached(argv: Sequence[str], log: Path) -> None:
    """Start a program in a session of its own, which is nobody's child: the tool that started it may end."""
    with log.open("ab") as output:
        subprocess.run(
            [find_program("setsid") or "setsid", "--fork", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=True,
        )


def namespace_id(namespace: str) -> int | None:
    """The number by which the kernel knows a named network namespace, None where there is no such name."""
    try:
        return (NETNS_DIR / namespace).stat().st_ino
    except FileNotFoundError:
        return None


def _inode(path: Path) -> int | None:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        return path.stat().st_ino
    return None


def find_processes(namespaces: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Network namespace -> the processes in it, by the machine's numbers; only of names that exist."""
    names = {number: name for name in namespaces if (number := namespace_id(name)) is not None}
    found: dict[str, list[int]] = {name: [] for name in names.values()}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (name := names.get(_inode(folder / "ns" / "net") or -1)):
            found[name].append(int(folder.name))
    return {name: tuple(sorted(pids)) for name, pids in found.items()}


def find_first_process(pids: Sequence[int]) -> int | None:
    """Of a host's processes the one that its pid namespace began with."""
    for pid in pids:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
            if len(numbers) > 1 and numbers[-1] == "1":
                return pid
    return None


def listens(pid: int) -> bool:
    """Whether something listens on port 22 in the network of process `pid`."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == LISTENING and local.endswith(f":{SSH_PORT_HEX}"):
                return True
    return False


def end_processes(namespaces: Sequence[str], timeout_s: float = 10.0) -> None:
    """Kill every process in these network namespaces, and wait until none is left.

    Raises:
        HostsError: one is still there after `timeout_s`: the kernel holds it.
    """
    deadline = time.monotonic() + timeout_s
    while any((left := find_processes(namespaces)).values()):
        if time.monotonic() > deadline:
            raise HostsError(f"processes that cannot be ended: {left}")
        for name, pids in left.items():
            for pid in pids:
                _kill_in(pid, namespace_id(name))
        time.sleep(0.01)


def _kill_in(pid: int, namespace: int | None) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            if namespace is not None and _inode(Path(f"/proc/{pid}/ns/net")) == namespace:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def remove_tree(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)


@contextlib.contextmanager
def lock(folder: Path, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold the lock of all sets in `folder`, so that two commands do not make or take down at once.

    Raises:
        HostsError: another command held it for `timeout_s`.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    with (folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HostsError(
                        f"{folder}/lock: another testhosts command has held it for {timeout_s:g} s"
                    ) from None
                time.sleep(0.02)
        yield
