"""The agent as another machine would run it: from its archive, by a specification, with no launcher around it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from local_jobs import wait_for

from flagscale.runner.launch.archive import build_archive
from flagscale.runner.launch.journal import Entry, Spec, load_events
from flagscale.runner.launch.procs import end_leftovers, find_ours, is_same_alive, read_environ

Start = Callable[..., "Alone"]

# Starts `sys.argv[1]` ranks as torchrun does, each with a child of its own, and waits for them.
FAKE_TORCHRUN = """
import os, subprocess, sys
assert "RANK" not in os.environ and "LOCAL_RANK" not in os.environ
ranks = []
for local in range(int(sys.argv[1])):
    env = {**os.environ, "RANK": str(int(sys.argv[2]) + local), "LOCAL_RANK": str(local)}
    ranks.append(subprocess.Popen([sys.executable, "-c", sys.argv[3]], env=env))
sys.exit(max(rank.wait() for rank in ranks))
"""
RANK_WITH_CHILD = "import subprocess; subprocess.run(['sleep', '600'])"


class Alone:
    """One agent under test, and what it has told so far."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.spec, self.folder = spec, folder

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(load_events(Path(self.spec.events)))

    @property
    def output(self) -> str:
        return Path(self.spec.output).read_text()

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def wait(self, kind: str, count: int = 1) -> dict[str, Any]:
        found: list[dict[str, Any]] = wait_for(lambda: events if len(events := self.all(kind)) >= count else None)
        return found[-1]

    def signal(self, signum: int) -> None:
        os.kill(self.wait("agent_started")["pid"], signum)


