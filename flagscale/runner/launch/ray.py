"""Starting a job in places of a Ray cluster: a running one, or one of our own over the hosts of the hostfile.

Ray gives the places, keeps others out of them, and starts an agent in each; everything after that is as it is for every
launcher: agents write into the run's folder, and end with their place (`keeper.py`). All places are given before
anything is started, or none within `runner.ray_wait_s`, and it is told what there is.

With a cluster of our own the order is: hosts are checked over SSH, all files are written, the cluster is started as a
job of its own (`ray_cluster.py`), places are taken, agents are started in them. With a running one, places are taken
first, and what is checked is checked in them.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flagscale.errors import FlagScaleError, LaunchError
from flagscale.runner.launch.archive import KEEPER, build_archive
from flagscale.runner.launch.checks import gather_secrets
from flagscale.runner.launch.ending import Interrupts, catch_interrupts
from flagscale.runner.launch.files import NewFile, hold_lock, make_folder, remove_folders, write_all
from flagscale.runner.launch.folder import (
    RunRef,
    describe_job,
    list_files,
    list_folders,
    list_remotes,
    make_run_id,
    ref_of,
)
from flagscale.runner.launch.keeper import MASTER_ADDR, SECOND_ADDR
from flagscale.runner.launch.local import GRACE_S, strip_secrets
from flagscale.runner.launch.notice import Notice, write_notice
from flagscale.runner.launch.ray_cluster import (
    NUM_PORTS,
    ask_ports,
    auth_env,
    check_versions,
    find_address,
    list_cluster_files,
    plan_cluster,
)
from flagscale.runner.launch.ray_errands import ports, versions
from flagscale.runner.launch.ray_places import Door, PlaceLinks, describe_place
from flagscale.runner.launch.reach import Links
from flagscale.runner.launch.record import load_records
from flagscale.runner.launch.ssh import check_hosts, describe_faults, end_all, end_stale, start_agents
from flagscale.runner.launch.startup import explain_interrupt, quote_last_words
from flagscale.runner.plan.job import JobPlan, LaunchName

KEEP_LIMIT_S = 120.0
START_LIMIT_S = 120.0
"""given to a cluster of ours to come up, seconds"""


def submit_job(
    plan: JobPlan,
    *,
    config: Mapping[str, Any],
    command: Sequence[str],
    env: Mapping[str, str],
    grace_s: float = GRACE_S,
) -> RunRef:
    """Start a plan in places of a Ray cluster; returns once every agent has started its processes.

    Raises:
        UserError: the plan cannot run as it is on these hosts; nothing was started, and nothing stays written.
        LaunchError: a host or the cluster has a fault, or has no room; nothing runs then.
    """
    secrets = gather_secrets(plan, env)
    exp_dir = Path(plan.exp_dir)
    made = make_folder(exp_dir / "runs")
    run: RunRef | None = None
    try:
        with hold_lock(exp_dir), Links(list_remotes(plan), plan.accept_new_host_keys, module="ray_errands") as links:
            end_stale(exp_dir)
            launch = Launch(plan, ref_of(plan, make_run_id(datetime.now(UTC))), links, secrets, grace_s)
            record = {"config": config, "command": command}
            start = start_in_running if "address" in dict(plan.launcher_options) else start_in_own
            run = start(launch, env, record)
            return run
    finally:
        if run is None and made:
            (exp_dir / "runs" / "lock").unlink(missing_ok=True)
            remove_folders(made)


@dataclass(frozen=True, slots=True)
class Launch:
    """What both ways of getting places share. links: to the hosts of the hostfile that are other machines"""

    plan: JobPlan
    run: RunRef
    links: Links
    secrets: Mapping[str, str]
    grace_s: float

    @property
    def wait_s(self) -> float:
        return float(dict(self.plan.launcher_options)["wait_s"])

    def make_door(self, address: str, env: Mapping[str, str], connect_s: float) -> Door:
        """The first host, if it is another machine that SSH reaches; else this machine."""
        remote = self.links.remotes.get(self.plan.hosts[0].label)
        return Door(address, f"flagscale-{self.run.run_id}", self.links, remote, env, connect_s)

    def list_files(self, values: Mapping[LaunchName, str], record: Mapping[str, Any]) -> list[NewFile]:
        run_id = self.run.run_id
        job = describe_job(self.plan, run_id, values, record["config"], record["command"])
        keeper = NewFile(self.run.folder / "keeper.pyz", build_archive(KEEPER), 0o600)
        return [*list_files(self.plan, run_id, values, job, self.grace_s), keeper]

    def reserve(self, door: Door, pins: Sequence[str | None], num_nodes: int) -> list[dict[str, str]]:
        """Take all places.

        Raises:
            LaunchError: they cannot be had, or not in time, with what there is.
        """
        places = [describe_place(host, pin) for host, pin in zip(self.plan.hosts, pins, strict=True)]
        answer = door.ask("reserve", self.wait_s, places=places, num_nodes=num_nodes, wait_s=self.wait_s)
        found: list[dict[str, str]] = answer["places"]
        return found

    def start_agents(
        self, door: Door, places: Sequence[Mapping[str, str]], after: Path | None, interrupts: Interrupts
    ) -> None:
        """Start the agent of every place, all at once.

        after: the notice that is to be written when all have ended

        Raises:
            LaunchError: one did not start, or Ctrl-C.
        """
        names = [f"{name}={name}" for name in self.secrets]
        keeper = str(self.run.folder / "keeper.pyz")
        commands = [
            [host.python or sys.executable, "-I", keeper, "Ray", str(self.run.spec_path(host.label)), *names]
            for host in self.plan.hosts
        ]
        addresses = dict(zip((MASTER_ADDR, SECOND_ADDR), (place["address"] for place in places), strict=False))
        job_env = {**self.secrets, **addresses}
        if interrupts.num:
            raise explain_interrupt(self.run, is_stopping=True)
        answer = door.ask("keep", KEEP_LIMIT_S, commands=commands, job_env=job_env, after=str(after or ""))
        faults = [
            (f"{host.host.name} ({place['hostname']})", told.strip() or f"exit code {code}")
            for host, place, (code, _, told) in zip(self.plan.hosts, places, answer["results"], strict=True)
            if code != 0
        ]
        if faults:
            raise LaunchError(describe_faults(faults, len(places)).replace("nothing was started", "all were ended"))
        if interrupts.num:
            raise explain_interrupt(self.run, is_stopping=True)


def start_in_own(launch: Launch, env: Mapping[str, str], record: Mapping[str, Any]) -> RunRef:
    """Start a cluster over the plan's hosts, and the job in it."""
    plan, run, links = launch.plan, launch.run, launch.links
    ready = check_hosts(plan, links, env)
    check_versions(plan, links, versions({}))
    free = ask_ports(plan, links, ports({"num": NUM_PORTS, "head": plan.master_addr}))
    cluster_plan = plan_cluster(plan, run.run_id, free)
    cluster = ref_of(cluster_plan, run.run_id)
    values: dict[LaunchName, str] = {
        "master_port": str(ready.port),
        "next_port": str(ready.port + 1),
        "run_id": run.run_id,
    }
    files = [*launch.list_files(values, record), *list_cluster_files(cluster_plan, run.run_id)]
    write_all(files, [*list_folders(plan, run.run_id), *list_folders(cluster_plan, run.run_id)])
    door = launch.make_door(find_address(plan, free), auth_env(run.folder), max(launch.wait_s, START_LIMIT_S))
    with catch_interrupts(run, stops_job=False) as interrupts:
        start_agents(cluster, links, {}, strip_secrets(plan, env))
        try:
            places = launch.reserve(door, run.labels, len(plan.hosts))
            launch.start_agents(door, places, cluster.notice_path, interrupts)
        except LaunchError as error:
            write_notice(run.notice_path, Notice("", "the launch failed"))
            words = [quote_last_words(record) for record in load_records(cluster) if record.has_ended]
            end_all(cluster, links, "the launch failed")
            error.args = ("\n".join([str(error), *words]),)
            raise
    return run


