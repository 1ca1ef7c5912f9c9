"""`flagscale serve update`: plan the changed service and hand it to the controller, which changes its replicas."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flagscale.errors import LaunchError, UserError

if TYPE_CHECKING:
    from flagscale.runner.config.compose import Composed
    from flagscale.runner.launch.folder import RunRef

POLL_S = 0.3


def update_service(run: "RunRef", yaml: Sequence[str], change: Callable[["Composed"], "Composed"]) -> int:
    """Returns once the new version serves.

    yaml: an experiment YAML in place of what the service was started with, and overrides of it
    change: lays the options of the command over

    Raises:
        UserError: the new version cannot be right; nothing was changed.
        LaunchError: it did not start; the old one serves on.
    """
    from flagscale.cli.jobs import compose, plan
    from flagscale.runner.launch.ending import catch_interrupts
    from flagscale.runner.launch.startup import show_progress
    from flagscale.runner.plan.service import decode_service, encode_service
    from flagscale.serve.control import ask_controller
    from flagscale.serve.preflight import check_models
    from flagscale.serve.terms import limit_seats
    from flagscale.serve.waiting import describe_progress

    status = ask_controller(run.exp_dir, "/status")
    composed = compose(yaml[0], "serve", yaml[1:]) if yaml else recall(run)
    job = plan(change(composed))
    if job.plan.service is None:
        raise UserError("the new version is no service of engines")
    if job.plan.exp_dir != str(run.exp_dir):
        raise UserError(
            f"the new version has the folder {job.plan.exp_dir}; expected that of the service, {run.exp_dir}"
        )
    service = decode_service(job.plan.service)
    if service.graph is not None or "graph" in status:
        raise UserError("a graph of models is not updated while it runs; stop it, and start it anew")
    check_models(service)
    body = {"service": encode_service(limit_seats(service)), "config": dict(job.config.values)}
    version = ask_controller(run.exp_dir, "/update", body)["version"]
    becomes = f"becomes {version}" if version != status["version"] else "stays, and the number of replicas changes"
    print(f"service {status['name']}: version {status['version']} {becomes}", file=sys.stderr, flush=True)
    with catch_interrupts(run, stops_job=False) as interrupts, show_progress() as show:
        while not interrupts.num:
            status = ask_controller(run.exp_dir, "/status")
            if status["update"]["state"] == "failed":
                raise LaunchError(
                    f"what is new did not start, version {status['version']} serves on: {status['update']['message']}"
                )
            if status["update"]["state"] == "done":
                print(f"service {status['name']}: version {version} serves")
                return 0
            show(describe_progress(status))
            time.sleep(POLL_S)
    print(f"the update goes on; see `flagscale serve status {run.run_id}`", file=sys.stderr)
    return 130


def recall(run: "RunRef") -> "Composed":
    """What the service was configured with, at its start or at its last update."""
    from pathlib import Path

    from flagscale.runner.config.compose import Composed
    from flagscale.runner.launch.folder import load_job
    from flagscale.serve.folder import find_state

    job = load_job(run.exp_dir, run.run_id)
    state = find_state(run.exp_dir)
    values: dict[str, Any] = dict(state.config if state is not None and state.run_id == run.run_id else job["config"])
    os.chdir(job["cwd"])
    return Composed(values, Path(job["cwd"]), f"the configuration of run {run.run_id}", environment={})
