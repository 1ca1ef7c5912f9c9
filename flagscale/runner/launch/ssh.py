"""Starting a job on many machines over SSH: all of them are asked first, and all of them start, or none.

The run's folder is on a file system that every host sees; agents write into it, and everything that reads a run reads
it there. SSH carries only questions, the start and the stop. With `no_shared_fs` a host that does not see this folder
gets one of its own on the same path, with what it needs in it, and what is written there is fetched (`mirror.py`). Each
host gets the same agent as this machine would, which leaves its terminal at once, so the job needs neither the launcher
nor the connection afterwards.

The order: connect to all and check on each at once, tell every fault of every host; write all files or none; start all
agents at once; should one not start, end the others before anything is said.
"""

import base64
import secrets as random_words
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flagscale.errors import FlagScaleError, LaunchError, UserError
from flagscale.runner.launch.checks import check_capacity, check_outputs, check_programs, choose_port, gather_secrets
from flagscale.runner.launch.ending import catch_interrupts
from flagscale.runner.launch.files import NewFile, hold_lock, make_folder, remove_folders, write_all
from flagscale.runner.launch.folder import (
    RunRef,
    describe_job,
    find_current,
    list_away_files,
    list_files,
    list_folders,
    list_remotes,
    make_run_id,
    ref_of,
)
from flagscale.runner.launch.local import GRACE_S, HANDOVER_LIMIT_S, hand_over, refuse_living, strip_secrets
from flagscale.runner.launch.notice import Notice, write_notice
from flagscale.runner.launch.patches import expect_patches
from flagscale.runner.launch.reach import Links, Look, Reply, ask_hosts, clean_hosts, signal_hosts
from flagscale.runner.launch.record import load_records
from flagscale.runner.launch.sources import check_trees
from flagscale.runner.launch.startup import explain_interrupt
from flagscale.runner.plan.job import HostPlan, JobPlan, LaunchName, encode_plan

CHECK_LIMIT_S = 60.0
END_MARGIN_S = 20.0

Fault = tuple[str, str]
"""(host, what is wrong there)"""


def submit_job(
    plan: JobPlan,
    *,
    config: Mapping[str, Any],
    command: Sequence[str],
    env: Mapping[str, str],
    grace_s: float = GRACE_S,
) -> RunRef:
    """Start a plan on its hosts; returns once every host's agent has started its processes. As `local.submit_job`.

    Raises:
        UserError: the plan cannot run as it is on these hosts; nothing was started, and nothing stays written.
        LaunchError: a host cannot be reached or has another fault, the folder's run still lives, or an agent did not
            start; nothing runs then.
    """
    secrets = gather_secrets(plan, env)
    exp_dir = Path(plan.exp_dir)
    made = make_folder(exp_dir / "runs")
    run: RunRef | None = None
    try:
        with hold_lock(exp_dir), Links(list_remotes(plan), plan.accept_new_host_keys) as links:
            ready = check_hosts(plan, links, env)
            end_stale(exp_dir)
            run_id = make_run_id(datetime.now(UTC))
            values: dict[LaunchName, str] = {
                "master_port": str(ready.port),
                "next_port": str(ready.port + 1),
                "run_id": run_id,
            }
            away = [host for host in plan.hosts if host.label in ready.away]
            remotes = [replace(remote, is_shared=remote.label not in ready.away) for remote in links.remotes.values()]
            job = describe_job(plan, run_id, values, config, command)
            job |= {"remotes": [asdict(remote) for remote in remotes]}
            files = list_files(plan, run_id, values, job, grace_s, ready.away)
            here = replace(plan, hosts=tuple(host for host in plan.hosts if host not in away))
            written = write_all(files, list_folders(here, run_id))
            try:
                place_files(plan, away, links, run_id, values, files)
            except FlagScaleError:
                written.undo()
                raise
            run = ref_of(plan, run_id, tuple(remotes))
            start_agents(run, links, secrets, strip_secrets(plan, env))
            return run
    finally:
        if run is None and made:
            (exp_dir / "runs" / "lock").unlink(missing_ok=True)
            remove_folders(made)


