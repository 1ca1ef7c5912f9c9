"""What `flagscale check` asks of a host beyond the questions of a launch, answered there as errands are.

    survey   as `check`, distributions, variables      -> as `check`, and facts: see `survey`
    meet     is_head address port num_hosts limit_s    -> fault

Facts are told and not judged: what they should be is known where all hosts' answers lie side by side.
"""

import os
import platform
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from flagscale.chips.probe import probe_host
from flagscale.runner.launch.capacity import nearest_folder
from flagscale.runner.launch.errands import ERRANDS, answer_errands, check
from flagscale.runner.launch.network import find_interface, list_interfaces
from flagscale.runner.launch.sources import describe_tree, list_trees, query_trees
from flagscale.runner.plan.job import JobPlan, decode_plan

RETRY_S = 0.1


def survey(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of `check`, and facts of this host:

    time: seconds since the epoch                    free_bytes: where the experiment folder is or would be
    python: its version                              versions: distribution -> version, None where it is not installed
    trees: path -> (words for people, what must be the same on all hosts), of backends' sources
    chip, num_devices, models: what was found        num_cpus: of this host
    interfaces: name -> whether it is up             peer_interface: the one that leads to the host's peer
    environ: variable -> its value on this host, of those that were asked for
    """
    plan = decode_plan(request["plan"])
    (host,) = plan.hosts
    probe = probe_host()
    facts = {
        "time": time.time(),
        "free_bytes": shutil.disk_usage(nearest_folder(Path(plan.exp_dir))).free,
        "python": platform.python_version(),
        "versions": _query_versions(request["distributions"]),
        "trees": _describe_trees(plan),
        "chip": probe.chip.name,
        "num_devices": len(probe.devices),
        "models": sorted({device.name for device in probe.devices if device.name}),
        "num_cpus": os.cpu_count(),
        "interfaces": list_interfaces(),
        "peer_interface": find_interface(host.peer) if host.peer else None,
        "environ": {name: os.environ[name] for name in request["variables"] if name in os.environ},
    }
    answer = check(request)
    missing = [] if host.before_start else _find_missing(plan)
    return {**answer, "faults": [*answer["faults"], *(("user", text) for text in missing)], "facts": facts}


def _query_versions(names: list[str]) -> dict[str, str | None]:
    if sys.flags.no_site:
        import site

        site.main()
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _find_missing(plan: JobPlan) -> list[str]:
    trees = (tree for tree in list_trees(plan) if not tree.chip and not Path(tree.path).is_dir())
    return [f"{tree.path} is missing: `flagscale source fetch {tree.backend}`" for tree in trees]


def _describe_trees(plan: JobPlan) -> dict[str, tuple[str, str]]:
    states = query_trees(plan)
    return {state["path"]: (describe_tree(state), f"{state['digest']} {state['changed']}") for state in states}


def meet(request: dict[str, Any]) -> dict[str, Any]:
    """Connect to the head host's port, as ranks will; the head waits for all others."""
    deadline = time.monotonic() + request["limit_s"]
    run = _wait_for_all if request["is_head"] else _connect
    return {"fault": run(request, deadline)}


def _wait_for_all(request: dict[str, Any], deadline: float) -> str | None:
    """The others say what is wrong with those that do not come."""
    try:
        with socket.create_server(("", request["port"])) as server:
            for _ in range(request["num_hosts"] - 1):
                server.settimeout(max(RETRY_S, deadline - time.monotonic()))
                server.accept()[0].close()
    except TimeoutError:
        return None
    except OSError as error:
        return f"cannot listen on port {request['port']}: {error.strerror}"
    return None


def _connect(request: dict[str, Any], deadline: float) -> str | None:
    address = (request["address"], request["port"])
    while True:
        try:
            socket.create_connection(address, max(RETRY_S, deadline - time.monotonic())).close()
            return None
        except OSError as error:
            said = f"cannot connect to {address[0]} port {address[1]}, where ranks meet: {error.strerror or error}"
            is_final = isinstance(error, socket.gaierror)  # a name that is not known now will not be in a moment
        if is_final or time.monotonic() > deadline:
            return said
        time.sleep(RETRY_S)


def main() -> None:
    answer_errands({**ERRANDS, "survey": survey, "meet": meet})
