"""Taking places of a Ray cluster, on a machine that is part of it: sent along as an errand, standard library and ray.

A place is one bundle of a placement group: a node's slots of one kind of chip, each bundle on a node of its own. One
actor, the holder, owns the group and has no other owner: it outlives the launcher, and when it ends, by itself or with
its node, Ray takes everything back. A second actor in each place runs commands there: first the launcher's questions,
and then the keeper (`keeper.py`), for as long as the job lives.

What Ray changes in the environment of its workers is left out of the job's. Which devices a rank sees is said by the
variables of the chip's own record, for the devices that Ray gave.

    reserve   places num_nodes wait_s     -> places [{hostname, address}..]
    call      commands command_limit_s    -> results [[exit code, output, errors]..]
    keep      commands job_env after      -> results, as of `call`, of what each keeper said first
    release                               -> {}

Actors are sent by value, so no node needs this file; the price is that they may use only the standard library.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NAMESPACE = "flagscale"
UNUSED_LIMIT_S = 300.0
"""A holder that is not told to keep its places for so long gives them back: its launcher is gone."""
TOKEN = "FLAGSCALE_RUN_TOKEN"
DEVICES = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}
"""torch's name of a device -> the resource that Ray itself counts"""
SMALL = 0.001
Result = list[Any]


class PlaceError(Exception):
    """Ray does not give what was asked for; the message says why."""


def clean_environment() -> dict[str, str]:
    """What this node's Ray was started with, less what is Ray's own: Ray's process of this node is our parent."""
    worker = dict(os.environ)
    with contextlib.suppress(OSError):
        raw = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        node = dict(os.fsdecode(item).partition("=")[::2] for item in raw if item)
        worker = {name: node[name] for name in worker if name in node}
    return {name: value for name, value in worker.items() if not name.startswith("RAY_") and name != TOKEN}


class Place:
    """A process on one node that runs commands there, one bundle of the group being its own."""

    def __init__(self, visible: list[str]) -> None:
        self.visible = visible
        self.keeper: subprocess.Popen[bytes] | None = None

    def describe(self) -> dict[str, str]:
        import ray

        return {"hostname": socket.gethostname(), "address": ray.util.get_node_ip_address()}

    def environment(self, env: dict[str, str]) -> dict[str, str]:
        import ray

        ids = ray.get_runtime_context().get_accelerator_ids()
        given = ",".join(next((found for found in ids.values() if found), []))
        return {**clean_environment(), **(dict.fromkeys(self.visible, given) if given else {}), **env}

    def run(self, words: list[str], text: str, limit_s: float) -> Result:
        try:
            done = subprocess.run(
                words, input=text.encode("latin-1"), capture_output=True, timeout=limit_s, env=self.environment({})
            )
        except FileNotFoundError as error:
            return [127, "", str(error)]
        except (OSError, subprocess.TimeoutExpired) as error:
            return [1, "", str(error)]
        return [done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")]

    def keep(self, words: list[str], env: dict[str, str]) -> Result:
        """Start the keeper; returns once it has said that the agent runs, or has ended."""
        keeper = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment(env),
            start_new_session=True,
        )
        self.keeper = keeper
        assert keeper.stdout is not None
        line = keeper.stdout.readline().decode(errors="replace")
        if line.startswith("{"):
            return [0, line, ""]
        return [1, "", line + keeper.stdout.read().decode(errors="replace")]

    def wait(self) -> int:
        return self.keeper.wait() if self.keeper is not None else 0


