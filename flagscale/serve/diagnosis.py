"""`flagscale serve doctor`: which of the known causes holds, each looked for by itself, from a socket to a log.

Nothing here changes anything, and nothing trusts the controller's word for what can be asked directly.
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from flagscale.errors import RunError
from flagscale.runner.launch.folder import RunRef, load_plan
from flagscale.runner.launch.ports import find_port_owner
from flagscale.runner.launch.record import HostRecord, load_records
from flagscale.runner.monitor.state import query_run
from flagscale.runner.plan.service import ServicePlan, decode_service
from flagscale.serve.causes import find_cause
from flagscale.serve.control import NoControllerError, ask_controller
from flagscale.serve.folder import find_state, list_replica_runs
from flagscale.serve.replicas import read_output
from flagscale.serve.router.probe import probe_completion

PROBE_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. remedy: what to do, empty where nothing is."""

    name: str
    is_ok: bool
    text: str
    remedy: str = ""


def diagnose(run: RunRef) -> list[Finding]:
    """Everything that was looked at, from the outside in.

    Raises:
        RunError: the run's folder is damaged.
    """
    service = _load_service(run)
    status = _ask(run)
    findings = [_look_at_controller(run, status), _look_at_port(service, status is not None)]
    if status is not None:
        findings += _look_at_key(service, status)
    for replica in list_replica_runs(run.exp_dir):
        findings += _look_at_replica(replica, status)
    return findings


def _load_service(run: RunRef) -> ServicePlan:
    state = find_state(run.exp_dir)
    if state is not None and state.run_id == run.run_id:
        return decode_service(state.service)
    return decode_service(load_plan(run.exp_dir, run.run_id).service or {})


def _ask(run: RunRef) -> dict[str, Any] | None:
    try:
        status = ask_controller(run.exp_dir, "/status")
    except NoControllerError:
        return None
    return status if status["run_id"] == run.run_id else None


def _look_at_controller(run: RunRef, status: dict[str, Any] | None) -> Finding:
    if status is not None:
        is_ok = status["state"] in ("ready", "updating")
        return Finding("controller", is_ok, f"answers; the service is {status['state']}")
    state = query_run(run)
    if state.has_ended:
        text = f"has ended: {state.state}" + (f", {state.reason}" if state.reason else "")
        return Finding("controller", False, text, f"start the service again; its log: {run.output_path(run.labels[0])}")
    return Finding("controller", False, "lives and does not answer", "`flagscale serve stop`, then start it again")


def _look_at_port(service: ServicePlan, is_up: bool) -> Finding:
    name = f"port {service.port}"
    owner = find_port_owner(service.port)
    with socket.socket() as probe:
        probe.settimeout(2.0)
        is_open = probe.connect_ex(("127.0.0.1", service.port)) == 0
    if is_up:
        text = "accepts connections" if is_open else "refuses connections"
        return Finding(name, is_open, text, "" if is_open else "see the controller's log")
    if is_open:
        return Finding(name, False, f"is held by {owner or 'another process'}", "end that, or choose another by --port")
    return Finding(name, True, "is free")


def _look_at_key(service: ServicePlan, status: dict[str, Any]) -> Iterator[Finding]:
    """A token of each model through the router, as a caller would ask for it."""
    name = service.api_key_env
    key = os.environ.get(name) if name else None
    if status["needs_key"] and not key:
        text = f"callers need one, and ${name} is not set here"
        yield Finding("key", False, text, f"export {name} with the key that the service was started with")
        return
    for model in status["models"]:
        secret = SecretStr(key) if key else None
        result = asyncio.run(probe_completion(status["url"], model["served_name"], secret, PROBE_LIMIT_S))
        label = f"model {model['served_name']}"
        if result.is_ok:
            yield Finding(label, True, f"answered in {result.seconds:.2f} s, {model['ready']} replicas ready")
        elif result.reason.startswith("401"):
            yield Finding("key", False, "the router refuses it", f"${name} differs from the one at the start")
        else:
            yield Finding(label, False, result.reason, "see its replicas below")


def _look_at_replica(replica: RunRef, status: dict[str, Any] | None) -> Iterator[Finding]:
    name = f"replica {Path(replica.exp_dir).name}"
    try:
        records, state = load_records(replica), query_run(replica)
    except RunError as error:
        yield Finding(name, False, str(error))
        return
    known = {row["run_id"]: row for row in status["replicas"]} if status else {}
    row = known.get(replica.run_id)
    if row is None:
        if not state.has_ended:
            yield Finding(name, False, f"run {replica.run_id} lives and belongs to nobody", "flagscale serve stop")
        elif state.state == "failed":
            yield _explain_end(name, records, state.reason)
        return
    text = f"{row['state']} at {', '.join(row['hosts'])}" + (f": {row['cause']}" if row["cause"] else "")
    if row["state"] == "ready":
        yield Finding(name, True, text)
        return
    remedy = f"its log: {records[0].output}"
    if row["state"] == "lost":
        remedy = "bring the host back: what it still runs is ended then, and its chips are used again"
    yield Finding(name, False, text + (f"; {row['reason']}" if row["reason"] else ""), remedy)
    yield from _look_at_ray(name, replica, records)


def _explain_end(name: str, records: tuple[HostRecord, ...], reason: str | None) -> Finding:
    cause = next(filter(None, (find_cause(read_output(record)) for record in records)), None)
    return Finding(name, False, f"ended: {cause or reason}", f"its log: {records[0].output}")


def _look_at_ray(name: str, replica: RunRef, records: tuple[HostRecord, ...]) -> Iterator[Finding]:
    """A multi-host vLLM that waits: which workers have not joined, and whether addresses agree."""
    if len(records) < 2 or not any(entry.name == "ray" for entry in records[0].spec.processes):
        return
    waits = find_cause(read_output(records[0]), ("ray",))
    if waits is not None and waits.kind == "ray":
        yield Finding(name, False, str(waits), "Ray has fewer chips than the engine asks for: a worker is missing")
    for record in records[1:]:
        output = read_output(record)
        if not record.is_alive:
            end = record.find("job_ended")
            yield Finding(name, False, f"the worker {record.label} has ended: {end['reason'] if end else 'killed'}")
        elif "Ray runtime started" not in output:
            told = find_cause(output)
            text = f"the worker {record.label} has not joined" + (f": {told}" if told else "")
            yield Finding(name, False, text, "is the head's ray_port open between the hosts?")
    plan = load_plan(replica.exp_dir, replica.run_id)
    envs = {host.label: dict(host.processes[-1].env) for host in plan.hosts}
    for host in plan.hosts:
        told_ip = str(envs[host.label].get("VLLM_HOST_IP", ""))
        ray_ip = _find_ray_ip(next(record for record in records if record.label == host.label))
        if told_ip and ray_ip and told_ip != ray_ip:
            text = f"VLLM_HOST_IP is {told_ip} on {host.host.name}, where Ray is at {ray_ip}"
            yield Finding(name, False, text, "make them the same in experiment.node_specific")


def _find_ray_ip(record: HostRecord) -> str | None:
    import re

    match = re.search(r"Local node IP: (\S+)", read_output(record))
    return match[1] if match else None
