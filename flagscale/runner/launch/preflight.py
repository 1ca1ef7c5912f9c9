"""Everything that can be known to be wrong before a job starts, of all its hosts at once: `flagscale check`.

The questions of a launch are asked as a launch asks them (`errands.check`), and some more that take longer, or that
only warn (`survey.py`). Then the head host listens and all others connect to it, as ranks will. Every answer becomes a
finding of one host and one check; nothing is raised and nothing stays written.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flagscale.chips.records import CHIPS, GLOO_INTERFACE, find_chip
from flagscale.errors import UserError
from flagscale.runner.launch.checks import gather_secrets
from flagscale.runner.launch.files import make_folder, remove_folders
from flagscale.runner.launch.folder import list_remotes
from flagscale.runner.launch.patches import expect_patches
from flagscale.runner.launch.reach import Links, Reply
from flagscale.runner.launch.ssh import CHECK_LIMIT_S, make_requests
from flagscale.runner.launch.survey import meet, survey
from flagscale.runner.plan.job import HostPlan, JobPlan

CHECKS = ("reach", "job", "clock", "disk", "python", "versions", "source", "chips", "network", "port")
FEW_FREE_BYTES = 5 << 30
MOST_SKEW_S = 5.0
MEETING_LIMIT_S = 10.0
DISTRIBUTIONS = {
    "megatron": ("torch", "numpy"),
    "vllm": ("vllm", "torch"),
    "sglang": ("sglang", "torch"),
    "llama_cpp": (),
    "verl": ("verl", "vllm", "torch"),
}

Kind = Literal["ok", "note", "user", "launch"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found on a host.

    kind: ok; note: worth a look, and no launch is refused for it; user: what was written cannot be right; launch:
        something of the host
    text: what was found, or what is wrong with it
    """

    host: str
    check: str
    kind: Kind
    text: str


def survey_hosts(plan: JobPlan, env: Mapping[str, str]) -> tuple[Finding, ...]:
    """Ask all hosts of a plan everything, and hold their answers against the plan and against each other.

    env: the launcher's, from which the job takes its secrets

    Raises:
        UserError: a scheduler chooses the hosts, so that nobody can be asked.
        UserError, LaunchError: the experiment folder cannot be written on this machine.
    """
    if any(host.host.is_placeholder for host in plan.hosts):
        raise UserError(
            f"experiment.runner.type: with {plan.launcher} hosts are chosen at the start; none can be asked before"
        )
    made = make_folder(Path(plan.exp_dir) / "runs")
    try:
        with Links(list_remotes(plan), plan.accept_new_host_keys, module="survey") as links:
            replies, spans = _ask_all(plan, links)
            findings = [finding for host in plan.hosts for finding in _judge(plan, host, replies[host.label], spans)]
            findings += _compare(plan, replies)
            findings += _let_meet(plan, links, replies)
    finally:
        remove_folders(made)
    try:
        gather_secrets(plan, env)
    except UserError as error:
        findings.append(Finding("launcher", "job", "user", str(error)))
    return tuple(findings)


Spans = dict[str, tuple[float, float]]
"""label -> when a host was asked, and when it had answered, by this machine's clock"""


def _ask_all(plan: JobPlan, links: Links) -> tuple[dict[str, Reply], Spans]:
    more = {"distributions": DISTRIBUTIONS.get(plan.backend, ("torch",)), "variables": list_variables()}
    with make_requests(plan, expect_patches(plan)) as requests:
        full = {label: request | more for label, request in requests.items()}
        rows = links.each(full, lambda label: (time.time(), _ask(links, label, full[label], survey), time.time()))
    return {label: row[1] for label, row in rows.items()}, {label: (row[0], row[2]) for label, row in rows.items()}


def _ask(
    links: Links, label: str, request: dict[str, Any], errand: Callable[[dict[str, Any]], dict[str, Any]]
) -> Reply:
    """An errand on a host, which may be this machine."""
    if label in links.remotes:
        return links.call(errand.__name__, {label: request}, CHECK_LIMIT_S)[label]
    return Reply(json.loads(json.dumps(errand(request))))


def list_variables() -> tuple[str, ...]:
    """Of all chips: those that name a network interface."""
    return tuple(dict.fromkeys(name for chip in CHIPS for name in chip.interfaces))


def _judge(plan: JobPlan, host: HostPlan, reply: Reply, spans: Spans) -> Iterator[Finding]:
    """What one host's answer says by itself."""
    name = host.host.name
    if reply.fault:
        yield Finding(name, "reach", "launch", reply.fault)
        return
    yield Finding(name, "reach", "ok", "ok")
    answer, facts = reply.answer, reply.answer["facts"]
    yield from (Finding(name, "job", kind, text) for kind, text in answer["faults"])
    if not answer["faults"]:
        yield Finding(name, "job", "ok", "ok")
    yield Finding(name, "disk", *_judge_disk(plan, facts["free_bytes"]))
    yield Finding(name, "chips", *(("note", answer["notes"][0]) if answer["notes"] else ("ok", _name_chips(facts))))
    for check, (text, wrong) in {
        "clock": _judge_clock(facts["time"], spans[host.label]),
        "network": _judge_network(host, facts),
    }.items():
        yield Finding(name, check, "launch" if wrong else "ok", wrong or text)


Verdict = tuple[str, str | None]
"""(what was found, what is wrong with it)"""