# --- before anything is started --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """What the hosts said. away: labels of those with an experiment folder of their own"""

    port: int
    away: frozenset[str]


def check_hosts(plan: JobPlan, links: Links, env: Mapping[str, str]) -> Ready:
    """Ask every host whether it can do its part; the port where the ranks meet is chosen on the head host.

    Raises:
        UserError, LaunchError: what is wrong on which host, all of it.
    """
    faults: list[tuple[str, Fault]] = []
    port = plan.master_port or 0
    away: set[str] = set()
    patches = expect_patches(plan)
    replies = _ask_ready(plan, links, patches)
    for host in plan.hosts:
        name = host.host.name
        if host.label not in replies:
            faults += [(kind, (name, text)) for kind, text in _check_here(plan, host, env, patches)]
            port = port or choose_port(plan)
            continue
        reply = replies[host.label]
        if reply.fault:
            faults.append(("launch", (name, reply.fault)))
            continue
        faults += [(kind, (name, text)) for kind, text in reply.answer["faults"]]
        for note in reply.answer["notes"]:
            print(f"note: {name}: {note}", file=sys.stderr)
        port = reply.answer["port"] or port
        if not reply.answer["is_shared"]:
            away.add(host.label)
    raise_faults(faults, len(plan.hosts))
    return Ready(port, frozenset(away))


def _ask_ready(plan: JobPlan, links: Links, patches: Mapping[str, str]) -> dict[str, Reply]:
    with make_requests(plan, patches) as requests:
        return links.call("check", {label: requests[label] for label in links.remotes}, CHECK_LIMIT_S)


@contextmanager
def make_requests(plan: JobPlan, patches: Mapping[str, str]) -> Iterator[dict[str, dict[str, Any]]]:
    """Label of each host -> what its `check` is asked, as long as the file lies there that the hosts should see."""
    current = find_current(Path(plan.exp_dir))
    with _place_nonce(Path(plan.exp_dir)) as (path, nonce):
        yield {
            host.label: {
                "plan": encode_plan(replace(plan, hosts=(host,))),
                "nonce_path": str(path),
                "nonce": nonce,
                "is_head": host is plan.hosts[0],
                "known_run": current.run_id if current else None,
                "patches": dict(patches),
            }
            for host in plan.hosts
        }


def raise_faults(faults: Sequence[tuple[str, Fault]], num_hosts: int) -> None:
    """
    Raises:
        UserError, LaunchError: there are some; all of them in one table.
    """
    if faults:
        error = UserError if all(kind == "user" for kind, _ in faults) else LaunchError
        raise error(describe_faults([fault for _, fault in faults], num_hosts))


