"""Run folders: names, files that are all written or none, records that are read back."""

import json
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.errors import FlagScaleError, LaunchError, RunError, UserError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch import folder, ports, provenance
from flagscale.runner.launch.checks import check_programs, choose_port, gather_secrets
from flagscale.runner.launch.files import NewFile, explain_os_error, make_folder, remove_folders, write_all
from flagscale.runner.launch.local import strip_secrets
from flagscale.runner.plan.job import HostPlan, JobPlan, LaunchName, ProcessSpec, decode_plan

VALUES: dict[LaunchName, str] = {"master_port": "1", "run_id": "r"}


def small_plan(exp_dir: Path, *names: str) -> JobPlan:
    processes = tuple(ProcessSpec(name, ("true",), "/") for name in names or ("main",))
    host = HostPlan(Host("localhost", 1), 0, processes)
    return JobPlan("train", "megatron", "small", str(exp_dir), str(exp_dir / "logs"), (host,))


# --- files -----------------------------------------------------------------------------------------------------------


def test_all_files_are_written_with_their_modes(tmp_path: Path) -> None:
    files = [NewFile(tmp_path / "a" / "x", b"1", 0o600), NewFile(tmp_path / "b" / "y", b"2", 0o700)]
    write_all(files, [tmp_path / "c" / "d"])
    assert [(f.path.read_bytes(), f.path.stat().st_mode & 0o777) for f in files] == [(b"1", 0o600), (b"2", 0o700)]
    assert (tmp_path / "c" / "d").is_dir()
    write_all([NewFile(files[0].path, b"3", 0o640)])
    assert files[0].path.read_bytes() == b"3"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x"]


def test_one_file_that_cannot_be_written_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"old")
    (tmp_path / "in-the-way").mkdir()
    files = [
        NewFile(tmp_path / "new" / "x", b"1"),
        NewFile(tmp_path / "kept", b"2"),
        NewFile(tmp_path / "in-the-way", b"3"),
    ]
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/in-the-way"):
        write_all(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in-the-way", "kept"]
    assert (tmp_path / "kept").read_bytes() == b"old"


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/f is a file; expected a folder"):
        make_folder(tmp_path / "f" / "g" / "h")


def test_new_folders_are_told_and_only_empty_ones_removed(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "a" / "b")
    assert made == [tmp_path / "a", tmp_path / "a" / "b"]
    assert make_folder(tmp_path / "a" / "b") == []
    (tmp_path / "a" / "keep").touch()
    remove_folders(made)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/keep"]


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [(28, LaunchError, "No space left"), (13, UserError, "Permission denied"), (30, UserError, "Read-only")],
)
def test_what_a_user_can_do_about_it(number: int, kind: type[FlagScaleError], words: str) -> None:
    error = explain_os_error(Path("/x/y"), OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert words in str(error)
    assert "/x/y" in str(error)


# --- names -----------------------------------------------------------------------------------------------------------


@given(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(timezone(timedelta(hours=5)))))
def test_run_ids_are_in_utc_and_known_again(when: datetime) -> None:
    run_id = folder.make_run_id(when)
    assert folder.is_run_id(run_id)
    assert run_id.startswith(f"{when.astimezone(UTC):%Y%m%dT%H%M%S}-")
    assert not folder.is_run_id(run_id + "/..")


def test_scripts_are_named_by_host_and_by_process_where_there_are_several(tmp_path: Path) -> None:
    one, two = small_plan(tmp_path), small_plan(tmp_path, "ray", "main")
    assert folder.script_path(one, one.hosts[0], one.hosts[0].processes[0]).name == "host_0_localhost_run.sh"
    names = [folder.script_path(two, two.hosts[0], process).name for process in two.hosts[0].processes]
    assert names == ["host_0_localhost_ray_run.sh", "host_0_localhost_main_run.sh"]


# --- records ---------------------------------------------------------------------------------------------------------


def write_run(plan: JobPlan, run_id: str) -> None:
    config = {"a": MappingProxyType({"b": 1}), "c": Path("/d")}
    job = folder.describe_job(plan, run_id, VALUES, config, ["flagscale", "train"])
    write_all(folder.list_files(plan, run_id, VALUES, job, 1.0), folder.list_folders(plan, run_id))