def _judge_clock(said: float, span: tuple[float, float]) -> Verdict:
    """Of the host's time only what lies outside the time of asking is known to be wrong."""
    skew_s = max(span[0] - said, said - span[1], 0.0)
    side = "behind" if said < span[0] else "ahead of"
    wrong = f"its clock is {skew_s:.0f} s {side} the launcher's; logs and checkpoints would bear times that do not fit"
    return "ok" if skew_s < 1 else f"{skew_s:.0f} s off", wrong if skew_s > MOST_SKEW_S else None


def _judge_disk(plan: JobPlan, free_bytes: int) -> tuple[Kind, str]:
    if free_bytes < FEW_FREE_BYTES:
        return "note", f"only {free_bytes >> 20} MiB are free for {plan.exp_dir}; checkpoints and logs go there"
    return "ok", f"{free_bytes >> 30} GiB"


def _name_chips(facts: Mapping[str, Any]) -> str:
    if not facts["num_devices"]:
        return f"{facts['num_cpus']} cores"
    return f"{facts['num_devices']} x {', '.join(facts['models']) or facts['chip']}"


def _judge_network(host: HostPlan, facts: Mapping[str, Any]) -> Verdict:
    """The interfaces that collectives are told to use: there, and up."""
    chip = find_chip(host.host.chip) if host.host.chip else None
    names = chip.interfaces if chip else (GLOO_INTERFACE,)
    there: dict[str, bool] = facts["interfaces"]
    given = {**facts["environ"], **{key: str(value) for item in host.processes for key, value in item.env}}
    wrong = [
        f"{name}={given[name]}: {fault}"
        for name in names
        if name in given and (fault := _find_fault(given[name], there))
    ]
    told = dict.fromkeys(given[name] for name in names if name in given)
    if len(told) < len(names) and host.peer:
        if facts["peer_interface"] is None:
            wrong.append(f"no interface leads to {host.peer}: its name is not known, or there is no route")
        told |= {facts["peer_interface"] or "?": None}
    return ", ".join(told) or "-", "; ".join(wrong) or None


def _find_fault(value: str, there: Mapping[str, bool]) -> str | None:
    """`eth0`, `eth0,eth1`, a prefix (`eth`), just one (`=eth0`), all but (`^docker`): as NCCL and its kin read it."""
    if value.startswith("^"):
        return None
    known = f"expected one of {', '.join(sorted(there))}"
    for word in value.removeprefix("=").split(","):
        exact = [word] if word in there else []
        meant = exact or ([] if value.startswith("=") else [name for name in there if word and name.startswith(word)])
        if not meant:
            return f"there is no interface {word}; {known}"
        if not any(there[name] for name in meant):
            return f"interface {word} is down"
    return None


def _compare(plan: JobPlan, replies: Mapping[str, Reply]) -> Iterator[Finding]:
    """What must be the same on all hosts; what most of them have is taken for right."""
    rows = {host.host.name: replies[host.label].answer for host in plan.hosts if not replies[host.label].fault}
    facts = {name: answer["facts"] for name, answer in rows.items()}
    for check, shown in {
        "python": {name: (row["python"], row["python"]) for name, row in facts.items()},
        "versions": {name: (_join_versions(row["versions"]),) * 2 for name, row in facts.items()},
        "source": {name: (_join_trees(row["trees"], 0), _join_trees(row["trees"], 1)) for name, row in facts.items()},
    }.items():
        yield from _compare_texts(check, shown)


def _compare_texts(check: str, shown: Mapping[str, tuple[str, str]]) -> Iterator[Finding]:
    """shown: host -> (words for people, what must be the same)"""
    counts = Counter(identity for _, identity in shown.values())
    usual = counts.most_common(1)[0][0] if counts else ""
    model, what = next(((name, text) for name, (text, identity) in shown.items() if identity == usual), ("", ""))
    for name, (text, identity) in shown.items():
        wrong = f"has another {check} than {model}: {text}; expected {what}"
        yield Finding(name, check, "ok", text) if identity == usual else Finding(name, check, "launch", wrong)


def _join_versions(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()) or "-"


def _join_trees(trees: Mapping[str, Sequence[str]], column: int) -> str:
    return "; ".join(dict.fromkeys(tree[column] for tree in trees.values())) or "-"


def _let_meet(plan: JobPlan, links: Links, replies: Mapping[str, Reply]) -> Iterator[Finding]:
    """Whether the port is free where ranks meet, and the others reach it."""
    head = plan.hosts[0]
    port = None if replies[head.label].fault else replies[head.label].answer["port"]
    if port is None:
        return
    guests = [host for host in plan.hosts[1:] if host.peer and not replies[host.label].fault]
    request = {"address": plan.master_addr, "port": port, "num_hosts": len(guests) + 1, "limit_s": MEETING_LIMIT_S}
    requests = {host.label: {**request, "is_head": host is head} for host in (head, *guests)} if guests else {}
    told = links.each(requests, lambda label: _ask(links, label, requests[label], meet))
    for host in (head, *guests):
        reply = told.get(host.label, Reply({"fault": None}))
        wrong = reply.fault or reply.answer["fault"]
        text = f"{port} is free" if host is head else f"reaches {plan.master_addr}"
        yield Finding(host.host.name, "port", "launch" if wrong else "ok", wrong or text)
