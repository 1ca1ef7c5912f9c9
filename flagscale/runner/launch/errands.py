"""What a launcher asks of a host over SSH, answered there: standard library, sent along with each question.

The launcher sends an archive of the few files that are needed, and then questions, a line of JSON each; Python on the
host reads them from its standard input, keeps the archive in memory, and answers each with a line of JSON. Starting it
is most of what an errand costs, so it stays as long as the launcher does. Nothing is installed, nothing stays but what
`place` was given and the agent that `start` becomes, and the host's answers come from the same code that checks this
machine.

    check    plan nonce_path nonce is_head known_run patches -> faults [[kind, text]..], notes, port, is_shared
    start    spec secrets                            -> agent, guard, or fault
    ask      machine pids token                      -> is_watched, num_left
    end      machine pids signum notice              -> {}
    owner    machine pids                            -> owner, who alone may end the run's processes, or null
    clean    token grace_s                           -> num_left, how many processes without a watcher were ended

and of a host that has an experiment folder of its own:

    place    files [[path, text, mode]..] folders    -> fault, or files and folders that are new
    unplace  files folders                           -> {}, those deleted again that still are as they were placed
    report   events offset heartbeat output token    -> is_watched, num_left, new events, beat_age_s, tails
    read     path start end                          -> data (Base64 of zlib), size, is_all
    ranks    details local_rank                      -> paths of torchrun's files
"""

import base64
import json
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flagscale.errors import FlagScaleError, UserError
from flagscale.runner.launch import procs
from flagscale.runner.launch.agent import describe_failed_start, start_agent
from flagscale.runner.launch.capacity import find_disk_faults, nearest_folder, weigh_chips
from flagscale.runner.launch.checks import check_outputs, check_programs, choose_port
from flagscale.runner.launch.files import NewFile, Written, write_all
from flagscale.runner.launch.journal import (
    find_rank_files,
    load_events,
    load_spec,
    parse_events,
    read_journal,
    read_tail,
)
from flagscale.runner.launch.notice import Notice, write_notice
from flagscale.runner.plan.job import JobPlan, decode_plan

TAIL_BYTES = 1 << 14
CHUNK_BYTES = 1 << 22
ANSWER = "flagscale answers: "
"""goes before each answer: what a login shell or a site's packages print at their start is none"""
BOOT = (
    "import os,sys;sys.version_info<(3,11)and sys.exit('Python '+sys.version.split()[0]+' is too old, 3.11 is needed');"
    "i=sys.stdin.buffer;n=int(i.readline());f=os.memfd_create('flagscale');os.write(f,i.read(n));"
    "sys.path.insert(0,'/proc/self/fd/%d'%f);import gc;gc.disable();"
    "from flagscale.runner.launch.{module} import main;gc.enable();main()"
)
"""One line, for the module of the errand, without what any login shell would change between single quotes.

While modules are loaded nothing becomes garbage, and looking for some would be a tenth of the start.
"""


def _find_unshared(request: dict[str, Any], plan: JobPlan) -> str | None:
    """Why the launcher's experiment folder is not this host's."""
    path = Path(request["nonce_path"])
    try:
        found = path.read_text()
    except OSError as error:
        return f"does not see the experiment folder {plan.exp_dir} as the launcher does ({error.strerror})"
    return None if found == request["nonce"] else f"has another {path.parent} than the launcher"


def _find_unwritable(folders: tuple[Path, ...]) -> str | None:
    for folder in dict.fromkeys(map(nearest_folder, folders)):
        probe = folder / f".{socket.gethostname()}.{os.getpid()}.probe"
        try:
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            return f"cannot write into {folder}: {error.strerror}"
    return None


def _find_living(plan: JobPlan, known_run: str | None) -> str | None:
    """The run of another launching machine that lives in this host's own experiment folder."""
    runs = Path(plan.exp_dir, "runs")
    try:
        run_id = (runs / "current").read_text().strip()
    except OSError:
        return None
    for path in sorted((runs / run_id).glob("*.spec.json")) if run_id != known_run else ():
        events = load_events(Path(load_spec(path).events))
        pairs = _list_watchers(events)
        if any(procs.is_same_alive(*pair) for pair in pairs) and events[-1]["event"] != "job_ended":
            return f"its {plan.exp_dir} already holds a job that runs: {run_id}; stop it where it was started"
    return None


