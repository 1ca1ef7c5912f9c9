"""The folders of a run: what it was made of, written before anything starts, and where everything is found later.

    <log_dir>/scripts/<label>_run.sh  pids/<label>.pid  details/<label>/...  <label>.output      the contract's names
    <exp_dir>/runs/<run_id>/job.json  agent.pyz  <label>.{spec.json,events.jsonl,heartbeat,agent.log}  ranks/  stop.json
    <exp_dir>/runs/{current,lock}                              the newest run; held while a launch looks and writes
    <state dir>/runs/<run_id>.json                             the list of runs: where each folder is

A run's own folder holds everything needed to run it again or to tell its state, so a lost list costs only a look-up.
"""

import json
import re
import secrets
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flagscale import env
from flagscale.errors import RunError
from flagscale.runner.launch.archive import build_archive
from flagscale.runner.launch.files import NewFile
from flagscale.runner.launch.journal import Entry, Spec, load_spec
from flagscale.runner.launch.provenance import query_environment, query_git
from flagscale.runner.launch.sources import query_trees
from flagscale.runner.plan.job import HostPlan, JobPlan, LauncherName, LaunchName, ProcessSpec, decode_plan, encode_plan
from flagscale.runner.render.script import render_script

RUN_VERSION = 1
NOTICE = "ending.json"
SSH_PORT = 22
"""What `runner.ssh_port` says by itself: not a choice, so the user's ssh configuration goes before it."""
_RUN_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True, slots=True)
class Remote:
    """How a host of a run is reached. user, port: None leaves it to the user's ssh configuration.

    is_shared: the host sees the run's folder of the launching machine; if not, it has one of its own
    client: what connects; `local` for a container on the launching machine
    container: everything there happens in this one
    """

    label: str
    name: str
    user: str | None
    port: int | None
    python: str
    is_shared: bool = True
    client: Literal["paramiko", "openssh", "local"] = "paramiko"
    container: str | None = None

    def enter(self, words: list[str]) -> list[str]:
        """A command as it is run on the host, so that it happens where the job is."""
        return ["docker", "exec", "-i", self.container, *words] if self.container else words

    def __str__(self) -> str:
        return f"{self.user}@{self.name}" if self.user else self.name


def list_remotes(plan: JobPlan) -> tuple[Remote, ...]:
    """The hosts of a plan that are other machines or containers, and the interpreter of each.

    Where none is named it is this interpreter's path, which is expected there too, and in a container `python3`.
    """
    named = None if plan.ssh_port == SSH_PORT else plan.ssh_port
    default = "python3" if plan.docker else sys.executable
    others = (host for host in plan.hosts if plan.docker or not host.host.is_local)
    hosts = (host for host in others if not host.host.is_placeholder)
    return tuple(
        Remote(
            host.label,
            host.host.name,
            host.host.user,
            host.host.port or named,
            host.python or default,
            not plan.no_shared_fs,
            "local" if host.host.is_local else plan.ssh_client,
            plan.docker,
        )
        for host in hosts
    )


@dataclass(frozen=True, slots=True)
class RunRef:
    """A run that was written down. All paths are absolute."""

    run_id: str
    exp_dir: Path
    log_dir: Path
    task: str
    exp_name: str
    labels: tuple[str, ...]
    remotes: tuple[Remote, ...] = ()
    launcher: LauncherName = "direct"

    @property
    def has_notice(self) -> bool:
        """Whether its agents look for a notice in the run's folder, so that it ends without a connection to them."""
        return bool(self.remotes) or self.launcher != "direct"

    @property
    def folder(self) -> Path:
        return run_folder(self.exp_dir, self.run_id)

    @property
    def job_path(self) -> Path:
        return self.folder / "job.json"

    @property
    def notice_path(self) -> Path:
        """Where the agents of several hosts learn that the run is to end (`peers.py`)."""
        return self.folder / NOTICE

    def output_path(self, label: str) -> Path:
        """On the host itself, if it shares no folder with this machine."""
        return self.log_dir / f"{label}.output"

    def find_remote(self, label: str) -> Remote | None:
        return next((remote for remote in self.remotes if remote.label == label), None)

    def mirror_dir(self, label: str) -> Path:
        """Where the files of a host that shares no folder are kept once they were fetched, under their whole paths."""
        return self.folder / "fetched" / label

    def spec_path(self, label: str) -> Path:
        return self.folder / f"{label}.spec.json"

    def load_spec(self, label: str) -> Spec:
        try:
            return load_spec(self.spec_path(label))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"run {self.run_id} is damaged: cannot read {self.spec_path(label)}: {error}") from None


def run_folder(exp_dir: Path, run_id: str) -> Path:
    return exp_dir / "runs" / run_id