def run_agent(folder: Path, spec: Spec, secrets: str = "{}\n", **env: str) -> "subprocess.CompletedProcess[str]":
    (folder / "agent.pyz").write_bytes(build_archive())
    (folder / "spec.json").write_text(json.dumps(asdict(spec)))
    argv = [sys.executable, "-I", str(folder / "agent.pyz"), str(folder / "spec.json")]
    return subprocess.run(argv, input=secrets, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    spec = make_spec(tmp_path)

    def start_agent(
        *scripts: str, num_ranks: int = 0, first_rank: int = 0, announces: bool = False, **fields: Any
    ) -> Alone:
        env = fields.pop("env", {})
        secrets = fields.pop("secrets", {})
        entries = []
        for number, text in enumerate(scripts):
            path = tmp_path / f"script_{number}.sh"
            path.write_text(text)
            entries.append(Entry(f"p{number}", str(path), num_ranks, first_rank, announces))
        told = replace(spec, processes=tuple(entries), **fields)
        done = run_agent(tmp_path, told, json.dumps(secrets) + "\n", **env)
        assert done.returncode == 0, done.stderr
        assert set(json.loads(done.stdout)) == {"agent", "guard"}
        return Alone(told, tmp_path)

    yield start_agent
    end_leftovers(spec.token, 0.0)


def make_spec(folder: Path) -> Spec:
    (folder / "ranks").mkdir()
    names = ("output", "pid_file", "events", "heartbeat", "agent_log", "stop_request")
    paths = {name: str(folder / name) for name in names}
    return Spec(
        run_id="20260101T000000-abcd",
        token=f"alone-{folder}",
        label="host_0_localhost",
        node_rank=0,
        processes=(),
        rank_dir=str(folder / "ranks"),
        details_dir=str(folder / "details"),
        cwd=str(folder),
        heartbeat_s=0.2,
        grace_s=5.0,
        **paths,
    )


def torchrun(num_ranks: int, first_rank: int = 0, code: str = RANK_WITH_CHILD) -> str:
    import shlex

    words = (sys.executable, "-c", FAKE_TORCHRUN, str(num_ranks), str(first_rank), code)
    return f"exec {shlex.join(words)}\n"


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_are_the_rank_processes_and_not_their_children(start: Start) -> None:
    alone = start(torchrun(3, 4), num_ranks=3, first_rank=4)
    alone.wait("rank_started", 3)
    alone.wait("rank_up", 3)
    started = alone.all("rank_started")
    assert sorted((event["rank"], event["local_rank"]) for event in started) == [(4, 0), (5, 1), (6, 2)]
    for event in started:
        assert is_same_alive(event["pid"], event["start_time"])
        assert read_environ(event["pid"])["RANK"] == str(event["rank"])
    assert len(find_ours(alone.spec.token)) == 1 + 3 + 3
    alone.signal(signal.SIGTERM)
    alone.wait("job_ended")
    assert len(alone.all("rank_started")) == 3
    assert find_ours(alone.spec.token) == []


def test_a_rank_of_another_host_s_numbers_is_none_of_ours(start: Start) -> None:
    alone = start(torchrun(2, 8), num_ranks=2, first_rank=0)
    alone.wait("process_up")
    assert alone.all("rank_started") == []
    alone.signal(signal.SIGUSR1)
    alone.wait("job_ended")


def test_a_rank_that_announces_is_up_when_it_says_so(start: Start) -> None:
    alone = start(torchrun(2), num_ranks=2, announces=True)
    alone.wait("rank_started", 2)
    alone.wait("process_up")  # after which a rank without an announcement would count as up
    assert alone.all("rank_up") == []
    (Path(alone.spec.rank_dir) / "rank_1.up").touch()
    assert alone.wait("rank_up")["rank"] == 1
    (Path(alone.spec.rank_dir) / "rank_0.up").touch()
    alone.wait("rank_up", 2)
    alone.signal(signal.SIGUSR1)
    alone.wait("job_ended")


def test_a_rank_started_anew_is_told_of_anew(start: Start) -> None:
    alone = start(torchrun(1, code="import time; time.sleep(600)"), num_ranks=1)
    first = alone.wait("rank_started")
    alone.signal(signal.SIGUSR1)
    alone.wait("job_ended")
    code = """
import os, sys, time
if not os.path.exists("again"):
    open("again", "w")
    time.sleep(1)
    sys.exit()
time.sleep(600)
"""
    restarting = f"cd {alone.folder}; {torchrun(1, code=code).replace('exec ', '')}{torchrun(1, code=code)}"
    other = start(restarting, num_ranks=1, events=str(alone.folder / "events2"))
    second = other.wait("rank_started", 2)
    assert len({first["pid"], second["pid"], other.all("rank_started")[0]["pid"]}) == 3
    other.signal(signal.SIGUSR1)
    other.wait("job_ended")


# --- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_leaves_time_to_save_and_sigusr1_none(start: Start) -> None:
    saving = "trap 'sleep 0.5; echo saved; exit 0' TERM; echo armed; while true; do sleep 0.1; done"
    alone = start(saving)
    wait_for(lambda: "armed" in alone.output)
    alone.signal(signal.SIGTERM)
    alone.signal(signal.SIGTERM)
    end = alone.wait("job_ended")
    assert (end["outcome"], end["exit_code"]) == ("stopped", 143)
    assert "saved" in alone.output
    assert len(alone.all("stopping")) == 1
    forced = start(saving, events=str(alone.folder / "events2"), output=str(alone.folder / "output2"))
    wait_for(lambda: "armed" in forced.output)
    forced.signal(signal.SIGTERM)
    forced.signal(signal.SIGUSR1)
    assert forced.wait("process_exited")["signal"] == "SIGKILL"
    assert forced.wait("job_ended")["outcome"] == "stopped"
    assert "saved" not in forced.output


def test_a_guard_passes_on_what_it_is_asked(start: Start) -> None:
    alone = start("exec sleep 600")
    os.kill(alone.wait("agent_started")["guard"], signal.SIGTERM)
    assert alone.wait("job_ended")["outcome"] == "stopped"


def test_hanging_up_harms_nothing(start: Start) -> None:
    alone = start("exec sleep 600")
    for pid in (alone.wait("agent_started")["pid"], alone.wait("agent_started")["guard"]):
        os.kill(pid, signal.SIGHUP)
    beat = Path(alone.spec.heartbeat)
    wait_for(beat.exists)
    first = json.loads(beat.read_text())["time"]
    wait_for(lambda: json.loads(beat.read_text())["time"] > first)
    assert alone.all("stopping") == []
    alone.signal(signal.SIGTERM)
    alone.wait("job_ended")


def test_who_asked_is_told(start: Start) -> None:
    alone = start("exec sleep 600")
    alone.signal(signal.SIGTERM)
    assert alone.wait("job_ended")["reason"] == f"stopped by SIGTERM from process {os.getpid()}"
    named = start("exec sleep 600", events=str(alone.folder / "events2"))
    Path(named.spec.stop_request).write_text('{"by": "someone on a laptop"}')
    named.signal(signal.SIGTERM)
    assert named.wait("job_ended")["reason"] == "stopped by someone on a laptop"


# --- the environment, the end ----------------------------------------------------------------------------------------


def test_what_the_job_is_given(start: Start, tmp_path: Path) -> None:
    env = {"RANK": "9", "LOCAL_RANK": "9", "OUTER": "kept", "FLAGSCALE_RUN_TOKEN": "of an outer job"}
    told = start(f"env -0 > {tmp_path}/environ", secrets={"KEY": "a b\n'c"}, env=env)
    end = told.wait("job_ended")
    assert end["outcome"] == "succeeded"
    pairs = dict(item.split("=", 1) for item in (tmp_path / "environ").read_text().split("\0") if item)
    assert (pairs["KEY"], pairs["OUTER"], pairs["RANK"]) == ("a b\n'c", "kept", "9")
    assert (pairs["FLAGSCALE_RUN_TOKEN"], pairs["FLAGSCALE_RANK_DIR"]) == (told.spec.token, told.spec.rank_dir)


def test_after_stop_runs_when_all_is_over_and_leaves_nothing(start: Start) -> None:
    after = "echo after; exec 3<&-; (setsid sleep 600 &) ; exit 6"
    alone = start("trap 'echo ended; exit 1' TERM; echo armed; while true; do sleep 0.1; done", after_stop=after)
    wait_for(lambda: "armed" in alone.output)
    alone.signal(signal.SIGTERM)
    alone.wait("job_ended")
    assert [word for word in alone.output.split() if word in after + "ended"] == ["ended", "after"]
    assert alone.wait("after_stop")["exit_code"] == 6
    assert [event["event"] for event in alone.events][-3:] == ["after_stop_started", "after_stop", "job_ended"]
    assert find_ours(alone.spec.token) == []


def test_a_failure_names_the_process_and_its_code(start: Start) -> None:
    alone = start("exec sleep 600", "exit 41")
    end = alone.wait("job_ended")
    assert (end["outcome"], end["exit_code"], end["reason"]) == ("failed", 41, "p1 ended with exit code 41")
    assert end["source"] == alone.spec.output
    exits = {event["name"]: (event["exit_code"], event["signal"]) for event in alone.all("process_exited")}
    assert exits == {"p1": (41, None), "p0": (None, "SIGTERM")}


def test_the_pid_file_is_there_while_the_agent_is(start: Start) -> None:
    alone = start("exec sleep 600")
    assert int(Path(alone.spec.pid_file).read_text()) == alone.wait("agent_started")["pid"]
    alone.signal(signal.SIGTERM)
    alone.wait("job_ended")
    assert not Path(alone.spec.pid_file).exists()


def test_the_output_is_appended_to_and_its_part_is_told(start: Start, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("older\n")
    alone = start("echo newer")
    end = alone.wait("job_ended")
    assert (alone.wait("agent_started")["output_start"], end["output_end"]) == (6, 12)
    assert alone.output == "older\nnewer\n"


def test_an_agent_that_cannot_start_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    Path(spec.output).mkdir()
    done = run_agent(tmp_path, spec)
    assert done.returncode == 1
    assert "did not start" in done.stderr
    assert "IsADirectoryError" in Path(spec.agent_log).read_text()
    assert find_ours(spec.token) == []


def test_nobody_need_read_what_the_agent_says(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    (tmp_path / "s.sh").write_text("sleep 0.5; echo done")
    spec = replace(spec, processes=(Entry("main", str(tmp_path / "s.sh")),))
    (tmp_path / "agent.pyz").write_bytes(build_archive())
    (tmp_path / "spec.json").write_text(json.dumps(asdict(spec)))
    argv = [sys.executable, "-I", str(tmp_path / "agent.pyz"), str(tmp_path / "spec.json")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdin
        starter.stdin.write(b"{}\n")
        starter.stdin.close()
        wait_for(lambda: Path(spec.events).exists())
        starter.kill()
    assert Alone(spec, tmp_path).wait("job_ended")["outcome"] == "succeeded"