def _check_patches(request: dict[str, Any], plan: JobPlan) -> None:
    if request["patches"]:
        from flagscale.runner.launch.sources import check_trees

        check_trees(plan, request["patches"])


def _find_faults(request: dict[str, Any], plan: JobPlan, unshared: str | None) -> Iterator[tuple[str, str]]:
    folders = (Path(plan.exp_dir), Path(plan.log_dir))
    if unshared and not plan.no_shared_fs:
        hint = "expected a path on a file system that all hosts share, or `experiment.runner.no_shared_fs: true`"
        yield "user", f"{unshared}; {hint}"
    elif unwritable := _find_unwritable(folders):
        yield "user", unwritable
    if unshared and plan.no_shared_fs and (living := _find_living(plan, request["known_run"])):
        yield "launch", living
    yield from (("launch", text) for text in find_disk_faults(plan))
    for look in (
        partial(check_programs, plan, os.environ),
        partial(_check_patches, request, plan),
        partial(check_outputs, plan),
    ):
        try:
            look()
        except FlagScaleError as error:
            yield ("user" if isinstance(error, UserError) else "launch"), str(error)


def _find_unmet(plan: JobPlan) -> str | None:
    """Why this host, which is not the first, will not find the first."""
    if not plan.hosts[0].peer:
        return None
    try:
        socket.getaddrinfo(plan.master_addr, None)
    except OSError:
        return (
            f"does not know the name `{plan.master_addr}`, where ranks meet; expected an address that all hosts reach, "
            "in the hostfile or as `experiment.runner.master_addr`"
        )
    return None


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Everything wrong here with a plan of this one host, and the port where ranks meet if it is the head."""
    plan = decode_plan(request["plan"])
    unshared = _find_unshared(request, plan)
    faults = list(_find_faults(request, plan, unshared))
    fault, note = weigh_chips(plan.hosts[0])
    faults += [("user", fault)] if fault else []
    port: int | None = None
    if not request["is_head"] and (unmet := _find_unmet(plan)):
        faults.append(("user", unmet))
    if request["is_head"]:
        try:
            port = choose_port(plan)
        except FlagScaleError as error:
            faults.append(("launch", str(error)))
    return {"faults": faults, "notes": [note] if note else [], "port": port, "is_shared": not unshared}


def start(request: dict[str, Any]) -> dict[str, Any]:
    """Leave an agent here, which starts this host's part of the job."""
    spec = load_spec(Path(request["spec"]))
    return start_agent(spec, request["secrets"]) or {"fault": describe_failed_start(spec)}


