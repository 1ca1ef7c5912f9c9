"""From a planned service to one that answers, and what is said on the way: shared by `run.py` and `flagscale serve`."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import LaunchError, UserError

if TYPE_CHECKING:
    from flagscale.runner.launch.folder import RunRef
    from flagscale.runner.plan.graph import GraphPlan
    from flagscale.runner.plan.job import JobPlan
    from flagscale.runner.plan.service import ServicePlan

CONTROLLER_GRACE_S = 120.0
"""Between SIGTERM and SIGKILL for a controller, seconds: it drains, and waits for its replicas' ends."""
MARGIN_S = 60.0
"""The controller gives up a replica after `start_timeout_s` and knows why; the command waits for its word."""


def start_service(
    job: "JobPlan",
    values: Mapping[str, Any],
    command: Sequence[str],
    *,
    foreground: bool,
    is_test: bool = False,
    record: Callable[[], None] | None = None,
) -> int:
    """Start a service and return once it has answered; stay with it to its end where `foreground` says so.

    is_test: end it once it has answered
    record: called once it was handed over

    Raises:
        UserError: it cannot run as it is; nothing was started.
        LaunchError: it did not start, with the cause; nothing of it is left.
    """
    from flagscale.runner.launch.ending import catch_interrupts
    from flagscale.runner.launch.launcher import submit_job
    from flagscale.runner.launch.startup import explain_interrupt, show_progress
    from flagscale.runner.plan.service import decode_service
    from flagscale.serve.preflight import check_service
    from flagscale.serve.stopping import stop_service

    service = decode_service(job.service or {})
    refuse_running(service)
    check_service(service, os.environ)
    # after the check, which names all that is missing at once
    from flagscale.serve.waiting import NotStartedError, Waiting, wait_until_ready

    run = submit_job(job, config=dict(values), command=list(command), env=dict(os.environ), grace_s=CONTROLLER_GRACE_S)
    with catch_interrupts(run, stops_job=False) as interrupts:
        if record is not None:
            record()
        print(describe_start(run, service), file=sys.stderr, flush=True)
        key = os.environ.get(service.api_key_env) if service.api_key_env else None
        try:
            with show_progress() as show:
                waiting = Waiting(lambda: interrupts.num > 0, show, service.start_timeout_s + MARGIN_S)
                status = wait_until_ready(run, key, waiting)
        except NotStartedError as error:
            stop_service(run.exp_dir, force=True)
            raise LaunchError(str(error)) from None
        if status is None:
            if foreground or is_test:
                stop_service(run.exp_dir)
            raise explain_interrupt(run, is_stopping=foreground or is_test)
        print(describe_ready(run, status), flush=True)
        if is_test:
            stop_service(run.exp_dir)
            return 0
    return follow_service(run) if foreground else 0


def refuse_running(service: "ServicePlan") -> None:
    """
    Raises:
        LaunchError: this very service runs already.
    """
    from flagscale.runner.launch.folder import find_current
    from flagscale.serve.folder import is_run_alive

    run = find_current(Path(service.exp_dir))
    if run is not None and is_run_alive(run):
        raise LaunchError(
            f"{run.exp_dir} already holds a service that runs: {run.run_id}; change it with "
            f"`flagscale serve update {run.run_id}`, or stop it with `flagscale serve stop {run.run_id}`"
        )


def describe_start(run: "RunRef", service: "ServicePlan") -> str:
    if service.graph is not None:
        return _describe_graph_start(run, service, service.graph)
    models = ", ".join(
        f"{model.served_name} ({model.engine}"
        + f", {model.role}" * (model.role != "whole")
        + f", {model.scaling.initial} replicas" * (model.scaling.initial > 1)
        + ")"
        for model in service.models
    )
    rows = {"models": models, "outputs": str(run.exp_dir), "logs": f"flagscale serve logs -f {run.run_id}"}
    lines = [f"  {name:<8} {text}" for name, text in rows.items()]
    return "\n".join([f"service {service.name} (run {run.run_id}) is starting", *lines])


def _describe_graph_start(run: "RunRef", service: "ServicePlan", graph: "GraphPlan") -> str:
    nodes = ", ".join(f"{node.name} ({node.class_name})" for node in graph.nodes)
    rows = {"nodes": nodes, "outputs": str(run.exp_dir), "logs": f"flagscale serve logs -f {run.run_id}"}
    lines = [f"  {name:<8} {text}" for name, text in rows.items()]
    return "\n".join([f"service {service.name} (run {run.run_id}) is starting", *lines])


def describe_ready(run: "RunRef", status: Mapping[str, Any]) -> str:
    model = status["models"][0]["served_name"]
    key = f' -H "Authorization: Bearer ${status["api_key_env"]}"' if status["needs_key"] else ""
    if "graph" in status:
        return _describe_graph_ready(run, status, key)
    body = f'{{"model": "{model}", "prompt": "Hello", "max_tokens": 16}}'
    rows = {
        "url": f"{status['url']}/v1",
        "key": f"${status['api_key_env']}" if status["needs_key"] else "none is asked for",
        "page": status["url"],
        "try": f"curl {status['url']}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        "stop": f"flagscale serve stop {run.run_id}",
    }
    lines = [f"  {name:<8} {text}" for name, text in rows.items()]
    return "\n".join([f"service {status['name']} answers", *lines])


def _describe_graph_ready(run: "RunRef", status: Mapping[str, Any], key: str) -> str:
    import json

    examples = {"str": "Hello", "int": 1, "float": 0.5, "bool": True, "list": [], "dict": {}}
    body = json.dumps({name: examples[kind] for name, kind in status["request"].items()})
    url = status["url"] + status["graph"]
    rows = {
        "url": url,
        "key": f"${status['api_key_env']}" if status["needs_key"] else "none is asked for",
        "health": f"{status['url']}/health",
        "try": f"curl {url}{key} -H 'Content-Type: application/json' -d '{body}'",
        "stop": f"flagscale serve stop {run.run_id}",
    }
    lines = [f"  {name:<8} {text}" for name, text in rows.items()]
    return "\n".join([f"service {status['name']} answers", *lines])


def follow_service(run: "RunRef") -> int:
    """Show the controller's lines until the service has ended; Ctrl-C ends it in order, a second one at once."""
    from flagscale.runner.launch.ending import catch_interrupts
    from flagscale.runner.launch.record import load_records
    from flagscale.runner.monitor.logs import find_output_tails, follow_lines
    from flagscale.runner.monitor.state import query_run
    from flagscale.serve.stopping import stop_service

    with catch_interrupts(run, stops_job=False) as interrupts:
        for _, line in follow_lines(
            find_output_tails(run),
            lambda: interrupts.num > 0 or not any(record.is_alive for record in load_records(run)),
        ):
            print(line, flush=True)
    if interrupts.num:
        print(f"stopping {run.run_id}", file=sys.stderr, flush=True)
    stop_service(run.exp_dir)
    return query_run(run).exit_code or 0


def find_service(ref: str | None) -> "RunRef":
    """The controller's run that `ref` means: a run id, its beginning, an experiment folder; None: the newest service.

    Raises:
        UserError: there is none, or it is no service.
    """
    from flagscale.runner.monitor.runs import list_runs, load_run

    if ref is None:
        newest = next((run for run in list_runs() if run.task == "serve"), None)
        if newest is None:
            raise UserError("no service was started; start one with `flagscale serve <model>`")
        return newest
    run = load_run(ref)
    if run.task != "serve":
        raise UserError(f"run {run.run_id} is a {run.task} job, no service; see `flagscale status {run.run_id}`")
    return run