def make_run_id(now: datetime) -> str:
    """UTC time and four random hexadecimal digits: sorts by time, and two launches in one second differ."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def is_run_id(text: str) -> bool:
    return _RUN_ID.fullmatch(text) is not None


def index_dir() -> Path:
    return env.state_dir() / "runs"


def ref_of(plan: JobPlan, run_id: str, remotes: tuple[Remote, ...] | None = None) -> RunRef:
    """remotes: where they are not just what the plan says"""
    labels = tuple(host.label for host in plan.hosts)
    found = list_remotes(plan) if remotes is None else remotes
    folders = Path(plan.exp_dir), Path(plan.log_dir)
    return RunRef(run_id, *folders, plan.task, plan.exp_name, labels, found, plan.launcher)


def script_path(plan: JobPlan, host: HostPlan, process: ProcessSpec) -> Path:
    name = host.label if len(host.processes) == 1 else f"{host.label}_{process.name}"
    return Path(plan.log_dir, "scripts", f"{name}_run.sh")


# --- what is written -------------------------------------------------------------------------------------------------


def make_spec(plan: JobPlan, host: HostPlan, run_id: str, token: str, grace_s: float, port: int = 0) -> Spec:
    """port: where the ranks meet, on the head host"""
    folder, log_dir, label = run_folder(Path(plan.exp_dir), run_id), Path(plan.log_dir), host.label
    entries = (
        Entry(item.name, str(script_path(plan, host, item)), item.num_ranks, item.first_rank, item.announces)
        for item in host.processes
    )
    neighbour = find_neighbour(plan, host)
    is_wired = bool(neighbour) and plan.no_shared_fs
    return Spec(
        run_id=run_id,
        token=f"{token}{host.node_rank:04x}",
        label=label,
        node_rank=host.node_rank,
        processes=tuple(entries),
        output=str(log_dir / f"{label}.output"),
        pid_file=str(log_dir / "pids" / f"{label}.pid"),
        events=str(folder / f"{label}.events.jsonl"),
        heartbeat=str(folder / f"{label}.heartbeat"),
        agent_log=str(folder / f"{label}.agent.log"),
        rank_dir=str(folder / "ranks"),
        details_dir=str(log_dir / "details" / label),
        stop_request=str(folder / "stop.json"),
        cwd=host.processes[0].cwd if host.processes else "/",
        after_stop=host.after_stop,
        grace_s=grace_s,
        ending=str(folder / NOTICE),
        neighbour=neighbour,
        keeper=str(folder / f"{label}.keeper") if plan.launcher != "direct" else "",
        peer=host.peer,
        interface_vars=host.interface_vars,
        meet_host=plan.master_addr if is_wired else "",
        meet_port=port if is_wired else 0,
        meet_key=token if is_wired else "",
        leads=is_wired and host is plan.hosts[0],
    )


def find_neighbour(plan: JobPlan, host: HostPlan) -> str:
    """The label of the next host, around; empty where a host's job does not need the others."""
    ranked = [process.first_rank for item in plan.hosts for process in item.processes if process.num_ranks]
    is_apart = len(ranked) > 1 and not any(ranked)  # `per_node_task`: every host counts its ranks from 0
    if len(plan.hosts) == 1 or is_apart:
        return ""
    return plan.hosts[(plan.hosts.index(host) + 1) % len(plan.hosts)].label


def _as_plain(value: object) -> object:
    """Read-only mappings as JSON objects, and what JSON does not know as its text."""
    return dict(value) if isinstance(value, Mapping) else str(value)


def _as_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, default=_as_plain) + "\n").encode()


def describe_job(
    plan: JobPlan, run_id: str, values: Mapping[LaunchName, str], config: Mapping[str, Any], command: Sequence[str]
) -> dict[str, Any]:
    """What job.json holds. `config` comes with its secrets masked."""
    return {
        "version": RUN_VERSION,
        "run_id": run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "exp_dir": plan.exp_dir,
        "log_dir": plan.log_dir,
        "task": plan.task,
        "exp_name": plan.exp_name,
        "labels": [host.label for host in plan.hosts],
        "remotes": [asdict(remote) for remote in list_remotes(plan)],
        "launcher": plan.launcher,
        "cwd": str(Path.cwd()),
        "command": list(command),
        "values": dict(values),
        "git": query_git(Path.cwd()),
        "environment": query_environment(),
        "trees": query_trees(plan),
        "plan": encode_plan(plan),
        "config": config,
    }