def _list_watchers(events: tuple[dict[str, Any], ...]) -> list[tuple[int, int]]:
    """Pid and start time of agent and guard, if they are of this start of this machine."""
    started = next((event for event in events if event["event"] == "agent_started"), {})
    if started.get("machine") != procs.name_machine():
        return []
    pairs = [(started["pid"], started["start_time"]), (started["guard"], started["guard_start_time"])]
    return [(pid, start_time) for pid, start_time in pairs if pid and start_time]


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Whether agent or guard live, as on the same start of the same machine; if not, what lives without them."""
    is_same = request["machine"] == procs.name_machine()
    is_watched = is_same and any(procs.is_same_alive(pid, start_time) for pid, start_time in request["pids"])
    return {"is_watched": is_watched, "num_left": 0 if is_watched else len(procs.find_ours(request["token"]))}


def end(request: dict[str, Any]) -> dict[str, Any]:
    """The notice is written first: the agent says it for its reason."""
    if row := request.get("notice"):
        write_notice(Path(row["path"]), Notice("", row["reason"], row["is_forced"]))
    if request["machine"] == procs.name_machine():
        for pid, start_time in request["pids"]:
            procs.send_signal(procs.Proc(pid, 0, start_time, False), request["signum"])
    return {}


def owner(request: dict[str, Any]) -> dict[str, Any]:
    if request["machine"] == procs.name_machine():
        for pid, start_time in request["pids"]:
            uid = Path(f"/proc/{pid}").stat().st_uid if procs.is_same_alive(pid, start_time) else os.geteuid()
            if os.geteuid() not in (0, uid):
                return {"owner": procs.name_user(uid)}
    return {"owner": None}


def clean(request: dict[str, Any]) -> dict[str, Any]:
    return {"num_left": procs.end_leftovers(request["token"], request["grace_s"])}


# --- a host with a folder of its own ---------------------------------------------------------------------------------


def place(request: dict[str, Any]) -> dict[str, Any]:
    """All files and folders, or none."""
    files = [NewFile(Path(path), base64.b64decode(data), mode) for path, data, mode in request["files"]]
    try:
        written = write_all(files, list(map(Path, request["folders"])))
    except FlagScaleError as error:
        return {"fault": str(error), "is_user": isinstance(error, UserError)}
    return {"files": list(map(str, written.files)), "folders": list(map(str, written.folders))}


def unplace(request: dict[str, Any]) -> dict[str, Any]:
    Written(tuple(map(Path, request["files"])), tuple(map(Path, request["folders"]))).undo()
    return {}


def report(request: dict[str, Any]) -> dict[str, Any]:
    """How this host's part of a run does, with what its journal holds beyond `offset`."""
    journal, is_watched = _read_watched(Path(request["events"]))
    events = parse_events(journal)
    started, ended = (_find_last(events, kind) for kind in ("agent_started", "job_ended"))
    tails = {request["output"]: read_tail(Path(request["output"]), started.get("output_start", 0), None, TAIL_BYTES)}
    source = ended.get("source")
    if source and source not in tails:
        tails[source] = read_tail(Path(source), window=TAIL_BYTES)
    try:
        age = max(0.0, time.time() - Path(request["heartbeat"]).stat().st_mtime)
    except OSError:
        age = None
    num_left = 0 if is_watched else len(procs.find_ours(request["token"]))
    told = {"events": journal[request["offset"] :].decode("latin-1"), "beat_age_s": age, "tails": tails}
    return {"is_watched": is_watched, "num_left": num_left, **told}


def _read_watched(path: Path) -> tuple[bytes, bool]:
    """A journal, and whether the watchers that it names live; of those who do not, with their last words."""
    journal = read_journal(path)
    while True:
        watchers = _list_watchers(parse_events(journal))
        if any(procs.is_same_alive(*pair) for pair in watchers):
            return journal, True
        # they may have written and left meanwhile, or others may have come
        journal = read_journal(path)
        if _list_watchers(parse_events(journal)) == watchers:
            return journal, False


def _find_last(events: tuple[dict[str, Any], ...], kind: str) -> dict[str, Any]:
    return next((event for event in reversed(events) if event["event"] == kind), {})


def read(request: dict[str, Any]) -> dict[str, Any]:
    """A part of a file, of at most 4 MiB; `is_all` once nothing is left up to `end`, or up to the file's end."""
    start, stop = request["start"], request["end"]
    try:
        with Path(request["path"]).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            stop = size if stop is None else min(stop, size)
            file.seek(start)
            data = file.read(max(0, min(stop - start, CHUNK_BYTES)))
    except OSError as error:
        return {"fault": error.strerror, "data": "", "size": 0, "is_all": True}
    coded = base64.b64encode(zlib.compress(data, 1)).decode()
    return {"data": coded, "size": len(data), "is_all": start + len(data) >= stop}


def ranks(request: dict[str, Any]) -> dict[str, Any]:
    return {"paths": list(map(str, find_rank_files(Path(request["details"]), request["local_rank"])))}


ERRANDS = {
    function.__name__: function
    for function in (check, start, ask, end, owner, clean, place, unplace, report, read, ranks)
}


def answer_errands(errands: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """One line of JSON for each, until there are no more."""
    for line in sys.stdin.buffer:
        request = json.loads(line)
        print(ANSWER + json.dumps(errands[request["errand"]](request)), flush=True)


def main() -> None:
    answer_errands(ERRANDS)
