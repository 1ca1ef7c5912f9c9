"""The SSH launcher's parts that need no other machine."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import SITE, hosts
from test_peers import make_spec
from test_plan_train import plan_on
from test_state import ENDED, RUN_ID, UP, VALUES, agent_started, folder, write_all

from flagscale.errors import ConfigError, LaunchError, RunError, UserError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch import errands, procs, reach
from flagscale.runner.launch.archive import ERRANDS, build_archive
from flagscale.runner.launch.connection import LinkError, ProgramEndedError, open_connection
from flagscale.runner.launch.folder import Remote, RunRef, find_neighbour, list_remotes, load_ref, ref_of
from flagscale.runner.launch.record import Answer, HostRecord, order_by_cause
from flagscale.runner.launch.ssh import Ready, check_hosts, describe_faults
from flagscale.runner.launch.startup import check_alive
from flagscale.runner.monitor.state import query_run
from flagscale.runner.monitor.stop import check_owners
from flagscale.runner.plan.job import HostPlan, JobPlan, ProcessSpec, decode_plan, encode_plan

paramiko = pytest.importorskip("paramiko")

from flagscale.runner.launch import link  # noqa: E402


def make_plan(base: Path, *hosts: Host, first_ranks: tuple[int, ...] = (0, 1, 2), **fields: Any) -> JobPlan:
    rows = tuple(
        HostPlan(host, number, (ProcessSpec("main", ("true",), "/", num_ranks=1, first_rank=first_ranks[number]),))
        for number, host in enumerate(hosts)
    )
    exp_dir = base / "exp"
    return JobPlan("train", "megatron", "small", str(exp_dir), str(exp_dir / "logs"), rows, **fields)


TWO = (Host("a", 1), Host("b", 1, user="u", port=2200))

# --- who is where ----------------------------------------------------------------------------------------------------


def test_hosts_of_a_plan_are_kept_with_the_run(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, *TWO, Host("localhost", 1), ssh_port=22)
    run = write_run(plan, {})
    expected = (
        Remote("host_0_a", "a", None, None, sys.executable),
        Remote("host_1_b", "b", "u", 2200, sys.executable),
    )
    assert list_remotes(plan) == expected
    assert load_ref(tmp_path / "exp", RUN_ID) == run
    assert run.remotes == expected
    assert list_remotes(replace(plan, ssh_port=2222))[0].port == 2222
    assert list_remotes(replace(plan, ssh_port=2222))[1].port == 2200
    assert [str(remote) for remote in expected] == ["a", "u@b"]


def test_plans_of_earlier_runs_are_read_without_the_new_fields(tmp_path: Path) -> None:
    row = encode_plan(make_plan(tmp_path, *TWO))
    del row["ssh_port"], row["accept_new_host_keys"]
    assert decode_plan(row).accept_new_host_keys is False


def test_neighbours_go_around_and_hosts_apart_have_none(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, *TWO, Host("c", 1))
    assert [find_neighbour(plan, host) for host in plan.hosts] == ["host_1_b", "host_2_c", "host_0_a"]
    alone = make_plan(tmp_path, Host("a", 1))
    assert find_neighbour(alone, alone.hosts[0]) == ""
    per_node = make_plan(tmp_path, *TWO, first_ranks=(0, 0))
    assert [find_neighbour(per_node, host) for host in per_node.hosts] == ["", ""]


CONFIG = """
Host b
  HostName 10.0.0.9
  User carol
  Port 2022
  IdentityFile ~/.ssh/special
Host inner
  ProxyJump u@gate:99