class Holder:
    """Owns the group and the places; ends with the last keeper."""

    def __init__(self) -> None:
        self.places: list[Any] = []
        self.is_kept = threading.Event()
        threading.Thread(target=self._give_up, daemon=True).start()

    def _give_up(self) -> None:
        if not self.is_kept.wait(UNUSED_LIMIT_S):
            os._exit(0)

    def reserve(self, bundles: list[dict[str, float]], visible: list[list[str]], wait_s: float) -> list[dict[str, str]]:
        """No places where there is no room for them within the time."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group(bundles, strategy="STRICT_SPREAD")
        if not group.wait(wait_s):
            return []
        for index, bundle in enumerate(bundles):
            custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
            options = ray.remote(Place).options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                resources=custom,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            )
            self.places.append(options.remote(visible[index]))
        described: list[dict[str, str]] = ray.get([place.describe.remote() for place in self.places], timeout=wait_s)
        return described

    def call(self, commands: list[list[Any]], limit_s: float) -> list[Result]:
        import ray

        calls = [
            place.run.remote(*command, limit_s) for place, command in zip(self.places, commands, strict=True) if command
        ]
        found: list[Result] = ray.get(calls, timeout=limit_s + 30)
        return found

    def keep(self, commands: list[list[str]], env: dict[str, str], after: str) -> list[Result]:
        import ray

        calls = [place.keep.remote(words, env) for place, words in zip(self.places, commands, strict=True)]
        found: list[Result] = ray.get(calls, timeout=120)
        self.is_kept.set()
        threading.Thread(target=self._follow, args=(after,), daemon=True).start()
        return found

    def _follow(self, after: str) -> None:
        """Wait for every keeper, whatever becomes of the others; then everything here ends."""
        import ray

        for place in self.places:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(place.wait.remote())
        if after:
            row = {"label": "", "reason": "its job has ended", "is_forced": False, "time": time.time()}
            with contextlib.suppress(OSError), Path(after).open("x") as file:
                file.write(json.dumps(row))
        os._exit(0)


# --- the errand ------------------------------------------------------------------------------------------------------


def act(request: Mapping[str, Any]) -> dict[str, Any]:
    """One act on the cluster: the answer, or `fault`."""
    os.environ.update(request["env"])
    try:
        import ray
    except ImportError:
        return {"fault": f"has no Ray: {sys.executable} cannot import it"}
    acts: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "reserve": _reserve,
        "call": lambda row: {
            "results": ray.get(_find_holder(row).call.remote(row["commands"], row["command_limit_s"]))
        },
        "keep": lambda row: {
            "results": ray.get(_find_holder(row).keep.remote(row["commands"], row["job_env"], row["after"]))
        },
        "release": _release,
    }
    try:
        _connect(request)
        return acts[request["act"]](request)
    except (PlaceError, OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        return {"fault": _explain(error)}


def _explain(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) if lines else type(error).__name__


def _connect(request: Mapping[str, Any]) -> None:
    """Join the cluster as a driver, once it can be joined.

    Raises:
        PlaceError, RuntimeError: not within the time that the request gives, or it is another version of Ray.
    """
    import ray

    deadline = time.monotonic() + request["connect_s"]
    _wait_for_port(_find_own() if request["address"] == "auto" else request["address"], deadline)
    while True:
        try:
            ray.init(address=request["address"], namespace=NAMESPACE, log_to_driver=False, logging_level="CRITICAL")
            return
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            if "ersion mismatch" in str(error) or time.monotonic() > deadline:
                raise PlaceError(_explain_absence(request["address"], error)) from None
        time.sleep(0.5)


def _find_own() -> str:
    """The cluster that `auto` means to Ray, as far as Ray has noted it; it may be long gone."""
    import tempfile

    noted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")
    with contextlib.suppress(OSError):
        found = os.environ.get("RAY_ADDRESS") or noted.read_text().strip()
        return found if "://" not in found else "auto"
    return "auto"


def _explain_absence(address: str, error: Exception) -> str:
    if address == "auto" and isinstance(error, ConnectionError):
        return (
            "no Ray cluster runs here (`experiment.runner.ray_address: auto`); start one by `ray start --head`, name "
            "one as host:port, or leave `ray_address` out for a cluster of the run's own"
        )
    return f"the Ray cluster at {address} cannot be joined: {_explain(error)}"


def _wait_for_port(address: str, deadline: float) -> None:
    """Until someone listens there: Ray itself would wait for minutes, and not say for what."""
    host, _, port = address.rpartition(":")
    while port.isdecimal():
        try:
            socket.create_connection((host, int(port)), max(0.5, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                said = error.strerror or error
                raise PlaceError(f"the Ray cluster at {address} cannot be joined: {said}") from None
        time.sleep(0.5)


def _find_holder(request: Mapping[str, Any]) -> Any:
    import ray

    return ray.get_actor(request["name"])


def _release(request: Mapping[str, Any]) -> dict[str, Any]:
    import ray

    with contextlib.suppress(ValueError):
        ray.kill(_find_holder(request))
    return {}


def _reserve(request: Mapping[str, Any]) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _wait_for_nodes(request["num_nodes"], request["connect_s"])
    bundles = [choose_bundle({**row, "pin": find_pin(row)}, nodes) for row in request["places"]]
    if fault := find_shortage(bundles, nodes):
        raise PlaceError(fault)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    holder = (
        ray.remote(Holder)
        .options(name=request["name"], lifetime="detached", num_cpus=0, max_concurrency=8, scheduling_strategy=here)
        .remote()
    )
    visible = [row["visible"] for row in request["places"]]
    try:
        places = ray.get(holder.reserve.remote(bundles, visible, request["wait_s"]))
    except ray.exceptions.RayError:
        ray.kill(holder)
        raise
    if not places:
        free = describe_nodes(_list_free())
        ray.kill(holder)
        what = describe_bundles(bundles)
        raise PlaceError(f"no room within {request['wait_s']:g} s for {what}; free is {free}")
    return {"places": places}


def _wait_for_nodes(num_nodes: int, limit_s: float) -> list[dict[str, Any]]:
    """The living nodes, once there are so many."""
    import ray

    deadline = time.monotonic() + limit_s
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) >= num_nodes:
            return [{"name": node["NodeManagerHostname"], "has": node["Resources"]} for node in nodes]
        if time.monotonic() > deadline:
            names = ", ".join(node["NodeManagerHostname"] for node in nodes)
            raise PlaceError(f"only {len(nodes)} of {num_nodes} Ray nodes came up within {limit_s:g} s: {names}")
        time.sleep(0.3)


def _list_free() -> list[dict[str, Any]]:
    import ray

    free = ray._private.state.available_resources_per_node()
    return [{"name": node["NodeManagerHostname"], "has": free.get(node["NodeID"], {})} for node in ray.nodes()]


# --- what to ask for, and what there is ------------------------------------------------------------------------------


def find_pin(row: Mapping[str, Any]) -> str | None:
    """The resource that only the named node has; None where any node will do.

    Raises:
        PlaceError: this machine does not know the name.
    """
    if row["host"] is None:
        return str(row["pin"]) if row["pin"] else None
    try:
        return f"node:{socket.gethostbyname(row['host'])}"
    except OSError:
        raise PlaceError(f"the name `{row['host']}` is not known on {socket.gethostname()}") from None


def choose_bundle(row: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What one place asks for: its slots, by the name that this cluster has for its chip; its node, where it is named.

    row: slots, chip (its names, the first being the user's), device (of torch), pin
    """
    offered = {name for node in nodes for name in node["has"]}
    bundle: dict[str, float] = {row["pin"]: SMALL} if row["pin"] else {}
    own = next((name for name in row["chip"] if name in offered), None)
    typed = next((f"accelerator_type:{name}" for name in row["chip"] if f"accelerator_type:{name}" in offered), None)
    if own is not None:
        bundle[own] = row["slots"]
    elif typed is not None:
        bundle |= {typed: SMALL, "GPU": row["slots"]}
    else:
        bundle[DEVICES.get(row["device"], row["chip"][0])] = row["slots"]
    return bundle


def find_shortage(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Why these bundles can never be had, each on a node of its own; None where they may."""
    short = [bundle for bundle in bundles if not any(_fits(bundle, node["has"]) for node in nodes)]
    if short or len(bundles) > len(nodes):
        what = describe_bundles(short or bundles)
        return f"the cluster can never give {what}, each on a node of its own; it has {describe_nodes(nodes)}"
    return None


def _fits(bundle: Mapping[str, float], has: Mapping[str, float]) -> bool:
    return all(has.get(name, 0) >= amount for name, amount in bundle.items())


def describe_bundles(bundles: Sequence[Mapping[str, float]]) -> str:
    texts = [" and ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles]
    return "; ".join(f"{texts.count(text)} x ({text})" for text in dict.fromkeys(texts))


def describe_nodes(nodes: Sequence[Mapping[str, Any]]) -> str:
    hidden = ("memory", "object_store_memory")
    rows = []
    for node in nodes:
        shown = [f"{amount:g} {name}" for name, amount in sorted(node["has"].items()) if name not in hidden]
        rows.append(f"{node['name']}: {', '.join(shown) or 'nothing'}")
    return "; ".join(rows)
