"""What `flagscale serve status` and `flagscale serve logs` print."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import UserError, find_nearest

if TYPE_CHECKING:
    from rich.table import Table

    from flagscale.runner.launch.folder import RunRef

CONTROLLER = "controller"


def print_status(run: "RunRef", as_json: bool) -> int:
    """The service as its controller tells it, or as its runs lie there where none answers."""
    status = load_status(run)
    if as_json:
        print(json.dumps(status, indent=1))
        return 0
    rows = {
        "service": f"{status['name']} (run {status['run_id']})",
        "state": status["state"],
        "why": status["why"],
        "url": status["url"] + status.get("graph", "/v1") if status["url"] else None,
        "version": status["version"],
        "update": _describe_update(status["update"]),
        "folder": str(run.exp_dir),
    }
    for name, text in rows.items():
        if text:
            print(f"{name:<9} {text}")
    for table in (_models_table(status), _replicas_table(status), _registered_table(status)):
        if table.row_count:
            _print_table(table)
    return 0


def load_status(run: "RunRef") -> dict[str, Any]:
    """The status as JSON values; a service whose controller does not answer has what its folder tells."""
    from flagscale.runner.monitor.state import query_run
    from flagscale.serve.control import NoControllerError, ask_controller
    from flagscale.serve.folder import is_run_alive, list_replica_runs

    try:
        status = ask_controller(run.exp_dir, "/status")
        if status["run_id"] == run.run_id:
            return status
    except NoControllerError:
        pass
    state = query_run(run)
    living = [replica for replica in list_replica_runs(run.exp_dir) if is_run_alive(replica)]
    why = state.reason
    if living:
        why = f"its controller does not answer, and {len(living)} replicas live; end them by `flagscale serve stop`"
    return {
        "name": run.exp_name,
        "run_id": run.run_id,
        "url": None,
        "state": state.state if state.has_ended else "unanswered",
        "why": why,
        "version": None,
        "update": None,
        "models": [],
        "replicas": [
            {"name": replica.exp_name, "run_id": replica.run_id, "state": "alive", "exp_dir": str(replica.exp_dir)}
            for replica in living
        ],
    }


def _describe_update(update: dict[str, Any] | None) -> str | None:
    if update is None:
        return None
    return f"to version {update['version']}: {update['state']}" + (
        f", {update['message']}" if update["message"] else ""
    )


def _models_table(status: dict[str, Any]) -> "Table":
    from rich.table import Table

    heads = ["model", "engine", "ready", "wanted", "bounds", "waiting"]
    has_roles = any(model.get("role", "whole") != "whole" for model in status["models"])
    table = Table(*heads[:1], *["role"] * has_roles, *heads[1:], box=None, pad_edge=False)
    for model in status["models"]:
        bounds = f"{model['lowest']}-{model['highest']}"
        names = (model["served_name"], *[model.get("role", "whole")] * has_roles, model["engine"])
        table.add_row(*map(str, (*names, model["ready"], model["wanted"], bounds, model["waiting"])))
    return table


def _replicas_table(status: dict[str, Any]) -> "Table":
    from rich.table import Table

    heads = ("replica", "state", "for", "version", "where", "in flight", "requests", "starts", "")
    table = Table(*heads, box=None, pad_edge=False)
    for replica in status["replicas"]:
        since = replica.get("since")
        age = f"{time.time() - since:.0f} s" if since else "-"
        where = ", ".join(replica.get("takes") or replica.get("hosts") or ["-"])
        told = replica.get("cause") or replica.get("reason") or replica.get("progress") or ""
        numbers = (str(replica.get(name, "-")) for name in ("in_flight", "requests", "starts"))
        table.add_row(replica["name"], replica["state"], age, str(replica.get("version", "-")), where, *numbers, told)
    return table


def _registered_table(status: dict[str, Any]) -> "Table":
    """Replicas that others started."""
    from rich.table import Table

    heads = ("registered", "model", "role", "phase", "version", "at", "in flight", "requests", "")
    names = ("id", "model", "role", "phase", "version", "url", "in_flight", "requests", "reason")
    table = Table(*heads, box=None, pad_edge=False)
    for row in status.get("registered", ()):
        table.add_row(*(str(row[name]) for name in names))
    return table


def _print_table(table: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(table)


def print_service_logs(run: "RunRef", only: str | None, num_lines: int | None, follow: bool) -> int:
    """Each line behind the name of whose it is.

    only: a replica's name, or `controller`

    Raises:
        UserError: there is no replica of this name.
    """
    from flagscale.runner.launch.record import load_records
    from flagscale.runner.monitor.logs import Tail, find_output_tails, follow_lines
    from flagscale.serve.folder import list_replica_runs

    sources: dict[str, RunRef] = {CONTROLLER: run}
    sources |= {Path(replica.exp_dir).name: replica for replica in list_replica_runs(run.exp_dir)}
    if only is not None and only not in sources:
        near = find_nearest(only, sources)
        hint = f"did you mean `{near}`?" if near else f"there are: {', '.join(sources)}"
        raise UserError(f"the service has no replica `{only}`; {hint}")
    names: dict[int, str] = {}
    tails: list[Tail] = []
    for name, source in sources.items():
        if only not in (None, name):
            continue
        found = find_output_tails(source)
        names |= {id(tail): name if len(found) == 1 else f"{name} {tail.name}" for tail in found}
        tails += found
    width = max(map(len, names.values()), default=0)

    def show(tail: Tail, line: str) -> None:
        print(f"{names[id(tail)]:{width}} | {line}" if len(tails) > 1 else line, flush=follow)

    for tail in tails:
        for line in tail.read_last(num_lines):
            show(tail, line)
        if not follow:
            for line in tail.read_rest():
                show(tail, line)
    if follow:
        for tail, line in follow_lines(tails, lambda: not any(record.is_alive for record in load_records(run))):
            show(tail, line)
    return 0
