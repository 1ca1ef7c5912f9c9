"""What an agent is told (`Spec`) and what it tells (`Journal`): standard library, part of the agent's archive.

Events are JSON objects, one a line, appended by one writer a host, so that a reader needs no lock and a crash costs at
most the last line.

    agent_started     pid start_time guard guard_start_time machine hostname output_start
    process_started   name pid start_time          process_up  name
    rank_started      rank local_rank pid start_time process
    rank_up           rank
    rank_exited       rank local_rank exit_code signal pid first at
    process_exited    name exit_code signal
    stopping          outcome by
    stacks_saved      ranks folder
    after_stop_started
    after_stop        exit_code signal
    job_ended         outcome exit_code first_rank source reason output_end
"""

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flagscale.runner.launch.procs import signal_name

LAST_WORD_LIMIT_S = 30.0
"""How long the last event is tried again on a disk that takes nothing."""

FULL_BYTES = 1 << 20

Outcome = Literal["succeeded", "failed", "stopped", "lost"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One process of the spec: its script, and the ranks that the script's torchrun starts."""

    name: str
    script: str
    num_ranks: int = 0
    first_rank: int = 0
    announces: bool = False


@dataclass(frozen=True, slots=True)
class Spec:
    """All that the agent of one host is told. It holds no secret but the token, which is worth nothing elsewhere."""

    run_id: str
    token: str
    label: str
    node_rank: int
    processes: tuple[Entry, ...]
    output: str
    pid_file: str
    events: str
    heartbeat: str
    agent_log: str
    rank_dir: str
    details_dir: str
    stop_request: str
    cwd: str
    after_stop: str | None = None
    heartbeat_s: float = 5.0
    grace_s: float = 30.0
    ending: str = ""
    """the file that ends the run (`peers.py`)"""
    neighbour: str = ""
    """the label of the host whose heartbeat this agent watches; empty where a host does not need the others"""
    keeper: str = ""
    """where the process that keeps this host's place with a scheduler has written who it is (`keeper.py`)"""
    peer: str = ""
    interface_vars: tuple[str, ...] = ()
    """as of `HostPlan`"""
    meet_host: str = ""
    meet_port: int = 0
    """where the agents of hosts without a shared folder speak to each other (`wire.py`); 0 where they do not"""
    meet_key: str = ""
    """what they sign with: of the run, where `token` is of this host alone"""
    leads: bool = False
    """this agent is the one that listens there"""


def load_spec(path: Path) -> Spec:
    row = json.loads(path.read_text())
    processes = tuple(Entry(**entry) for entry in row["processes"])
    return Spec(**{**row, "processes": processes, "interface_vars": tuple(row["interface_vars"])})


class Journal:
    """Events, one JSON object a line, appended. A disk that is full delays them and harms nothing else."""

    def __init__(self, path: str, host: str) -> None:
        self.path, self.host = Path(path), host
        self.reserve = Path(f"{path}.reserve")
        self.waiting: list[bytes] = []

    def keep_reserve(self) -> None:
        """Hold back room for the last words, so that a job which fills the disk can still be told of."""
        with contextlib.suppress(OSError), self.reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 16384)

    def write(self, kind: str, **fields: object) -> None:
        row = {"time": round(time.time(), 3), "host": self.host, "event": kind, **fields}
        self.waiting.append(json.dumps(row).encode() + b"\n")
        self.flush()

    def holds(self, kind: str) -> bool:
        """Whether an event of this kind was written by anyone: the guard continues what the agent began."""
        with contextlib.suppress(OSError):
            return f'"event": "{kind}"'.encode() in self.path.read_bytes()
        return False

    def flush(self) -> bool:
        with contextlib.suppress(OSError), self.path.open("ab", buffering=0) as file:
            while self.waiting:
                size = file.seek(0, os.SEEK_END)
                if file.write(self.waiting[0]) != len(self.waiting[0]):
                    file.truncate(size)
                    break
                self.waiting.pop(0)
        return not self.waiting

    def close(self) -> None:
        deadline = time.monotonic() + LAST_WORD_LIMIT_S
        if not self.flush():
            self.reserve.unlink(missing_ok=True)
        while not self.flush() and time.monotonic() < deadline:
            time.sleep(0.2)
        self.reserve.unlink(missing_ok=True)