def _check_here(
    plan: JobPlan, host: HostPlan, env: Mapping[str, str], patches: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """A plan may name this machine beside others."""
    alone = replace(plan, hosts=(host,))
    try:
        check_programs(alone, env)
        check_trees(alone, patches)
        check_outputs(alone)
        check_capacity(alone)
    except FlagScaleError as error:
        yield ("user" if isinstance(error, UserError) else "launch"), str(error)


@contextmanager
def _place_nonce(exp_dir: Path) -> Iterator[tuple[Path, str]]:
    """A file that only a host with this very folder can read."""
    nonce = random_words.token_hex(16)
    path = exp_dir / "runs" / f".shared.{nonce[:8]}"
    write_all([NewFile(path, nonce.encode())])
    try:
        yield path, nonce
    finally:
        path.unlink(missing_ok=True)


def describe_faults(faults: Sequence[Fault], num_hosts: int) -> str:
    """One line a host and fault, the hosts in a column of their own."""
    names = dict.fromkeys(name for name, _ in faults)
    width = max(map(len, names))
    lines = [f"{len(names)} of {num_hosts} hosts cannot take part; nothing was started"]
    for name, text in faults:
        first, *more = text.splitlines() or [""]
        lines += [f"  {name:{width}}  {first}", *(f"  {'':{width}}  {line}" for line in more)]
    return "\n".join(lines)


def end_stale(exp_dir: Path) -> None:
    """As `local.end_stale`, over all hosts of the folder's last run.

    Raises:
        LaunchError: it lives, or a host of it cannot be reached, so that nobody knows.
    """
    run = find_current(exp_dir)
    if run is None:
        return
    with Links(run.remotes) as links:
        answers = ask_hosts(run, links)
        records = load_records(run, answers)
        refuse_living(run, records)
        silent = [
            (record.label, answers[record.label].unreachable or "") for record in records if record.label in answers
        ]
        silent = [(label, text) for label, text in silent if text]
        if silent:
            told = "\n".join(f"  {label} {text}" for label, text in silent)
            raise LaunchError(
                f"{exp_dir} holds run {run.run_id}, which may still live on hosts that do not answer:\n{told}\n"
                "use another `experiment.exp_dir`, or launch when they are back"
            )
        clean_hosts(run, links, GRACE_S)


def place_files(
    plan: JobPlan,
    away: Sequence[HostPlan],
    links: Links,
    run_id: str,
    values: Mapping[LaunchName, str],
    written: Sequence[NewFile],
) -> None:
    """Write on every host with a folder of its own what it needs: on all of them, or on none.

    Raises:
        UserError, LaunchError: what cannot be written where.
    """
    requests = {
        host.label: {
            "files": [
                [str(file.path), base64.b64encode(file.content).decode(), file.mode]
                for file in list_away_files(plan, host, values, written)
            ],
            "folders": [str(folder) for folder in list_folders(replace(plan, hosts=(host,)), run_id)],
        }
        for host in away
    }
    replies = links.call("place", requests, CHECK_LIMIT_S)
    faults = [
        ("user" if reply.answer.get("is_user") else "launch", (links.remotes[label].name, fault))
        for label, reply in replies.items()
        if (fault := reply.fault or reply.answer.get("fault"))
    ]
    if faults:
        links.call("unplace", {label: reply.answer for label, reply in replies.items() if "files" in reply.answer})
    raise_faults(faults, len(plan.hosts))


# --- the start -------------------------------------------------------------------------------------------------------


def start_agents(run: RunRef, links: Links, secrets: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Start the agent of every host, all at once; secrets go through the connection.

    Raises:
        LaunchError: one did not start, or Ctrl-C; all that had started are ended then.
    """
    requests = {label: {"spec": str(run.spec_path(label)), "secrets": dict(secrets)} for label in links.remotes}
    with catch_interrupts(run, stops_job=False) as interrupts:
        replies = links.call("start", requests, HANDOVER_LIMIT_S)
        faults = [
            (links.remotes[label].name, fault)
            for label, reply in replies.items()
            if (fault := reply.fault or reply.answer.get("fault"))
        ]
        try:
            for label in run.labels:
                if label not in replies and not faults:
                    hand_over(run, label, secrets, env)
        except LaunchError as error:
            faults.append(("localhost", str(error)))
        if faults or interrupts.num:
            end_all(run, links, "Ctrl-C during the launch" if not faults else "another host's agent did not start")
        if faults:
            raise LaunchError(describe_faults(faults, len(run.labels)).replace("nothing was started", "all were ended"))
        if interrupts.num:
            raise explain_interrupt(run, is_stopping=True)


def end_all(run: RunRef, links: Links, reason: str) -> None:
    """End a run on all hosts, and return when it has ended wherever that can be seen."""
    write_notice(run.notice_path, Notice("", reason))
    signal_hosts(run, links, signal.SIGTERM)
    grace_s = max(record.spec.grace_s for record in load_records(run))
    deadline = time.monotonic() + grace_s + END_MARGIN_S
    look = Look(run, links)
    while any(record.is_alive for record in look.load_records()) and time.monotonic() < deadline:
        time.sleep(0.2)
    look.wait()
    clean_hosts(run, links, grace_s)
