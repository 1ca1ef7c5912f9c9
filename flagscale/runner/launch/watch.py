"""Watching one host's part of a job, and ending it: the loop of the agent, and of its guard once the agent is lost.

The trade-off: one loop, one thread and blocked signals that are waited for, so nothing here can interrupt anything
else. The price is that a rank's end is learned from torchrun, which waited for it, and not from the kernel.
"""

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagscale.runner.launch import procs
from flagscale.runner.launch.journal import (
    Entry,
    Journal,
    Outcome,
    Spec,
    find_failures,
    find_full_disk,
    find_rank_log,
    read_tail,
    write_small,
)
from flagscale.runner.launch.network import interface_env
from flagscale.runner.launch.peers import Peers
from flagscale.runner.launch.place import describe_loss, load_keeper
from flagscale.runner.launch.stacks import save_stacks

RANK_DIR = "FLAGSCALE_RANK_DIR"
"""The same name as `flagscale.env.RANK_DIR`, which this file must not import."""
UP_AFTER_S = 3.0
"""A rank that does not announce itself, or a program without ranks, counts as up once it has lived this long."""
AFTER_STOP_LIMIT_S = 300.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)


@dataclass(slots=True)
class Top:
    """A process that we started ourselves, and what is known of its ranks."""

    entry: Entry
    pid: int
    since: float
    first_rank: int = 0  # as torchrun gave it: with c10d, hosts are ordered by name, and not by the hostfile
    is_up: bool = False
    ranks: dict[int, procs.Proc] = field(default_factory=dict)
    seen: dict[int, float] = field(default_factory=dict)
    up: set[int] = field(default_factory=set)

    @property
    def is_settled(self) -> bool:
        return self.is_up and len(self.up) >= self.entry.num_ranks


@dataclass(slots=True)
class Ending:
    """Why the job is being ended, and how far that is."""

    outcome: Outcome
    reason: str | None
    deadline: float
    is_failure: bool = False
    """somewhere in the job, so that where the ranks stand is worth keeping"""
    told: set[procs.Proc] = field(default_factory=set)


