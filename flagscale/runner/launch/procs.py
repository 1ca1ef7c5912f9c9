"""Which processes are ours, and how to signal exactly those: standard library, part of the agent's archive.

"Ours" are descendants, and processes that were started with the run's token in their environment: never a name, and
never a bare number, since numbers are used again (a process is its pid and its start time).

The trade-off: everything is looked up in /proc, a few milliseconds each time, which needs neither root nor cgroups and
finds what `setsid` and `nohup` would hide from a process group. What drops its environment and was never under the
agent (a service that the job asked a system daemon to start) is not ours.
"""

import contextlib
import ctypes
import os
import pwd
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TOKEN = "FLAGSCALE_RUN_TOKEN"
"""The same name as `flagscale.env.RUN_TOKEN`, which this file must not import."""
KEPT = "FLAGSCALE_KEPT_TOKEN"
"""The same name as `flagscale.env.KEPT_TOKEN`. If a job of ours is the scheduler (a Ray cluster), an agent that has a
place with it is below its agent, and ends by itself, in its own time, once its place is gone (`place.py`)."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True)
class Proc:
    """A process that cannot be taken for another: `start_time` is in clock ticks since the machine started."""

    pid: int
    ppid: int
    start_time: int
    is_zombie: bool


def find_proc(pid: int) -> Proc | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold spaces and brackets
    return Proc(pid, int(fields[1]), int(fields[19]), fields[0] in "ZX")


def list_procs() -> dict[int, Proc]:
    found = (find_proc(int(folder.name)) for folder in Path("/proc").glob("[0-9]*"))
    return {proc.pid: proc for proc in found if proc}


def read_environ(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty where it is gone or someone else's."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition(b"=") for item in raw.split(b"\0") if item)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def is_same_alive(pid: int, start_time: int) -> bool:
    proc = find_proc(pid)
    return proc is not None and proc.start_time == start_time and not proc.is_zombie


def name_machine() -> str:
    """Where process numbers mean what they mean here: this start of the kernel, and this namespace of processes."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id} {Path('/proc/self/ns/pid').readlink()}"


def find_descendants(root: int, procs: Mapping[int, Proc], token: str | None = None) -> set[int]:
    """token: leaves out agents that are kept in a place for another run, and all below them"""
    children: dict[int, list[int]] = {}
    for proc in procs.values():
        children.setdefault(proc.ppid, []).append(proc.pid)
    found: set[int] = set()
    fresh = [root]
    while fresh:
        fresh = [pid for parent in fresh for pid in children.get(parent, ()) if pid not in found]
        if token is not None:
            fresh = [pid for pid in fresh if read_environ(pid).get(KEPT, token) == token]
        found.update(fresh)
    return found


def find_ours(token: str, root: int | None = None) -> list[Proc]:
    """Every living process that bears the token or descends from `root`, without the asking process and its parents."""
    procs = list_procs()
    below = find_descendants(root, procs, token) if root else set()
    skip: set[int] = set()
    asking = os.getpid()
    while asking in procs and asking not in skip:
        skip.add(asking)
        asking = procs[asking].ppid
    alive = (proc for proc in procs.values() if not proc.is_zombie and proc.pid not in skip)
    return [proc for proc in alive if proc.pid in below or read_environ(proc.pid).get(TOKEN) == token]


def name_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def send_signal(proc: Proc, signum: int) -> None:
    """Signal this very process: between looking and signalling its number may have passed to another."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        fd = os.pidfd_open(proc.pid)
        try:
            if is_same_alive(proc.pid, proc.start_time):
                signal.pidfd_send_signal(fd, signum)
        finally:
            os.close(fd)


def end_leftovers(token: str, grace_s: float) -> int:
    """End what a run left behind whose agent and guard are gone; returns how many processes that were."""
    told: set[Proc] = set()
    deadline = time.monotonic() + grace_s
    while left := find_ours(token):
        is_late = time.monotonic() >= deadline
        for proc in left:
            if is_late or proc not in told:
                send_signal(proc, signal.SIGKILL if is_late else signal.SIGTERM)
        told.update(left)
        time.sleep(0.05)
    return len(told)


def set_process_option(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def spawn(argv: list[str], env: Mapping[str, str], cwd: str, output: int) -> int:
    """Start `argv` in a session of its own, its output appended to `output`; it gets SIGTERM should we die."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        set_process_option(PR_SET_PDEATHSIG, signal.SIGTERM)
        for signum in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two; a job must not inherit that
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(cwd)
        if os.getppid() == parent:
            os.execvpe(argv[0], argv, env)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def split_status(status: int) -> dict[str, int | str | None]:
    code = os.waitstatus_to_exitcode(status)
    return {"exit_code": code, "signal": None} if code >= 0 else {"exit_code": None, "signal": signal_name(-code)}


def signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"SIG{signum}"
