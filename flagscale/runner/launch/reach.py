"""Asking many hosts at once: connections in parallel, and an answer or a reason for each host, never one exception.

A host that does not answer is part of the truth about a run, so it comes back as a value. Only what a caller cannot go
on from is raised, by the caller, for all hosts together.
"""

import json
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, TypeVar

from flagscale.runner.launch.archive import ERRANDS, RAY_ERRANDS, SURVEY, build_archive
from flagscale.runner.launch.connection import (
    MISSING,
    Connection,
    Dialog,
    LinkError,
    ProgramEndedError,
    open_connection,
)
from flagscale.runner.launch.errands import ANSWER, BOOT
from flagscale.runner.launch.folder import Remote, RunRef
from flagscale.runner.launch.mirror import fetch_reports, find_away
from flagscale.runner.launch.notice import Notice, load_notice
from flagscale.runner.launch.procs import end_leftovers
from flagscale.runner.launch.pulse import render_pulse
from flagscale.runner.launch.record import Answer, HostRecord, load_records

CONNECT_LIMIT_S = 10.0
ASK_LIMIT_S = 10.0
ASK_EVERY_S = 10.0
CUT_OFF_AFTER_S = 30.0
"""A launcher that stays ends its job once a host has not been reached for so long."""
MOST_THREADS = 64
ASK_AWAY_EVERY_S = 2.0
"""Of hosts whose journals have to be fetched."""
_OF_DOCKER = ("Error response from daemon", "Cannot connect to the Docker daemon")
Result = TypeVar("Result")
_ARCHIVES = {"errands": ERRANDS, "survey": SURVEY, "ray_errands": RAY_ERRANDS}
_MISSING = (126, MISSING)
"""exit codes of a shell that cannot run a program"""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one host: an answer, or the fault that there is none for."""

    answer: Mapping[str, Any]
    fault: str | None = None


def pack_archive(archive: bytes) -> bytes:
    """What `errands.BOOT` reads first on a host."""
    return f"{len(archive)}\n".encode() + archive


def pack_request(errand: str, request: Mapping[str, Any]) -> bytes:
    """What it reads then, as often as it comes."""
    return json.dumps({"errand": errand, **request}).encode() + b"\n"


class Links:
    """Open connections to some hosts; owns them, and closes them at the end of a `with`.

    A host's Python is started for the first errand, and answers the later ones too.

    module: whose errands are sent along
    """

    def __init__(
        self,
        remotes: Sequence[Remote],
        accept_new: bool = False,
        limit_s: float = CONNECT_LIMIT_S,
        module: Literal["errands", "survey", "ray_errands"] = "errands",
    ) -> None:
        self.remotes = {remote.label: remote for remote in remotes}
        self.accept_new = accept_new
        self.limit_s = limit_s
        self.open: dict[str, Connection] = {}
        self.dialogs: dict[str, Dialog] = {}
        self.locks = {label: threading.Lock() for label in self.remotes}
        self.module = module
        self.flags = ["-I"] if module == "ray_errands" else ["-I", "-S"]  # Ray is no part of the standard library
        self.boot = BOOT.format(module=module)

    @cached_property
    def archive(self) -> bytes:
        """Built when the first errand is run: what the shell answers needs none."""
        return build_archive(_ARCHIVES[self.module])

    def __enter__(self) -> "Links":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for label in list(self.open):
            self._close(label)

    def call(
        self, errand: str, requests: Mapping[str, Mapping[str, Any]], limit_s: float = ASK_LIMIT_S
    ) -> dict[str, Reply]:
        """Run an errand on each host that `requests` names, all at once."""

        def ask(label: str) -> Reply:
            with self.locks[label]:
                return self._ask(label, pack_request(errand, requests[label]), limit_s)

        return self.each(requests, ask)

    def run_all(self, commands: Mapping[str, tuple[list[str], bytes]], limit_s: float) -> dict[str, Reply]:
        """Run a command that answers with a line of JSON on each host, all at once."""
        return self.each(commands, lambda label: self._run(label, *commands[label], limit_s))

    def each(self, labels: Iterable[str], run: Callable[[str], Result]) -> dict[str, Result]:
        """What `run` returns for each host, all at once."""
        names = list(labels)
        if not names:
            return {}
        with ThreadPoolExecutor(min(MOST_THREADS, len(names))) as pool:
            return dict(zip(names, pool.map(run, names), strict=True))

    def _connect(self, label: str) -> Connection:
        if label not in self.open:
            self.open[label] = open_connection(self.remotes[label], self.accept_new, self.limit_s)
        return self.open[label]

    def _close(self, label: str) -> None:
        for owned in (self.dialogs.pop(label, None), self.open.pop(label, None)):
            if owned is not None:
                owned.close()

    def _ask(self, label: str, text: bytes, limit_s: float) -> Reply:
        words = [self.remotes[label].python, *self.flags, "-c", self.boot, label]  # so that `ps` shows whose it is
        try:
            if label not in self.dialogs:
                self.dialogs[label] = self._connect(label).start(self.remotes[label].enter(words))
                text = pack_archive(self.archive) + text
            line = self.dialogs[label].ask(text, limit_s).decode(errors="replace")
            while ANSWER not in line:
                line = self.dialogs[label].ask(b"", limit_s).decode(errors="replace")
            return Reply(json.loads(line.partition(ANSWER)[2]))
        except LinkError as error:
            self._close(label)
            return Reply({}, str(error))
        except ProgramEndedError as ended:
            if dialog := self.dialogs.pop(label, None):
                dialog.close()
            return self._read(label, words, ended.code, "", ended.err.decode(errors="replace").strip())

    def _run(self, label: str, words: list[str], text: bytes, limit_s: float) -> Reply:
        try:
            code, out, err = self._connect(label).run(self.remotes[label].enter(words), text, limit_s)
        except LinkError as error:
            self._close(label)
            return Reply({}, str(error))
        return self._read(label, words, code, out.decode(errors="replace"), err.decode(errors="replace").strip())

    def _read(self, label: str, words: Sequence[str], code: int, out: str, err: str) -> Reply:
        if code in _MISSING or (code == 1 and any(text in err for text in _OF_DOCKER)):
            return Reply({}, _explain_missing(self.remotes[label], err))
        return read_reply(words, code, out, err)


def read_reply(words: Sequence[str], code: int, out: str, err: str) -> Reply:
    """What a command said whose last line is to be JSON."""
    try:
        if code != 0:
            raise ValueError
        last = out.strip().splitlines()[-1]
        return Reply(json.loads(last.partition(ANSWER)[2] or last))
    except (ValueError, IndexError):
        return Reply({}, f"exit code {code} of `{shlex.join(words[:2])} …`: {err.strip() or out}")


def _explain_missing(remote: Remote, told: str) -> str:
    """Why not even Python could be run."""
    if remote.container and _OF_DOCKER[0] in told:
        return f"has no running container `{remote.container}` (`experiment.runner.docker`): {told}"
    if remote.container and "docker" in told and "OCI" not in told:
        return f"cannot run `docker`: {told}"
    if remote.container:
        return (
            f"has no {remote.python} in its container `{remote.container}`: {told}; name the interpreter there by "
            "`experiment.runner.python`"
        )
    return (
        f"has no interpreter {remote.python}: {told}; expected the launcher's own, on the same path, or the one that "
        "`experiment.runner.python` names"
    )


def watchers_of(record: HostRecord) -> dict[str, Any]:
    """How a host finds the agent and the guard of a run, and nobody else."""
    event = record.find("agent_started") or {}
    pairs = [(event.get("pid"), event.get("start_time")), (event.get("guard"), event.get("guard_start_time"))]
    return {"machine": event.get("machine"), "pids": [pair for pair in pairs if all(pair)], "token": record.spec.token}


def find_askable(run: RunRef, records: Iterable[HostRecord]) -> list[HostRecord]:
    """The hosts of which only themselves know whether they work: other machines whose job has not ended.

    Of one that shares its folder it is known whether its job has begun.
    """
    remote = {remote.label for remote in run.remotes}
    waiting = (record for record in records if record.label in remote and not (record.is_here or record.has_ended))
    return [record for record in waiting if record.mirror is not None or record.find("agent_started")]


def ask_hosts(run: RunRef, links: Links | None = None) -> dict[str, Answer]:
    """Ask over SSH after the agents of all hosts of which it matters; no connection is made where none is.

    What hosts with a folder of their own have written is fetched.
    """
    waiting = find_askable(run, load_records(run))
    if not waiting:
        return {}
    if links is None:
        with Links(run.remotes) as links:
            return ask_hosts(run, links)
    away = find_away(waiting)
    replies = _ask_shared([record for record in waiting if record not in away], links)
    replies |= fetch_reports(away, links) if away else {}
    return {
        label: Answer(unreachable=reply.fault)
        if reply.fault
        else Answer(reply.answer["is_watched"], reply.answer["num_left"])
        for label, reply in replies.items()
    }


def _ask_shared(records: Sequence[HostRecord], links: Links) -> dict[str, Reply]:
    watchers = {record.label: watchers_of(record) for record in records}
    replies = links.run_all({label: (render_pulse(row), b"") for label, row in watchers.items()}, ASK_LIMIT_S)
    dead = [label for label, reply in replies.items() if not (reply.fault or reply.answer.get("is_watched"))]
    replies = {label: Reply({"num_left": 0, **reply.answer}, reply.fault) for label, reply in replies.items()}
    return replies | links.call("ask", {label: watchers[label] for label in dead})


def load_true_records(run: RunRef) -> tuple[HostRecord, ...]:
    """The records, every host that is another machine asked."""
    return load_records(run, ask_hosts(run))


def clean_hosts(run: RunRef, links: Links, grace_s: float) -> int:
    """End what a run left without watchers on any host that can be reached; returns how many processes that were."""
    records = load_records(run)
    total = sum(end_leftovers(record.spec.token, grace_s) for record in records if record.is_here)
    requests = {
        record.label: {"token": record.spec.token, "grace_s": grace_s}
        for record in records
        if record.label in links.remotes and not record.is_here and record.find("agent_started")
        if not record.has_ended  # the last word of an agent that left nothing
    }
    replies = links.call("clean", requests, grace_s + ASK_LIMIT_S)
    return total + sum(int(reply.answer.get("num_left", 0)) for reply in replies.values())


def signal_hosts(run: RunRef, links: Links, signum: int, labels: Iterable[str] | None = None) -> None:
    """Ask the agents on other machines to end; a host that does not answer learns it from the run's folder.

    A host with a folder of its own is told the reason too.

    labels: only these hosts
    """
    wanted = set(run.labels if labels is None else labels)
    records = [record for record in find_askable(run, load_records(run)) if record.label in wanted]
    shared = [record for record in records if record.mirror is None]
    links.run_all({record.label: (render_pulse(watchers_of(record), signum), b"") for record in shared}, ASK_LIMIT_S)
    notice = load_notice(run.notice_path)
    said = {"path": str(run.notice_path), **asdict(notice)} if notice else None
    away = [record for record in records if record.mirror is not None]
    links.call("end", {record.label: {**watchers_of(record), "signum": signum, "notice": said} for record in away})


def pass_notice(run: RunRef, links: Links | None = None) -> None:
    """Carry what ends a run, if anything does, to the hosts that share no folder."""
    notice = load_notice(run.notice_path)
    labels = [remote.label for remote in run.remotes if not remote.is_shared]
    if notice is None or not labels:
        return
    if links is None:
        with Links(run.remotes) as links:
            pass_notice(run, links)
        return
    signal_hosts(run, links, signal.SIGUSR1 if notice.is_forced else signal.SIGTERM, labels)


Fetch = Callable[[Sequence[HostRecord], Links], dict[str, str]]


class Look:
    """Looks at a run again and again: its folder every time, its other machines over SSH in the background.

    Answers are some seconds old; the folder's events and heartbeats are not, so nothing here waits for a host that is
    silent. Of hosts with a folder of their own the first look waits for what they have written, and what ends the run
    here is carried to them. Connections stay open between looks; they end with the process, or with the owner of
    `links`.

    also: what else to fetch of hosts with a folder of their own that answer; returns label -> why it could not be
    answers: what hosts said a moment ago, so that they are not asked at once; empty where all have just been started
    """

    def __init__(
        self,
        run: RunRef,
        links: Links | None = None,
        also: Fetch | None = None,
        answers: Mapping[str, Answer] | None = None,
    ) -> None:
        self.run = run
        self.links = links or Links(run.remotes)
        self.also = also
        self.has_away = any(not remote.is_shared for remote in run.remotes)
        self.answers = dict(answers or {})
        self.silent_since: dict[str, float] = {}
        self.unread: dict[str, str] = {}
        self.passed: Notice | None = None
        self.next_ask = 0.0 if answers is None else time.monotonic() + ASK_EVERY_S
        self.asking: threading.Thread | None = None

    def load_records(self) -> tuple[HostRecord, ...]:
        is_idle = self.asking is None or not self.asking.is_alive()
        if self.has_away and self.asking is None:
            self.fetch()
        elif self.run.remotes and is_idle and (time.monotonic() >= self.next_ask or self._has_news()):
            self._start()
        return load_records(self.run, self.answers)

    def fetch(self) -> dict[str, str]:
        """Wait until all that is new has come from hosts with a folder of their own; label -> why something has not."""
        self.wait()
        if self.has_away:
            self._start()
            self.wait()
        return self.unread

    def _start(self) -> None:
        self.next_ask = time.monotonic() + (ASK_AWAY_EVERY_S if self.has_away else ASK_EVERY_S)
        self.asking = threading.Thread(target=self._ask, daemon=True)
        self.asking.start()

    def _has_news(self) -> bool:
        return self.has_away and load_notice(self.run.notice_path) != self.passed

    def _ask(self) -> None:
        self.answers = answers = ask_hosts(self.run, self.links)
        silent = {label: answer.unreachable for label, answer in answers.items() if answer.unreachable}
        now = time.monotonic()
        self.silent_since = {label: self.silent_since.get(label, now) for label in silent}
        if self._has_news():
            self.passed = load_notice(self.run.notice_path)
            pass_notice(self.run, self.links)
        if self.has_away:
            reached = [record for record in load_records(self.run, answers) if record.label not in silent]
            self.unread = silent | (self.also(reached, self.links) if self.also else {})

    def find_cut_off(self) -> str | None:
        """What to say of a host that has not been reached for long."""
        late = time.monotonic() - CUT_OFF_AFTER_S
        for label, since in self.silent_since.items():
            if since <= late:
                return f"{label} {self.answers[label].unreachable}" if label in self.answers else None
        return None

    def wait(self) -> None:
        """Until nobody uses the connections."""
        if self.asking is not None:
            self.asking.join()