class Watch:
    """Owns the job's processes on this host: the agent's loop, and the guard's once the agent is lost."""

    def __init__(self, spec: Spec, secrets: dict[str, str], agent_pid: int, guard_pid: int | None) -> None:
        self.spec = spec
        own = {**secrets, procs.TOKEN: spec.token, RANK_DIR: spec.rank_dir}
        self.env = {**interface_env(spec.interface_vars, spec.peer), **os.environ, **own}
        self.journal = Journal(spec.events, spec.label)
        self.peers = Peers(spec)
        self.output = os.open(spec.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.output_start = os.fstat(self.output).st_size
        self.tops: dict[int, Top] = {}
        self.ending: Ending | None = None
        self.exit_code: int | None = 0
        self.first_rank: int | None = None
        self.source: str | None = None
        self.next_look = 0.0
        self.next_beat = 0.0
        self.agent_pid = agent_pid
        self.guard_pid = guard_pid

    def start(self) -> None:
        self.journal.keep_reserve()
        agent, guard = procs.find_proc(self.agent_pid), procs.find_proc(self.guard_pid or 0)
        self.journal.write(
            "agent_started",
            pid=self.agent_pid,
            start_time=agent.start_time if agent else None,
            guard=self.guard_pid,
            guard_start_time=guard.start_time if guard else None,
            machine=procs.name_machine(),
            hostname=socket.gethostname(),
            output_start=self.output_start,
        )
        write_small(self.spec.pid_file, f"{os.getpid()}\n")
        for entry in self.spec.processes:
            # A rank is known by RANK in its environment, so torchrun itself must not inherit one from an outer job.
            env = {name: value for name, value in self.env.items() if name not in ("RANK", "LOCAL_RANK")}
            pid = procs.spawn(["bash", entry.script], env if entry.num_ranks else self.env, "/", self.output)
            self.tops[pid] = Top(entry, pid, time.monotonic(), entry.first_rank)
            started = (proc := procs.find_proc(pid)) and proc.start_time
            self.journal.write("process_started", name=entry.name, pid=pid, start_time=started)

    def run(self) -> None:
        """Until nothing of ours is left; writes the last event."""
        while True:
            self.wait_signal()
            self.reap()
            if self.guard_pid is not None and os.getppid() != self.guard_pid:
                self.guard_pid = None
                self.end("lost", "the agent's guard was killed; the agent ended the job")
            if self.ending is None and not self.tops:
                self.end("succeeded", None)
            self.heed_peers()
            if self.ending is None:
                self.look()
            elif not self.end_step() and not self.tops:
                break
            self.beat()
        self.finish(self.ending)

    def wait_signal(self) -> None:
        is_busy = any(not top.is_settled for top in self.tops.values())
        wait_s = 0.1 if self.ending else 0.3 if is_busy else min(1.0, self.spec.heartbeat_s)
        info = signal.sigtimedwait(SIGNALS, wait_s)
        if info is None or info.si_signo in (signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR2):
            return
        is_forced = info.si_signo == signal.SIGUSR1
        if self.ending is None or is_forced:
            self.end_by_signal(f"{procs.signal_name(info.si_signo)} from process {info.si_pid}")
        if is_forced and self.ending:
            self.ending.deadline = 0.0

    def end_by_signal(self, told: str) -> None:
        """Who stops a job says so in a file first; a scheduler that takes back a place does not."""
        asked: str | None = None
        with contextlib.suppress(OSError, ValueError, KeyError):
            asked = str(json.loads(Path(self.spec.stop_request).read_text())["by"])
        notice = self.peers.find_notice()
        keeper = load_keeper(self.spec) if notice is None and asked is None else None
        if keeper is not None:
            self.end("lost", describe_loss(self.spec, keeper, told))
        else:
            self.end("stopped", notice.text if notice else f"stopped by {asked or told}")

    def heed_peers(self) -> None:
        """End our part if another host, a `stop` or a launcher ends the run, or if a host has vanished."""
        if notice := self.peers.find_notice():
            if self.ending is None:
                self.end("stopped", notice.text, is_failure=bool(notice.label))
            elif notice.is_forced:
                self.ending.deadline = 0.0
        elif self.ending is None and (silence := self.peers.find_silence()):
            self.end("lost", silence)

    def end(self, outcome: Outcome, reason: str | None, is_failure: bool = False) -> None:
        if outcome != "succeeded":
            self.peers.tell(reason)
            self.journal.write("stopping", outcome=outcome, by=reason)
        if self.ending is None:
            is_failure = is_failure or outcome in ("failed", "lost")
            self.ending = Ending(outcome, reason, time.monotonic() + self.spec.grace_s, is_failure)
        elif outcome == "lost":
            self.ending.outcome, self.ending.reason = outcome, reason

    def end_step(self) -> bool:
        """Tell what is new to end, end what is late; True while anything of ours lives."""
        ending = self.ending
        if ending is not None and ending.is_failure:
            self.keep_stacks(ending)
        left = procs.find_ours(self.spec.token, os.getpid())
        if ending is not None:
            is_late = time.monotonic() >= ending.deadline
            for proc in left:
                if is_late or proc not in ending.told:
                    procs.send_signal(proc, signal.SIGKILL if is_late else signal.SIGTERM)
            ending.told.update(left)
        return bool(left)

    def keep_stacks(self, ending: Ending) -> None:
        """Save where the ranks that still live stand, once; the others have been told of the ending before."""
        ending.is_failure = False
        begin = time.monotonic()
        living = {
            rank: proc.pid
            for top in self.tops.values()
            for rank, proc in top.ranks.items()
            if procs.is_same_alive(proc.pid, proc.start_time)
        }
        folder = Path(self.spec.details_dir, self.spec.run_id, "stacks")
        if saved := save_stacks(living, folder):
            self.journal.write("stacks_saved", ranks=saved, folder=str(folder))
        ending.deadline += time.monotonic() - begin

    def reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if top := self.tops.pop(pid, None):
                    self.note_exit(top, status)

    def note_exit(self, top: Top, status: int) -> None:
        result = procs.split_status(status)
        is_good = result["exit_code"] == 0
        ranks = range(top.first_rank, top.first_rank + top.entry.num_ranks)
        failures: list[dict[str, Any]] = []
        if is_good:
            for local_rank, rank in enumerate(ranks):
                self.journal.write("rank_exited", rank=rank, local_rank=local_rank, exit_code=0, signal=None)
        elif top.entry.num_ranks:
            failures = find_failures(read_tail(Path(self.spec.output), self.output_start))
            for failure in failures:
                self.journal.write("rank_exited", **failure)
        self.journal.write("process_exited", name=top.entry.name, **result)
        if not is_good and self.ending is None:
            self.note_failure(top, result, failures)

    def note_failure(self, top: Top, result: dict[str, int | str | None], failures: list[dict[str, Any]]) -> None:
        code, name = result["exit_code"], result["signal"]
        self.exit_code = code if isinstance(code, int) else 128 + getattr(signal, str(name), 0)
        reason = f"{top.entry.name} ended with exit code {code}" if name is None else f"{top.entry.name} died of {name}"
        if failures:
            first = failures[0]
            self.first_rank = first["rank"]
            self.source = find_rank_log(Path(self.spec.details_dir, self.spec.run_id), first["local_rank"])
            how = f"died of {first['signal']}" if first["signal"] else f"ended with exit code {first['exit_code']}"
            reason = f"rank {first['rank']} {how}"
        if folder := find_full_disk(self.spec):
            reason += f"; the disk of {folder} is full"
        self.source = self.source or self.spec.output
        notice = self.peers.find_notice(waits=True)  # of another host that failed before, or of a stop
        self.end("stopped" if notice else "failed", notice.text if notice else reason, is_failure=True)

    def look(self) -> None:
        """Find ranks by the environment that torchrun gave them, and note who is up."""
        is_busy = any(not top.is_settled for top in self.tops.values())
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + (0.3 if is_busy else self.spec.heartbeat_s)
        table = procs.list_procs() if any(top.entry.num_ranks for top in self.tops.values()) else {}
        for top in self.tops.values():
            self.find_ranks(top, table, now)
            for rank in sorted(set(top.ranks) - top.up):
                if self.is_rank_up(top, rank, now):
                    top.up.add(rank)
                    self.journal.write("rank_up", rank=rank)
            if not top.is_up and now - top.since >= UP_AFTER_S:
                top.is_up = True
                self.journal.write("process_up", name=top.entry.name)

    def find_ranks(self, top: Top, table: dict[int, procs.Proc], now: float) -> None:
        expected = range(top.first_rank, top.first_rank + top.entry.num_ranks)
        alive = set(table.values())
        if all(top.ranks.get(rank) in alive for rank in expected):
            return
        environs = {pid: procs.read_environ(pid) for pid in procs.find_descendants(top.pid, table)}
        for pid, environ in sorted(environs.items()):
            number, local = environ.get("RANK", ""), environ.get("LOCAL_RANK", "")
            if not (number.isdigit() and local.isdigit()) or int(local) >= top.entry.num_ranks:
                continue
            if int(number) not in expected and not self.spec.neighbour:
                continue
            rank, proc, parent = int(number), table[pid], environs.get(table[pid].ppid, {})
            if parent.get("RANK") == number or proc.is_zombie or top.ranks.get(rank) == proc:
                continue
            top.first_rank = rank - int(local)
            top.ranks[rank], top.seen[rank] = proc, now
            top.up.discard(rank)
            self.journal.write(
                "rank_started",
                rank=rank,
                local_rank=int(local),
                pid=pid,
                start_time=proc.start_time,
                process=top.entry.name,
            )

    def is_rank_up(self, top: Top, rank: int, now: float) -> bool:
        if top.entry.announces:
            return Path(self.spec.rank_dir, f"rank_{rank}.up").exists()
        proc = top.ranks[rank]
        return now - top.seen[rank] >= UP_AFTER_S and procs.is_same_alive(proc.pid, proc.start_time)

    def beat(self) -> None:
        if time.monotonic() < self.next_beat:
            return
        self.next_beat = time.monotonic() + self.spec.heartbeat_s
        self.journal.flush()
        write_small(self.spec.heartbeat, json.dumps({"time": time.time(), "pid": os.getpid()}))

    def finish(self, ending: Ending | None) -> None:
        self.peers.leave()
        self.run_after_stop()
        self.reap()
        outcome = ending.outcome if ending else "succeeded"
        exit_code = {"stopped": 128 + signal.SIGTERM, "lost": None}.get(outcome, self.exit_code)
        with contextlib.suppress(OSError, ValueError):
            if int(Path(self.spec.pid_file).read_text()) == self.agent_pid:
                Path(self.spec.pid_file).unlink()
        self.journal.write(
            "job_ended",
            outcome=outcome,
            exit_code=exit_code,
            first_rank=self.first_rank,
            source=self.source,
            reason=ending.reason if ending else None,
            output_end=os.fstat(self.output).st_size,
        )
        self.journal.close()

    def run_after_stop(self) -> None:
        """The user's `cmds.after_stop`, once, when all else has ended; what it leaves running is ended too."""
        if self.spec.after_stop is None or self.journal.holds("after_stop_started"):
            return
        self.journal.write("after_stop_started")
        pid = procs.spawn(["bash", "-c", self.spec.after_stop], self.env, self.spec.cwd, self.output)
        deadline = time.monotonic() + AFTER_STOP_LIMIT_S
        status: int | None = None
        while status is None and time.monotonic() < deadline:
            signal.sigtimedwait([signal.SIGCHLD], 0.2)
            with contextlib.suppress(ChildProcessError):
                done, code = os.waitpid(pid, os.WNOHANG)
                status = code if done else None
        self.ending = Ending("stopped", None, 0.0)
        while self.end_step():
            time.sleep(0.05)
        self.reap()
        result = procs.split_status(status) if status is not None else {"exit_code": None, "signal": "SIGKILL"}
        self.journal.write("after_stop", **result)