def list_files(
    plan: JobPlan,
    run_id: str,
    values: Mapping[LaunchName, str],
    job: Mapping[str, Any],
    grace_s: float,
    away: Collection[str] = (),
) -> list[NewFile]:
    """Every file that a launch writes on this machine, the run list's entry included.

    away: labels of hosts with a folder of their own, which `list_away_files` go to
    """
    exp_dir, token = Path(plan.exp_dir), secrets.token_hex(16)
    folder = run_folder(exp_dir, run_id)
    pointer = {"run_id": run_id, "exp_dir": plan.exp_dir, "created": job["created"]}
    files = [
        NewFile(folder / "job.json", _as_json(job), 0o600),
        NewFile(folder / "agent.pyz", build_archive(), 0o600),
        NewFile(exp_dir / "runs" / "current", f"{run_id}\n".encode()),
        NewFile(index_dir() / f"{run_id}.json", _as_json(pointer), 0o600),
    ]
    port = values["master_port"]  # where a scheduler chooses the machines it is not known yet
    for host in plan.hosts:
        spec = make_spec(plan, host, run_id, token, grace_s, int(port) if port.isdecimal() else 0)
        files.append(NewFile(folder / f"{host.label}.spec.json", _as_json(asdict(spec)), 0o600))
        if host.label not in away:
            files += _list_host_files(plan, host, values)
    return files


def _list_host_files(plan: JobPlan, host: HostPlan, values: Mapping[LaunchName, str]) -> list[NewFile]:
    files = [NewFile(Path(path), content.encode()) for path, content in host.files]
    for process in host.processes:
        script = render_script(plan, host, process, values).encode()
        files.append(NewFile(script_path(plan, host, process), script, 0o700))
    return files


def list_away_files(
    plan: JobPlan, host: HostPlan, values: Mapping[LaunchName, str], written: Sequence[NewFile]
) -> list[NewFile]:
    """What a host with a folder of its own is sent, of `written` here what it needs too."""
    names = ("current", f"{host.label}.spec.json")
    return [*(file for file in written if file.path.name in names), *_list_host_files(plan, host, values)]


def list_folders(plan: JobPlan, run_id: str) -> list[Path]:
    log_dir = Path(plan.log_dir)
    ranks = run_folder(Path(plan.exp_dir), run_id) / "ranks"
    return [ranks, log_dir / "pids", *(log_dir / "details" / host.label for host in plan.hosts)]


# --- what is read ----------------------------------------------------------------------------------------------------


def load_job(exp_dir: Path, run_id: str) -> dict[str, Any]:
    """job.json of a run.

    Raises:
        RunError: the run is not there, or its folder is damaged.
    """
    path = run_folder(exp_dir, run_id) / "job.json"
    try:
        job = json.loads(path.read_text())
    except FileNotFoundError:
        deleted = "" if exp_dir.exists() else "; the folder was deleted"
        raise RunError(f"no run {run_id} in {exp_dir}: {path} is missing{deleted}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"run {run_id} is damaged: cannot read {path}: {error}") from None
    if not isinstance(job, dict) or job.get("version") != RUN_VERSION:
        raise RunError(f"run {run_id}: {path} has another version than {RUN_VERSION}, which this release reads")
    return job


def load_ref(exp_dir: Path, run_id: str) -> RunRef:
    """From what job.json says beside the plan, so that a run of another release can still be seen and stopped.

    Raises:
        RunError: as `load_job`.
    """
    job = load_job(exp_dir, run_id)
    try:
        folders = Path(job["exp_dir"]), Path(job["log_dir"])
        remotes = tuple(Remote(**row) for row in job.get("remotes", ()))
        labels, launcher = tuple(job["labels"]), job.get("launcher", "direct")
        return RunRef(run_id, *folders, job["task"], job["exp_name"], labels, remotes, launcher)
    except (KeyError, TypeError) as error:
        raise RunError(f"run {run_id} is damaged: {run_folder(exp_dir, run_id)}/job.json: {error!r}") from None


def load_plan(exp_dir: Path, run_id: str) -> JobPlan:
    """The plan of a run, to start it again.

    Raises:
        RunError: as `load_job`, or the plan is of another release and cannot be read.
    """
    try:
        return decode_plan(load_job(exp_dir, run_id)["plan"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"run {run_id}: its plan was written by another release, and this one cannot read it ({error!r}); "
            "start the job from its configuration"
        ) from None


def find_current(exp_dir: Path) -> RunRef | None:
    """The newest run of an experiment folder; None where there is none that can be read."""
    try:
        run_id = (exp_dir / "runs" / "current").read_text().strip()
    except OSError:
        return None
    try:
        return load_ref(exp_dir, run_id) if is_run_id(run_id) else None
    except RunError:
        return None


def find_cluster(run: RunRef) -> RunRef | None:
    """The Ray cluster that was started for a run, itself a run (`ray_cluster.py`); None where there is none."""
    return find_current(run.folder / "ray") if run.launcher == "ray" else None
