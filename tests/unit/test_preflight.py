"""What `flagscale check` makes of the answers of hosts, and how it tells them."""

import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import host_plan, hosts, job_plan, process

from flagscale.cli import check as verb
from flagscale.errors import UserError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch import preflight
from flagscale.runner.launch.preflight import Finding, survey_hosts
from flagscale.runner.launch.reach import Links, Reply
from flagscale.runner.launch.survey import meet
from flagscale.runner.plan.job import HostPlan, JobPlan

FACTS: dict[str, Any] = {
    "free_bytes": 50 << 30,
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
    "trees": {"/src": ("upstream's files", "a")},
    "chip": "NVIDIA",
    "num_devices": 8,
    "models": ["A800"],
    "num_cpus": 64,
    "interfaces": {"lo": True, "eth0": True, "eth1": False, "docker0": True},
    "peer_interface": "eth0",
    "environ": {},
}


def make_plan(tmp_path: Path, num_hosts: int = 2, chip: str | None = "A800", **env: str) -> JobPlan:
    rows = tuple(
        HostPlan(host, rank, (process(env=tuple(env.items())),), peer="node1" if rank == 0 else "node0")
        for rank, host in enumerate(hosts(num_hosts, 8, chip))
    )
    return job_plan(*rows, exp_dir=str(tmp_path / "exp"), master_addr="node0")


def survey_faked(plan: JobPlan, monkeypatch: pytest.MonkeyPatch, **facts: dict[str, Any]) -> tuple[Finding, ...]:
    """With the facts of each host as given over those of a good one; `fault` in place of an answer, `faults` in it."""

    def call(_links: Links, errand: str, requests: Mapping[str, Any], _limit_s: float) -> dict[str, Reply]:
        import time

        found: dict[str, Reply] = {}
        for label in requests:
            own = dict(facts.get(label.rsplit("_", 1)[1], {}))
            fault, more = own.pop("fault", None), {name: own.pop(name, []) for name in ("faults", "notes")}
            told = {"time": time.time(), **FACTS, **own}
            answer = {**more, "port": 29500, "facts": told} if errand == "survey" else {"fault": None}
            found[label] = Reply({} if fault else answer, fault)
        return found

    monkeypatch.setattr(Links, "call", call)
    return survey_hosts(plan, {})


def wrong_of(findings: tuple[Finding, ...]) -> dict[tuple[str, str], str]:
    return {(finding.host, finding.check): finding.text for finding in findings if finding.kind != "ok"}


def test_hosts_that_are_as_they_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = survey_faked(make_plan(tmp_path), monkeypatch)
    assert wrong_of(findings) == {}
    shown = {finding.check: finding.text for finding in findings if finding.host == "node1"}
    assert shown == {
        **dict.fromkeys(("reach", "job", "clock"), "ok"),
        "disk": "50 GiB",
        "python": "3.11.7",
        "versions": "torch 2.13.0",
        "source": "upstream's files",
        "chips": "8 x A800",
        "network": "eth0",
        "port": "reaches node0",
    }
    assert {finding.check for finding in findings} == set(preflight.CHECKS)
    assert verb.exit_code_of(findings) == 0
    assert not (tmp_path / "exp").exists()


def test_everything_wrong_is_told_of_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = survey_faked(
        make_plan(tmp_path, 8),
        monkeypatch,
        node1={"fault": "cannot be reached: no route"},
        node2={"faults": [["user", "entry point x.py is missing"]], "free_bytes": 5 << 20},
        node3={"time": 1.0, "notes": ["not checked"]},
        node4={"python": "3.12.0", "versions": {"torch": None}},
        node5={"trees": {"/src": ("patched by a (f00)", "b")}},
        node6={"environ": {"NCCL_SOCKET_IFNAME": "ib0"}},
        node7={"peer_interface": None},
    )
    wrong = wrong_of(findings)
    assert set(wrong) == {
        *(("node1", "reach"), ("node2", "job"), ("node2", "disk"), ("node3", "clock"), ("node3", "chips")),
        *(("node4", "python"), ("node4", "versions"), ("node5", "source"), ("node6", "network"), ("node7", "network")),
    }
    assert wrong["node1", "reach"] == "cannot be reached: no route"
    assert "5 MiB are free" in wrong["node2", "disk"]
    assert "s behind the launcher's" in wrong["node3", "clock"]
    assert wrong["node3", "chips"] == "not checked"
    assert wrong["node4", "python"] == "has another python than node0: 3.12.0; expected 3.11.7"
    assert "torch missing; expected torch 2.13.0" in wrong["node4", "versions"]
    assert "patched by a (f00); expected upstream's files" in wrong["node5", "source"]
    assert wrong["node6", "network"].startswith("NCCL_SOCKET_IFNAME=ib0: there is no interface ib0; expected one of ")
    assert "no interface leads to node0" in wrong["node7", "network"]
    assert verb.exit_code_of(findings) == 1


