"""Waiting for a service that was started: until every model has answered, or it is known why it will not."""

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from flagscale.errors import LaunchError
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.journal import read_tail
from flagscale.runner.launch.record import load_records, order_by_cause
from flagscale.runner.launch.startup import quote_last_words
from flagscale.serve.control import NoControllerError, ask_controller
from flagscale.serve.router.probe import LONGER_PROMPT, ProbeResult, probe_completion

POLL_S = 0.3
ANSWER_LIMIT_S = 120.0
NUM_LAST_LINES = 15


class NotStartedError(LaunchError):
    """The service failed before it was ready; what lives of it has to be ended."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """How to wait. is_interrupted: whether Ctrl-C came; show: says on one line how far it is."""

    is_interrupted: Callable[[], bool]
    show: Callable[[str], None]
    limit_s: float


def wait_until_ready(run: RunRef, key: str | None, waiting: Waiting) -> dict[str, Any] | None:
    """The service's status once all models have answered a completion through the router; None after Ctrl-C.

    Raises:
        NotStartedError: why it will not be ready.
    """
    deadline = time.monotonic() + waiting.limit_s
    while not waiting.is_interrupted():
        status = _ask(run.exp_dir)
        if status is None or status["run_id"] != run.run_id:
            check_controller(run)
        elif status["state"] == "failed":
            raise NotStartedError(explain_failure(status))
        elif status["state"] in ("ready", "degraded"):
            if fault := ask_models(status, key):
                raise NotStartedError(fault)
            return status
        else:
            waiting.show(describe_progress(status))
        if time.monotonic() > deadline:
            raise NotStartedError(f"the service was not ready after {waiting.limit_s:g} s")
        time.sleep(POLL_S)
    return None


def _ask(exp_dir: Path) -> dict[str, Any] | None:
    try:
        return ask_controller(exp_dir, "/status")
    except NoControllerError:
        return None


def check_controller(run: RunRef) -> None:
    """
    Raises:
        NotStartedError: the controller's run has ended, with its last lines.
    """
    records = load_records(run)
    if not records[0].is_alive:
        raise NotStartedError(f"the service's controller ended\n{quote_last_words(order_by_cause(records)[0])}")


def describe_progress(status: dict[str, Any]) -> str:
    """How many replicas are ready, and what one that is not says."""
    models = status["models"]
    text = f"{sum(model['ready'] for model in models)} of {sum(model['wanted'] for model in models)} replicas ready"
    if "graph" in status and not status["replicas"]:
        return f"{text}; {status['note']}"
    busy = next((replica for replica in status["replicas"] if replica["state"] == "starting"), None)
    if busy is not None and busy["progress"]:
        return f"{text}; {busy['name']}: {busy['progress']}"
    return text


def explain_failure(status: dict[str, Any]) -> str:
    """The cause in the first line, and below it where to read on."""
    failed = next((replica for replica in status["replicas"] if replica["state"] == "failed"), None)
    if failed is None:
        return f"the service did not start: {status['why']}"
    log = next(iter(sorted(Path(failed["log_dir"]).glob("host_0_*.output"))), None)
    head = f"the service did not start: {failed['name']}: {failed['cause']}"
    if log is None:
        return head
    lines = read_tail(log).splitlines()[-NUM_LAST_LINES:]
    return "\n".join([head, f"last lines of {log}:", *(f"  {line}" for line in lines)])


async def probe_model(status: dict[str, Any], served_name: str, key: str | None, limit_s: float) -> ProbeResult:
    """One token of a model through the router: of one served by pairs, through a pair."""
    is_paired = any(model["served_name"] == served_name and model.get("handover") for model in status["models"])
    extra = {"prompt": LONGER_PROMPT} if is_paired else {}
    return await probe_completion(status["url"], served_name, SecretStr(key) if key else None, limit_s, extra=extra)


def ask_models(status: dict[str, Any], key: str | None) -> str | None:
    """One token of every model through the router, with the callers' key; what is wrong where there is none.

    Of a graph of models, whose answers only its user knows, every node has to have a replica.
    """
    if "graph" in status:
        return ask_health(status["url"])

    async def ask() -> str | None:
        for name in dict.fromkeys(model["served_name"] for model in status["models"]):
            result = await probe_model(status, name, key, ANSWER_LIMIT_S)
            if not result.is_ok:
                return f"`{name}` does not answer at {status['url']}: {result.reason}"
        return None

    return asyncio.run(ask())


def ask_health(url: str) -> str | None:
    """What is wrong where `/health` is not 200."""
    try:
        code = ask_code(f"{url}/health", None)
    except OSError as error:
        return f"{url}/health: {error}"
    return None if code == 200 else f"{url}/health answers {code}"


def ask_code(url: str, key: str | None) -> int:
    """The status of an answer.

    Raises:
        OSError: there is none.
    """
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=ANSWER_LIMIT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