def test_a_run_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))
    plan, run_id = small_plan(tmp_path / "exp"), "20260101T000000-abcd"
    write_run(plan, run_id)
    job = folder.load_job(tmp_path / "exp", run_id)
    assert decode_plan(job["plan"]) == plan
    assert (job["config"], job["command"], job["cwd"]) == (
        {"a": {"b": 1}, "c": "/d"},
        ["flagscale", "train"],
        str(Path.cwd()),
    )
    assert job["environment"]["python"]
    run = folder.find_current(tmp_path / "exp")
    assert run == folder.ref_of(plan, run_id)
    assert run is not None
    spec = run.load_spec("host_0_localhost")
    assert re.fullmatch(r"[0-9a-f]{36}", spec.token)
    assert (spec.grace_s, spec.processes[0].script) == (1.0, f"{plan.log_dir}/scripts/host_0_localhost_run.sh")
    assert json.loads((tmp_path / "state" / "runs" / f"{run_id}.json").read_text())["exp_dir"] == plan.exp_dir


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 99}'])
def test_a_damaged_run_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))
    write_run(small_plan(tmp_path / "exp"), "20260101T000000-abcd")
    path = tmp_path / "exp" / "runs" / "20260101T000000-abcd" / "job.json"
    path.write_text(damage)
    with pytest.raises(RunError, match=str(path)):
        folder.load_job(tmp_path / "exp", "20260101T000000-abcd")
    assert folder.find_current(tmp_path / "exp") is None


def test_a_run_of_another_release_is_seen_but_not_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))
    plan, run_id = small_plan(tmp_path / "exp"), "20260101T000000-abcd"
    write_run(plan, run_id)
    assert folder.load_plan(tmp_path / "exp", run_id) == plan
    path = tmp_path / "exp" / "runs" / run_id / "job.json"
    job = json.loads(path.read_text())
    path.write_text(json.dumps({**job, "plan": {"version": plan.version, "hosts": [{"strange": 1}]}}))
    assert folder.load_ref(tmp_path / "exp", run_id) == folder.ref_of(plan, run_id)
    with pytest.raises(RunError, match="another release"):
        folder.load_plan(tmp_path / "exp", run_id)


def test_missing_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is missing"):
        folder.load_job(tmp_path, "20260101T000000-abcd")
    assert folder.find_current(tmp_path) is None
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "current").write_text("../../etc")
    assert folder.find_current(tmp_path) is None


def test_git_state_is_asked_and_bounded(tmp_path: Path) -> None:
    assert provenance.query_git(tmp_path) is None

    def git(*args: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "x")
    state = provenance.query_git(tmp_path)
    assert state is not None
    assert (len(state["commit"]), state["is_dirty"]) == (40, False)
    (tmp_path / "f").write_text("2")
    assert (provenance.query_git(tmp_path) or {})["is_dirty"] is True


# --- secrets and ports -----------------------------------------------------------------------------------------------


def test_secrets_come_under_the_job_s_names_alone_and_all_missing_ones_are_named(tmp_path: Path) -> None:
    plan = replace(small_plan(tmp_path), secrets=(("KEY", "OUTER"), ("B", "B")))
    env = {"OUTER": "1", "B": "2", "KEY": "stale", "PATH": "/bin", "FLAGSCALE_RUN_TOKEN": "of an outer job"}
    assert gather_secrets(plan, env) == {"KEY": "1", "B": "2"}
    assert strip_secrets(plan, env) == {"PATH": "/bin"}
    with pytest.raises(UserError, match="OUTER, B are not set"):
        gather_secrets(plan, {})


def test_a_taken_port_is_seen_and_its_owner_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not ports.is_port_free(port)
        assert f"process {os.getpid()} (" in str(ports.find_port_owner(port))
        with pytest.raises(UserError, match=f"port {port} "):
            choose_port(replace(small_plan(tmp_path), master_port=port))
    assert ports.is_port_free(port)
    assert ports.find_port_owner(port) is None
    assert choose_port(replace(small_plan(tmp_path), master_port=port)) == port