"""


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        (Remote("l", "b", None, None, "p"), "carol@10.0.0.9:2022"),
        (Remote("l", "b", "dave", 23, "p"), "dave@10.0.0.9:23"),
        (Remote("l", "c", "dave", None, "p"), "dave@c"),
    ],
)
def test_the_hostfile_goes_over_the_ssh_configuration(tmp_path: Path, remote: Remote, expected: str) -> None:
    path = tmp_path / "config"
    path.write_text(CONFIG)
    route = link.find_route(remote, path)
    assert str(route) == expected
    assert bool(route.key_files) is (remote.name == "b")


def test_jump_hosts_and_known_hosts_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(CONFIG + f"Host *\n  UserKnownHostsFile {tmp_path}/known\n")
    route = link.find_route(Remote("l", "inner", "u", None, "p"), path)
    assert route.proxy == "ssh -W inner:22 ssh://u@gate:99"
    assert route.known_hosts == tmp_path / "known"
    assert link._through_jump("a,b,c", "h:1") == "ssh -J a,b -W h:1 ssh://c"


def test_a_new_key_is_one_line_more_and_nothing_else(tmp_path: Path) -> None:
    known = tmp_path / "ssh" / "known_hosts"
    key = paramiko.ECDSAKey.generate()
    with pytest.raises(paramiko.SSHException, match="SHA256:"):
        link._KeyPolicy(known, False).missing_host_key(paramiko.SSHClient(), "h", key)
    assert not known.exists()
    link._KeyPolicy(known, True).missing_host_key(paramiko.SSHClient(), "h", key)
    link._KeyPolicy(known, True).missing_host_key(paramiko.SSHClient(), "[h]:2", key)
    assert [line.split()[0] for line in known.read_text().splitlines()] == ["h", "[h]:2"]
    assert stat.S_IMODE(known.parent.stat().st_mode) == 0o700


def test_a_host_that_nobody_knows_is_one_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with reach.Links([Remote("l", "127.0.0.1", "u", 1, "p")], limit_s=5) as links:
        assert links.call("ask", {"l": {}})["l"].fault == "cannot be reached: Connection refused (u@127.0.0.1:1)"
        assert links.call("ask", {}) == {}


# --- errands ---------------------------------------------------------------------------------------------------------


def send_errand(**request: Any) -> dict[str, Any]:
    """As a host runs it: the archive and one line on standard input, nothing of this package on the path."""
    archive = build_archive(ERRANDS)
    text = f"{len(archive)}\n".encode() + archive + json.dumps(request).encode() + b"\n"
    boot = errands.BOOT.format(module="errands")
    done = subprocess.run([sys.executable, "-I", "-c", boot], input=text, capture_output=True, cwd="/")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.decode().removeprefix(errands.ANSWER))
    return answer


def check_request(plan: JobPlan, path: Path, nonce: str, is_head: bool = True) -> dict[str, Any]:
    alone = replace(plan, hosts=plan.hosts[:1])
    return {"plan": encode_plan(alone), "nonce_path": str(path), "nonce": nonce, "is_head": is_head, "patches": {}}


def test_a_host_checks_its_part_of_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "nonce"
    path.write_text("n")
    plan = make_plan(tmp_path, *TWO)
    answer = send_errand(errand="check", **check_request(plan, path, "n"))
    assert answer["faults"] == []
    assert 1024 < answer["port"] < 65536
    assert sorted(tmp_path.iterdir()) == [path]
    wrong = errands.check(check_request(plan, path, "other", is_head=False))
    assert (wrong["port"], [kind for kind, _ in wrong["faults"]]) == (None, ["user"])
    assert "another" in wrong["faults"][0][1]
    missing = errands.check(check_request(plan, tmp_path / "no" / "nonce", "n", is_head=False))
    assert "does not see the experiment folder" in missing["faults"][0][1]


def test_a_host_tells_all_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "nonce"
    path.write_text("n")
    process = ProcessSpec("main", ("nosuchprogram", "x.py"), "/", entrypoint="x.py")
    plan = replace(make_plan(tmp_path, *TWO), hosts=(HostPlan(TWO[0], 0, (process,)),))
    faults = errands.check(check_request(plan, path, "n"))["faults"]
    assert [kind for kind, _ in faults] == ["user"]
    assert "program `nosuchprogram` is not on the PATH" in faults[0][1]
    assert "entry point /x.py is missing" in faults[0][1]


def test_a_host_tells_who_watches_and_ends_whom_it_is_asked_to() -> None:
    token = "token-of-test-ssh"
    with subprocess.Popen(["sleep", "600"], env={**os.environ, procs.TOKEN: token}) as child:
        proc = procs.find_proc(child.pid)
        assert proc
        who = {"machine": procs.name_machine(), "pids": [[child.pid, proc.start_time]], "token": token}
        assert send_errand(errand="ask", **who) == {"is_watched": True, "num_left": 0}
        gone = {**who, "pids": [[child.pid, proc.start_time + 1]]}
        assert errands.ask(gone) == {"is_watched": False, "num_left": 1}
        assert errands.ask({**who, "machine": "another start"}) == {"is_watched": False, "num_left": 1}
        errands.end({**who, "machine": "another start", "signum": 9})
        assert child.poll() is None
        errands.end({**who, "signum": 15})
        assert child.wait(10) == -15
    assert errands.clean({"token": token, "grace_s": 0}) == {"num_left": 0}


# --- what is told ----------------------------------------------------------------------------------------------------


def test_every_fault_of_every_host_is_in_one_table() -> None:
    text = describe_faults([("a", "one\ntwo"), ("longer", "three"), ("a", "four")], 3)
    assert text.splitlines() == [
        "2 of 3 hosts cannot take part; nothing was started",
        "  a       one",
        "          two",
        "  longer  three",
        "  a       four",
    ]


class FakeLinks:
    def __init__(self, plan: JobPlan, **replies: reach.Reply) -> None:
        self.remotes = {remote.label: remote for remote in list_remotes(plan)}
        self.replies = {self.label_of(name): reply for name, reply in replies.items()}

    def label_of(self, name: str) -> str:
        return next(label for label, remote in self.remotes.items() if remote.name == name)

    def call(self, _errand: str, requests: dict[str, Any], _limit_s: float) -> dict[str, reach.Reply]:
        assert set(requests) == set(self.replies)
        return self.replies


def test_the_port_is_the_head_host_s_and_faults_have_their_class(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, *TWO)
    (tmp_path / "exp").mkdir()
    good = {
        "a": reach.Reply({"faults": [], "port": 4321, "is_shared": True, "notes": []}),
        "b": reach.Reply({"faults": [], "port": None, "is_shared": True, "notes": []}),
    }
    assert check_hosts(plan, FakeLinks(plan, **good), {}) == Ready(4321, frozenset())  # type: ignore[arg-type]
    user = reach.Reply({"faults": [["user", "no entry point"]], "port": None, "is_shared": True, "notes": []})
    with pytest.raises(UserError, match="1 of 2 hosts cannot take part"):
        check_hosts(plan, FakeLinks(plan, **{**good, "b": user}), {})  # type: ignore[arg-type]
    silent = reach.Reply({}, "cannot be reached")
    with pytest.raises(LaunchError, match="2 of 2 hosts"):
        check_hosts(plan, FakeLinks(plan, a=silent, b=user), {})  # type: ignore[arg-type]
    assert list((tmp_path / "exp" / "runs").iterdir()) == []


# --- judging ---------------------------------------------------------------------------------------------------------


def write_run(plan: JobPlan, events: dict[str, list[dict[str, Any]]]) -> RunRef:
    base = Path(plan.exp_dir).parent
    files = folder.list_files(plan, RUN_ID, VALUES, folder.describe_job(plan, RUN_ID, VALUES, {}, []), 1.0)
    write_all([file for file in files if base in file.path.parents], folder.list_folders(plan, RUN_ID))
    run = ref_of(plan, RUN_ID)
    for label, rows in events.items():
        lines = [json.dumps({"time": 100.0 + n, "host": label, **row}) + "\n" for n, row in enumerate(rows)]
        Path(run.load_spec(label).events).write_text("".join(lines))
        Path(run.load_spec(label).heartbeat).touch()
    return run


def died(rank: int, **how: Any) -> dict[str, Any]:
    return {"event": "rank_exited", "rank": rank, "exit_code": None, "signal": None, "first": True, "pid": 1, **how}


def ended(outcome: str, reason: str, time: float) -> list[dict[str, Any]]:
    stopping = {"event": "stopping", "outcome": outcome, "by": reason, "time": time}
    return [stopping, {**ENDED, "outcome": outcome, "reason": reason, "exit_code": 1, "time": time + 2}]


def write_two(base: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> RunRef:
    """A run on two other machines, with what their agents wrote after their start."""
    away = agent_started(True, "elsewhere")
    return write_run(make_plan(base, *TWO), {"host_0_a": [away, *first], "host_1_b": [away, *second]})


def test_of_two_hosts_that_failed_the_cause_is_named(tmp_path: Path) -> None:
    first = [died(0, exit_code=1), *ended("failed", "rank 0 ended with exit code 1", 200.0)]
    run = write_two(tmp_path, first, [died(1, signal="SIGKILL"), *ended("failed", "rank 1 died of SIGKILL", 201.0)])
    state = query_run(run)
    assert (state.state, state.reason) == ("failed", "host_1_b: rank 1 died of SIGKILL")
    assert [rank.is_first_failure for rank in state.ranks] == [False, True]
    with pytest.raises(LaunchError, match="did not start on host_1_b: rank 1 died of SIGKILL"):
        check_alive(run, reach.load_true_records(run), False)


def test_a_rank_of_a_host_that_was_stopped_is_no_first_failure(tmp_path: Path) -> None:
    first = [died(0, exit_code=1), *ended("stopped", "another host failed", 201.0)]
    run = write_two(tmp_path, first, [died(1, signal="SIGKILL"), *ended("failed", "rank 1 died of SIGKILL", 200.0)])
    assert [rank.is_first_failure for rank in query_run(run).ranks] == [False, True]


def test_a_host_whose_watchers_were_killed_is_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(_self: reach.Links, _errand: str, requests: dict[str, Any], _limit_s: float = 1) -> dict[str, reach.Reply]:
        return dict.fromkeys(requests, reach.Reply({"is_watched": False, "num_left": 0}))

    monkeypatch.setattr(reach.Links, "call", call)
    monkeypatch.setattr(
        reach.Links, "run_all", lambda _self, commands, _limit_s: dict.fromkeys(commands, reach.Reply({}))
    )
    away = agent_started(True, "elsewhere")
    run = write_run(
        make_plan(tmp_path, *TWO),
        {
            "host_0_a": [away, died(0, exit_code=1), *ended("failed", "rank 0 ended with exit code 1", 200.0)],
            "host_1_b": [away],
        },
    )
    state = query_run(run)
    assert [host.state for host in state.hosts] == ["failed", "lost"]
    assert state.state == "lost"
    assert (state.reason or "").startswith("host_1_b: ")


def record_of(base: Path, label: str, events: list[dict[str, Any]]) -> HostRecord:
    return HostRecord(make_spec(base, label), tuple({"time": 1.0, **event} for event in events), False, False, None)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ended("failed", "x", 9.0), ended("stopped", "y", 1.0)),
        (ended("lost", "x", 9.0), ended("stopped", "y", 1.0)),
        (ended("failed", "x", 1.0), ended("failed", "y", 2.0)),
        (
            [died(0, signal="SIGSEGV"), *ended("failed", "x", 5.0)],
            [died(1, signal="SIGABRT"), *ended("failed", "y", 1.0)],
        ),
        (ended("failed", "x", 1.0), [died(1, signal="SIGKILL"), *ended("failed", "y", 60.0)]),
        (ended("lost", "x", 9.0), ended("failed", "y", 1.0)),
        (ended("failed", "x", 1.0), ended("lost", "y", 60.0)),
        ([agent_started(True, "elsewhere")], [died(1, exit_code=1), *ended("failed", "y", 1.0)]),
        (ended("succeeded", "x", 1.0), []),
    ],
)
def test_the_cause_goes_first_in_any_order(
    tmp_path: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    records = [record_of(tmp_path, "host_0_a", first), record_of(tmp_path, "host_1_b", second)]
    assert [record.label for record in order_by_cause(records)] == ["host_0_a", "host_1_b"]
    assert [record.label for record in order_by_cause(records[::-1])] == ["host_0_a", "host_1_b"]


@pytest.mark.parametrize(
    ("answer", "state", "reason"),
    [
        (Answer(True), "running", None),
        (Answer(False, 3), "running", "host_1_b: its agent and its guard were killed; 3 of its processes still live"),
        (
            Answer(unreachable="cannot be reached: no route"),
            "unreachable",
            "host_1_b: cannot be reached: no route; last",
        ),
    ],
)
def test_a_host_s_own_word_goes_over_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, state: str, reason: str | None
) -> None:
    away = agent_started(True, "elsewhere")
    up = [{**UP[0], "rank": rank} for rank in (0, 1)]
    run = write_run(make_plan(tmp_path, *TWO), {"host_0_a": [away, up[0]], "host_1_b": [away, up[1]]})
    asked: list[str] = []

    def call(_self: reach.Links, errand: str, requests: dict[str, Any], _limit_s: float = 1) -> dict[str, reach.Reply]:
        asked.extend(requests)
        assert errand == "ask"
        rows = {"host_0_a": Answer(True), "host_1_b": answer}
        return {
            label: reach.Reply({"is_watched": row.is_watched, "num_left": row.num_left}, row.unreachable)
            for label, row in rows.items()
        }

    monkeypatch.setattr(reach.Links, "call", call)
    monkeypatch.setattr(
        reach.Links, "run_all", lambda _self, commands, _limit_s: dict.fromkeys(commands, reach.Reply({}))
    )
    found = query_run(run)
    assert asked == ["host_0_a", "host_1_b"]
    assert found.state == state
    assert (reason or "") in (found.reason or "")
    assert found.num_leftovers == answer.num_left
    assert found.hosts[1].state == ("lost" if answer.num_left else state)


def test_a_finished_run_is_told_without_asking_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away, end = agent_started(True, "elsewhere"), {**ENDED, "outcome": "succeeded"}
    run = write_run(make_plan(tmp_path, *TWO), {"host_0_a": [away, end], "host_1_b": [away, end]})
    monkeypatch.setattr(reach, "Links", None)
    assert query_run(run).state == "succeeded"
    records = reach.load_records(run)
    assert not any(record.is_watched for record in records)


def test_a_launcher_notices_a_host_that_is_cut_off_for_long(tmp_path: Path) -> None:
    look = reach.Look(write_run(make_plan(tmp_path, *TWO), {}))
    assert look.find_cut_off() is None
    look.answers = {"host_1_b": Answer(unreachable="cannot be reached: no route")}
    look.silent_since = {"host_1_b": reach.time.monotonic()}
    assert look.find_cut_off() is None
    look.silent_since = {"host_1_b": reach.time.monotonic() - reach.CUT_OFF_AFTER_S - 1}
    assert look.find_cut_off() == "host_1_b cannot be reached: no route"


# --- interpreters, containers, owners --------------------------------------------------------------------------------


def test_each_host_has_the_interpreter_that_is_named_for_it(tmp_path: Path) -> None:
    named = {"node0": "/opt/py/bin/python3"}
    job = plan_on(tmp_path, hosts(2, 2), experiment__runner__python=named)
    assert [remote.python for remote in list_remotes(job)] == ["/opt/py/bin/python3", sys.executable]
    assert [host.processes[0].bin_dirs for host in job.hosts] == [("/opt/py/bin",), (SITE.bin_dir,)]
    with pytest.raises(ConfigError, match=r"experiment\.runner\.python\.nod: is no host of this job; did you mean"):
        plan_on(tmp_path, hosts(2, 2), experiment__runner__python={"nod": "python3"})


def test_a_container_is_entered_on_every_host_and_has_its_own_path(tmp_path: Path) -> None:
    listed = (Host("localhost", 2), Host("h2", 2))
    runner = {"docker": "box", "hostfile": "hostfile.txt", "master_addr": "me", "ssh_client": "openssh"}
    job = plan_on(tmp_path, listed, experiment__runner=runner)
    rows = list_remotes(job)
    assert [(remote.client, remote.container, remote.python) for remote in rows] == [
        ("local", "box", "python3"),
        ("openssh", "box", "python3"),
    ]
    assert [host.processes[0].bin_dirs for host in job.hosts] == [(), ()]
    assert rows[1].enter(["a b"]) == ["docker", "exec", "-i", "box", "a b"]
    for bad in ("-v", "a b", "$(x)"):
        with pytest.raises(ConfigError, match=r"experiment\.runner\.docker"):
            plan_on(tmp_path, listed, experiment__runner={**runner, "docker": bad})


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("Error response from daemon: No such container: box", "has no running container `box`"),
        ("bash: line 1: docker: command not found", "cannot run `docker`: bash"),
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "cannot run `docker`: Cannot connect"),
        ("OCI runtime exec failed: exec: python3: not found: docker", "has no python3 in its container `box`"),
    ],
)
def test_why_a_container_cannot_be_entered(told: str, expected: str) -> None:
    assert reach._explain_missing(Remote("l", "a", None, None, "python3", container="box"), told).startswith(expected)
    assert "has no interpreter python3" in reach._explain_missing(Remote("l", "a", None, None, "python3"), told)


def test_a_command_of_this_machine_is_a_connection_too() -> None:
    link = open_connection(Remote("l", "localhost", None, None, "p", client="local"), False, 1.0)
    assert link.run(["sh", "-c", "cat; echo x >&2; exit 3"], b"in", 10) == (3, b"in", b"x\n")
    assert link.run(["nosuchprogram"], b"", 10)[0] == 127
    with pytest.raises(LinkError, match="no answer within"):
        link.run(["sleep", "100"], b"", 0.1)
    link.close()


def test_a_program_is_asked_until_it_ends() -> None:
    link = open_connection(Remote("l", "localhost", None, None, "p", client="local"), False, 1.0)
    dialog = link.start(["cat"])
    long = b"x" * (1 << 20) + b"\n"  # more than a pipe holds
    assert [dialog.ask(text, 10) + b"\n" for text in (b"1\n", long, b"2\n")] == [b"1\n", long, b"2\n"]
    assert dialog.ask(b"3\n4\n", 10) == b"3"
    assert dialog.ask(b"", 10) == b"4"
    with pytest.raises(LinkError, match=r"this machine.*|no answer within 0\.1 s"):
        dialog.ask(b"no end of line", 0.1)
    dialog.close()
    dialog.close()
    for words, code, err in (
        (["sh", "-c", "echo why >&2; exit 3"], 3, b"why\n"),
        (["sh", "-c", "exec < /dev/null; sleep 0.1; exit 4"], 4, b""),
    ):
        asked = link.start(words)
        with pytest.raises(ProgramEndedError) as ended:
            asked.ask(long, 10)
        assert (ended.value.code, ended.value.err) == (code, err)
        asked.close()
    with pytest.raises(ProgramEndedError, match="127"):
        link.start(["nosuchprogram"])


def test_a_host_is_asked_by_one_python_and_by_another_when_that_has_ended(tmp_path: Path) -> None:
    started = tmp_path / "started"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho x >> {started}\necho Welcome; printf to:\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    request = {"l": {"machine": "elsewhere", "pids": [], "token": "nobody's"}}
    with reach.Links([Remote("l", "localhost", None, None, str(python), client="local")]) as links:
        answers = [links.call("ask", request)["l"] for _ in range(3)]
        assert answers == [reach.Reply({"is_watched": False, "num_left": 0})] * 3
        assert started.read_text() == "x\n"
        assert "KeyError: 'nosucherrand'" in (links.call("nosucherrand", request)["l"].fault or "")
        assert links.call("ask", request)["l"].answer["num_left"] == 0
        assert started.read_text() == "x\nx\n"
        python.write_text("#!/bin/sh\nsleep 100\n")
        links.dialogs.pop("l").close()
        assert "no answer within 0.3 s" in (links.call("ask", request, 0.3)["l"].fault or "")
        assert (links.dialogs, links.open) == ({}, {})


def test_known_hosts_are_read_once_and_anew_when_they_have_changed(tmp_path: Path) -> None:
    paramiko = pytest.importorskip("paramiko")
    from flagscale.runner.launch.link import _find_keys, _load_known_hosts

    path = tmp_path / "known_hosts"
    assert _find_keys(path, "a") == {}
    keys = [paramiko.ECDSAKey.generate() for _ in range(2)]
    lines = [f"{name} {key.get_name()} {key.get_base64()}\n" for name, key in zip(("a", "[b]:7"), keys, strict=True)]
    path.write_text(lines[0])
    _load_known_hosts.cache_clear()
    for _ in range(3):
        assert _find_keys(path, "a") == {keys[0].get_name(): keys[0]}
        assert _find_keys(path, "[b]:7") == {}
    assert _load_known_hosts.cache_info().misses == 1
    with path.open("a") as file:
        file.write(lines[1])
    assert _find_keys(path, "[b]:7") == {keys[1].get_name(): keys[1]}


@pytest.mark.skipif(os.geteuid() != 0, reason="another user needs root")
def test_a_run_of_another_user_is_named() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        proc = procs.find_proc(child.pid)
        assert proc
        who = {"machine": procs.name_machine(), "pids": [[proc.pid, proc.start_time]]}
        assert errands.owner(who) == {"owner": None}
        os.seteuid(65534)
        try:
            assert errands.owner(who) == {"owner": "root"}
            assert errands.owner({**who, "machine": "elsewhere"}) == {"owner": None}
            assert errands.owner({**who, "pids": [[proc.pid, proc.start_time + 1]]}) == {"owner": None}
        finally:
            os.seteuid(0)
            child.kill()


def test_a_stop_names_the_owner_on_another_machine(tmp_path: Path) -> None:
    run = write_run(make_plan(tmp_path, *TWO), {})
    records = reach.load_records(run)

    class Answers(FakeLinks):
        def call(self, errand: str, requests: dict[str, Any], _limit_s: float = 1.0) -> dict[str, reach.Reply]:
            assert errand == "owner"
            return super().call(errand, requests, _limit_s)

    links: Any = Answers(make_plan(tmp_path, *TWO), a=reach.Reply({"owner": None}), b=reach.Reply({"owner": "eve"}))
    with pytest.raises(RunError, match=r"belongs to eve on host_1_b, who alone may stop it"):
        check_owners(run, links, list(records))