def start_in_running(launch: Launch, env: Mapping[str, str], record: Mapping[str, Any]) -> RunRef:
    """Take places of a running cluster, check in them, and start the job there."""
    plan, run = launch.plan, launch.run
    auth = {name: value for name, value in env.items() if name.startswith("RAY_AUTH_")}
    address = dict(plan.launcher_options)["address"]
    door = launch.make_door(address, {} if launch.links.remotes else auth, launch.wait_s)
    with catch_interrupts(run, stops_job=False) as interrupts:
        places = launch.reserve(door, [None] * len(plan.hosts), 1)
        _start_in_places(launch, door, places, env, record, interrupts)
    return run


def _start_in_places(
    launch: Launch,
    door: Door,
    places: Sequence[Mapping[str, str]],
    env: Mapping[str, str],
    record: Mapping[str, Any],
    interrupts: Interrupts,
) -> None:
    """Check in all places and start the job there, or give them back."""
    plan, run = launch.plan, launch.run
    try:
        ready = check_hosts(plan, PlaceLinks(plan.hosts, places, door), env)
        first, port = places[0]["address"], str(ready.port)
        values: dict[LaunchName, str] = {
            "master_port": port,
            "next_port": str(ready.port + 1),
            "run_id": run.run_id,
            "master_addr": first,
            "master_endpoint": f"{first}:{port}",
        }
        write_all(launch.list_files(values, record), list_folders(plan, run.run_id))
        launch.start_agents(door, places, None, interrupts)
    except FlagScaleError:
        write_notice(run.notice_path, Notice("", "the launch failed"))
        door.ask("release", 0.0)
        raise