def load_events(path: Path) -> tuple[dict[str, Any], ...]:
    """All whole events; the last line of a writer that was killed may be half a line."""
    return parse_events(read_journal(path))


def read_journal(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parse_events(data: bytes) -> tuple[dict[str, Any], ...]:
    events: list[dict[str, Any]] = []
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return tuple(events)


def write_small(path: str, text: str) -> None:
    """Replace a small file whole; a full disk leaves the older one."""
    draft = f"{path}.new"
    with contextlib.suppress(OSError):
        Path(draft).write_text(text)
        Path(draft).replace(path)


def find_full_disk(spec: Spec) -> str | None:
    """A folder of the job's outputs whose disk takes nothing more, which is then why the job failed."""
    for folder in dict.fromkeys(str(Path(name).parent) for name in (spec.events, spec.output)):
        with contextlib.suppress(OSError):
            disk = os.statvfs(folder)
            if disk.f_bavail * disk.f_frsize < FULL_BYTES:
                return folder
    return None


def read_tail(path: Path, start: int = 0, end: int | None = None, window: int = 1 << 18) -> str:
    """The last `window` bytes of a part of a file, from byte `start` to `end`; empty where it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        stop = size if end is None else min(end, size)
        first = file.seek(max(start, stop - window))
        return file.read(max(0, stop - first)).decode(errors="replace")
    return ""


def find_rank_log(details: Path, local_rank: int) -> str | None:
    """torchrun's own copy of what the rank wrote in this run, the stream for errors where it holds any."""
    for stream in ("stderr.log", "stdout.log"):
        found: list[tuple[float, str]] = []
        for path in details.glob(f"**/attempt_*/{local_rank}/{stream}"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                if stat.st_size:
                    found.append((stat.st_mtime, str(path)))
        if found:
            return max(found)[1]
    return None


def find_rank_files(details: Path, local_rank: int) -> list[Path]:
    """torchrun's stdout.log and stderr.log of a rank, those of its last attempt; details: of one run."""

    def order(path: Path) -> tuple[float, int]:
        attempt = _ATTEMPT.search(str(path))
        return path.parent.parent.stat().st_mtime, int(attempt[1]) if attempt else 0

    found = (details.glob(f"**/attempt_*/{local_rank}/{stream}.log") for stream in ("stdout", "stderr"))
    return [last for paths in found if (last := max(paths, key=order, default=None))]


_ATTEMPT = re.compile(r"attempt_(\d+)")
_ROW = re.compile(
    r"^  time +: (?P<time>\S+)\n  host +: (?P<host>\S+)\n  rank +: (?P<rank>\d+) \(local_rank: (?P<local_rank>\d+)\)\n"
    r"  exitcode +: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)",
    re.MULTILINE,
)


def find_failures(output: str) -> list[dict[str, Any]]:
    """The ranks that torchrun's last summary names (its ChildFailedError), the one that failed first at the head.

    A summary that was cut short before it says which was first marks none as `first`.
    """
    start = output.rfind("ChildFailedError:")
    text = output[start:] if start >= 0 else ""
    root = text.find("Root Cause (first observed failure)")
    rows = [(0 <= root < match.start(), match) for match in _ROW.finditer(text)]
    return [
        {
            "rank": int(match["rank"]),
            "local_rank": int(match["local_rank"]),
            "pid": int(match["pid"]),
            "exit_code": code if (code := int(match["code"])) >= 0 else None,
            "signal": signal_name(-code) if code < 0 else None,
            "first": is_first,
            "at": match["time"],
        }
        for is_first, match in sorted(rows, key=lambda row: not row[0])
    ]
