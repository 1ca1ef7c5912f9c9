"""What a launcher asks of a host over SSH, answered there: standard library, sent along with each question.

The launcher sends an archive of the few files that are needed and one line of JSON; Python on the host reads both from
its standard input, keeps the archive in memory, and prints one line of JSON. Nothing is installed, nothing stays, and
the host's answers come from the same code that checks this machine.

    check    plan nonce_path nonce is_head patches   -> faults [[kind, text]..], port
    ask      machine pids token              -> is_watched, num_left
    end      machine pids signum             -> {}
    clean    token grace_s                   -> num_left, how many processes without a watcher were ended
"""

import json
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

from flagscale.errors import FlagScaleError, UserError
from flagscale.runner.launch import procs
from flagscale.runner.launch.checks import check_outputs, check_programs, choose_port
from flagscale.runner.launch.sources import check_trees
from flagscale.runner.plan.job import JobPlan, decode_plan

BOOT = (
    "import os,sys;i=sys.stdin.buffer;n=int(i.readline());f=os.memfd_create('flagscale');os.write(f,i.read(n));"
    "sys.path.insert(0,'/proc/self/fd/%d'%f);from flagscale.runner.launch.errands import main;main()"
)
"""One line without what any login shell would change between single quotes."""


def _check_shared(request: dict[str, Any], plan: JobPlan) -> str | None:
    path = Path(request["nonce_path"])
    try:
        found = path.read_text()
    except OSError as error:
        return (
            f"does not see the experiment folder {plan.exp_dir} as the launcher does ({error.strerror}); "
            "expected a path on a file system that all hosts share"
        )
    if found != request["nonce"]:
        return f"has another {path.parent} than the launcher; expected a file system that all hosts share"
    for folder in (path.parent, _nearest_folder(Path(plan.log_dir))):
        probe = folder / f".{socket.gethostname()}.{os.getpid()}.probe"
        try:
            probe.write_text(request["nonce"])
            probe.unlink()
        except OSError as error:
            return f"cannot write into {folder}: {error.strerror}"
    return None


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Everything wrong here with a plan of this one host, and the port where ranks meet if it is the head."""
    plan = decode_plan(request["plan"])
    faults: list[tuple[str, str]] = []
    port: int | None = None
    if unshared := _check_shared(request, plan):
        faults.append(("user", unshared))
    for look in (
        partial(check_programs, plan, os.environ),
        partial(check_trees, plan, request["patches"]),
        partial(check_outputs, plan),
    ):
        try:
            look()
        except FlagScaleError as error:
            faults.append(("user" if isinstance(error, UserError) else "launch", str(error)))
    if request["is_head"]:
        try:
            port = choose_port(plan)
        except FlagScaleError as error:
            faults.append(("launch", str(error)))
    return {"faults": faults, "port": port}


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Whether agent or guard live, as on the same start of the same machine; if not, what lives without them."""
    is_same = request["machine"] == procs.name_machine()
    is_watched = is_same and any(procs.is_same_alive(pid, start_time) for pid, start_time in request["pids"])
    return {"is_watched": is_watched, "num_left": 0 if is_watched else len(procs.find_ours(request["token"]))}


def end(request: dict[str, Any]) -> dict[str, Any]:
    if request["machine"] == procs.name_machine():
        for pid, start_time in request["pids"]:
            procs.send_signal(procs.Proc(pid, 0, start_time, False), request["signum"])
    return {}


def clean(request: dict[str, Any]) -> dict[str, Any]:
    return {"num_left": procs.end_leftovers(request["token"], request["grace_s"])}


ERRANDS = {"check": check, "ask": ask, "end": end, "clean": clean}


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    answer = ERRANDS[request["errand"]](request)
    print(json.dumps(answer), flush=True)
