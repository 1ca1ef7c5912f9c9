"""A Ray cluster of our own over the hosts of a job: planned, started and ended as a job of its own.

Each of its hosts runs `ray start --block` under an agent like any other program, in a folder inside of the run's. So it
is watched, ended and cleaned up by what does that for every job: nothing is found by name, and nobody else's cluster
is touched, whose ports and folders it does not share. It asks for a token, since Ray listens on every address.

It ends with its job: the last keeper's holder (`ray_place.py`) writes the notice that its agents look for, `stop` does
so too, and if one of its nodes dies, the others follow, with every place that they gave.
"""

import json
import secrets as random_words
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flagscale.errors import LaunchError
from flagscale.runner.launch.files import NewFile
from flagscale.runner.launch.folder import describe_job, list_files, run_folder
from flagscale.runner.launch.reach import Links, Reply
from flagscale.runner.launch.ssh import Fault, describe_faults, raise_faults
from flagscale.runner.plan.job import HostPlan, JobPlan, LaunchName, ProcessSpec

OLDEST = (2, 60)
"""knows tokens, and a scratch folder for each node"""
GRACE_S = 5.0
"""between SIGTERM and SIGKILL: a node of ours has nothing to save"""
ASK_LIMIT_S = 30.0
NUM_PORTS = 5
STORE_BYTES = 100_000_000
"""of Ray's object store: our actors only exchange words"""
SLOT = "slot"


def token_path(run_dir: Path) -> Path:
    return run_dir / "ray" / "token"


def auth_env(run_dir: Path) -> dict[str, str]:
    """What a program needs to join the cluster."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path(run_dir))}


def check_versions(plan: JobPlan, links: Links, here: Mapping[str, Any]) -> None:
    """Ray and Python must be the same on all hosts, which Ray insists on.

    here: what this machine has

    Raises:
        LaunchError: a host has no Ray, or another one.
    """
    replies = links.call("versions", {label: {} for label in links.remotes}, ASK_LIMIT_S)
    found = {host: replies.get(host.label, Reply(here)) for host in plan.hosts}
    first = next((reply.answer for reply in found.values() if reply.answer.get("ray")), here)
    faults = [
        ("launch", (host.host.name, text))
        for host, reply in found.items()
        if (text := reply.fault or _find_version_fault(reply.answer, first))
    ]
    raise_faults(faults, len(plan.hosts))


def _find_version_fault(has: Mapping[str, Any], first: Mapping[str, Any]) -> str | None:
    if not has["ray"]:
        return f"has no Ray for {sys.executable}; expected `pip install flagscale[ray]` there"
    if tuple(int(part) for part in has["ray"].split(".")[:2] if part.isdecimal()) < OLDEST:
        return f"has Ray {has['ray']}; expected {OLDEST[0]}.{OLDEST[1]} or newer"
    for name, title in (("ray", "Ray"), ("python", "Python")):
        if has[name] != first[name]:
            return f"has {title} {has[name]}, and the first host {first[name]}; expected the same on all hosts"
    return None


def ask_ports(plan: JobPlan, links: Links, here: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Label -> free ports and addresses of every host, the head's as the others see it.

    here: the answer of this machine

    Raises:
        LaunchError: a host does not know where the head is.
    """
    request = {"num": NUM_PORTS, "head": plan.master_addr}
    replies = links.call("ports", dict.fromkeys(links.remotes, request), ASK_LIMIT_S)
    answers = {host.label: replies.get(host.label, Reply(here)) for host in plan.hosts}
    faults: list[Fault] = [
        (host.host.name, str(fault))
        for host in plan.hosts
        if (fault := answers[host.label].fault or answers[host.label].answer.get("fault"))
    ]
    if faults:
        raise LaunchError(describe_faults(faults, len(plan.hosts)))
    found = {label: reply.answer for label, reply in answers.items()}
    head, *others = (host.label for host in plan.hosts)
    if others:
        found[head] = {**found[head], "address": found[others[0]]["head"]}
    return found


def find_address(plan: JobPlan, ports: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the cluster's head answers."""
    head = ports[plan.hosts[0].label]
    return f"{head['address']}:{head['ports'][0]}"


def plan_cluster(plan: JobPlan, run_id: str, ports: Mapping[str, Mapping[str, Any]]) -> JobPlan:
    """The cluster as a job: pure.

    ports: as of `ask_ports`
    """
    folder = run_folder(Path(plan.exp_dir), run_id)
    base = folder / "ray"
    address = find_address(plan, ports)
    hosts = tuple(_plan_node(host, run_id, auth_env(folder), address, ports[host.label]) for host in plan.hosts)
    return replace(
        plan,
        task="ray",
        backend="ray",
        exp_name="",
        exp_dir=str(base),
        log_dir=str(base / "logs"),
        hosts=hosts,
        secrets=(),
        checkpoint_dir=None,
        load_dir=None,
        launcher_options=(),
    )


def _plan_node(host: HostPlan, run_id: str, auth: Mapping[str, str], address: str, own: Mapping[str, Any]) -> HostPlan:
    """One node of the cluster. Its name in the cluster is the host's label, as a resource that only it has."""
    free = own["ports"]
    scratch = f"/tmp/fs-{run_id}-{host.node_rank}"
    resources = json.dumps({host.label: 1, host.host.chip or SLOT: host.host.slots})
    role: Sequence[str] = ("--address", address)
    if host.node_rank == 0:
        role = ("--head", "--port", str(free[0]), "--ray-client-server-port", str(free[1]))
        role += ("--include-dashboard", "false")
    argv = (
        *("ray", "start", "--block", "--disable-usage-stats", *role),
        *(
            "--node-ip-address",
            own["address"],
            "--temp-dir",
            scratch,
            "--num-cpus",
            "0",
            "--num-gpus",
            "0",
            "--resources",
            resources,
        ),
        *("--object-store-memory", str(STORE_BYTES), "--min-worker-port", "0", "--max-worker-port", "0"),
        *("--dashboard-agent-listen-port", str(free[2]), "--dashboard-agent-grpc-port", str(free[3])),
        *("--metrics-export-port", str(free[4])),
    )
    bin_dirs = host.processes[0].bin_dirs if host.processes else ()
    process = ProcessSpec("ray", argv, "/", env=tuple(auth.items()), bin_dirs=bin_dirs)
    return HostPlan(
        host=host.host,
        node_rank=host.node_rank,
        processes=(process,),
        before_start=f"mkdir -m 700 -- {scratch}",
        after_stop=f"rm -rf -- {scratch}",
    )


def list_cluster_files(cluster: JobPlan, run_id: str) -> list[NewFile]:
    """The cluster's own files: not an entry of the list of runs, for it is a part of one."""
    values: dict[LaunchName, str] = {"master_port": "0", "next_port": "0", "run_id": run_id}
    files = list_files(cluster, run_id, values, describe_job(cluster, run_id, values, {}, []), GRACE_S)
    token = NewFile(Path(cluster.exp_dir, "token"), random_words.token_hex(32).encode(), 0o600)
    return [token, *(file for file in files if Path(cluster.exp_dir) in file.path.parents)]