def test_a_free_port_lies_below_those_of_outgoing_connections() -> None:
    port = ports.find_free_port(random.Random(0))
    assert port is not None
    assert port in ports.CHOICE


class Stubborn(random.Random):
    """Draws one port again and again."""

    def __init__(self, port: int) -> None:
        super().__init__(0)
        self.port = port

    def choice(self, _ports: object) -> int:  # type: ignore[override]
        return self.port


def test_where_every_port_drawn_is_taken_there_is_none() -> None:
    with socket.create_server(("", 0)) as server:
        assert ports.find_free_port(Stubborn(server.getsockname()[1])) is None


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_a_port_taken_on_ipv6_alone_is_taken() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        assert not ports.is_port_free(port)
        assert f"process {os.getpid()} (" in str(ports.find_port_owner(port))


def test_a_port_that_outgoing_connections_use_is_free_to_listen_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert ports.find_port_owner(client.getsockname()[1]) is None


# --- programs --------------------------------------------------------------------------------------------------------


def with_process(tmp_path: Path, process: ProcessSpec, **fields: Any) -> JobPlan:
    host = HostPlan(Host("localhost", 1), 0, (process,), **fields)
    return replace(small_plan(tmp_path), hosts=(host,))


def check(tmp_path: Path, process: ProcessSpec, **fields: Any) -> list[str]:
    try:
        check_programs(with_process(tmp_path, process, **fields), os.environ)
    except UserError as error:
        return str(error).splitlines()
    return []


def test_programs_that_are_there_and_programs_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tool").write_text("")
    here = str(tmp_path)
    assert check(tmp_path, ProcessSpec("a", ("sh",), here)) == []
    assert check(tmp_path, ProcessSpec("a", ("tool",), here)) == ["a on localhost: program `tool` is not on the PATH"]
    unusable = [f"a on localhost: program {here}/bin/tool is missing or may not be executed"]
    assert check(tmp_path, ProcessSpec("a", ("bin/tool",), here)) == unusable
    (tmp_path / "bin" / "tool").chmod(0o755)
    assert check(tmp_path, ProcessSpec("a", ("bin/tool",), here)) == []
    assert check(tmp_path, ProcessSpec("a", ("tool",), here, bin_dirs=(f"{here}/bin",))) == []
    assert check(tmp_path, ProcessSpec("a", (sys.executable, "-m", "json.tool"), here)) == []
    missing = [f"a on localhost: module `nosuch` is not installed for {sys.executable}"]
    assert check(tmp_path, ProcessSpec("a", (sys.executable, "-m", "nosuch.main"), here)) == missing
    assert check(tmp_path, ProcessSpec("a", ("tool",), here), before_start="module load tool") == []


def test_what_the_plan_itself_makes_is_not_missing(tmp_path: Path) -> None:
    folder = f"{tmp_path}/new"
    process = ProcessSpec("a", ("sh", "job.sh"), folder, entrypoint="job.sh")
    assert check(tmp_path, process) == [f"a on localhost: its working folder {folder} is missing"]
    assert check(tmp_path, process, make_dirs=(folder,)) == []
    assert check(tmp_path, process, files=((f"{folder}/job.sh", "true"),)) == []
    (tmp_path / "new").mkdir()
    assert check(tmp_path, process) == [f"a on localhost: entry point {folder}/job.sh is missing"]
    assert check(tmp_path, process, files=((f"{folder}/job.sh", "true"),)) == []


def test_all_that_is_missing_is_told_at_once_and_once(tmp_path: Path) -> None:
    host = HostPlan(Host("localhost", 1), 0, tuple(ProcessSpec(name, ("nosuch",), "/") for name in ("a", "b", "a")))
    with pytest.raises(UserError) as caught:
        check_programs(replace(small_plan(tmp_path), hosts=(host,)), {"PATH": "/bin"})
    assert [line[0] for line in str(caught.value).splitlines()] == ["a", "b"]