def test_what_only_the_configuration_is_to_blame_for_is_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(make_plan(tmp_path), secrets=(("TOKEN", "NOT_SET_ANYWHERE"),))
    findings = survey_faked(plan, monkeypatch)
    assert [(finding.host, finding.kind) for finding in findings if finding.kind != "ok"] == [("launcher", "user")]
    assert verb.exit_code_of(findings) == 2


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        *(
            ("eth0", None),
            ("eth", None),
            ("=eth0", None),
            ("^docker,lo", None),
            ("eth1,eth0", "interface eth1 is down"),
        ),
        *(("=eth", "there is no interface eth"), ("", "there is no interface"), ("eth1", "interface eth1 is down")),
        ("eth0,ib0", "there is no interface ib0"),
    ],
)
def test_an_interface_that_is_named_must_be_there_and_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, wrong: str | None
) -> None:
    findings = survey_faked(make_plan(tmp_path, GLOO_SOCKET_IFNAME=value), monkeypatch)
    told = wrong_of(findings).get(("node1", "network"))
    assert (told is None) is (wrong is None)
    assert (wrong or "") in (told or "")


def test_a_note_is_told_and_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = {"chip": "Generic_CPU", "num_devices": 0}
    findings = survey_faked(make_plan(tmp_path), monkeypatch, node0=none, node1={"free_bytes": 70 << 20})
    assert [finding.text for finding in findings if (finding.host, finding.check) == ("node0", "chips")] == ["64 cores"]
    assert verb.exit_code_of(findings) == 0
    verb.print_table(findings)
    assert capsys.readouterr().out.splitlines()[-1].startswith("node1: note: only 70 MiB are free for ")


def test_hosts_that_a_scheduler_will_choose_cannot_be_asked(tmp_path: Path) -> None:
    row = host_plan(process(), host=Host("node0", 8, is_placeholder=True))
    with pytest.raises(UserError, match="none can be asked before"):
        survey_hosts(job_plan(row, exp_dir=str(tmp_path / "exp"), launcher="slurm"), {})
    assert not (tmp_path / "exp").exists()


def test_this_machine_is_asked_without_ssh(tmp_path: Path) -> None:
    alone = job_plan(
        host_plan(process(argv=("true",), cwd=str(tmp_path), entrypoint=None)), exp_dir=str(tmp_path / "e")
    )
    alone = replace(alone, log_dir=str(tmp_path / "e" / "logs"))
    findings = survey_hosts(alone, os.environ)
    assert wrong_of(findings) == {}
    assert {finding.check for finding in findings} == set(preflight.CHECKS)
    assert not (tmp_path / "e").exists()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_those_who_meet_need_not_come_in_order() -> None:
    request = {"address": "127.0.0.1", "port": free_port(), "num_hosts": 3, "limit_s": 20}
    told: list[dict[str, Any]] = []
    ends = [
        threading.Thread(target=lambda is_head=is_head: told.append(meet({**request, "is_head": is_head})))
        for is_head in (False, False, True)
    ]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    assert told == [{"fault": None}] * 3


def test_whom_nobody_meets_says_so() -> None:
    request = {"address": "127.0.0.1", "port": free_port(), "num_hosts": 2, "limit_s": 0.3, "is_head": False}
    assert "where ranks meet: Connection refused" in meet(request)["fault"]
    assert "where ranks meet" in meet({**request, "address": "no-such-name.invalid"})["fault"]
    with socket.create_server(("", request["port"])):
        assert "cannot listen on port" in meet({**request, "is_head": True})["fault"]
    assert meet({**request, "is_head": True}) == {"fault": None}


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, str, list[str]]] = []
    rows = (Finding("h1", "reach", "ok", "ok"), Finding("h2", "reach", "launch", "cannot [be] reached"))
    monkeypatch.setattr(verb, "compose", lambda *words: asked.append(words))
    monkeypatch.setattr(verb, "plan", lambda _: type("Job", (), {"plan": None}))
    monkeypatch.setattr(preflight, "survey_hosts", lambda *_: rows)
    assert verb.main(["train", "tiny", "a.b=1"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["host", *preflight.CHECKS]
    assert [line.split() for line in table[1:3]] == [["h1", "ok"], ["h2", "fault"]]
    assert table[3] == "h2: cannot [be] reached"
    assert verb.main(["tiny", "--json"]) == 1
    assert [row["host"] for row in json.loads(capsys.readouterr().out)["findings"]] == ["h1", "h2"]
    verb.main(["run", "tiny", "--task", "serve", "other.yaml", "a=2"])
    verb.main(["serve"])
    assert asked == [
        ("tiny", "train", ["a.b=1"]),
        ("tiny", "train", []),
        ("other.yaml", "serve", ["a=2"]),
        ("serve", "train", []),
    ]
