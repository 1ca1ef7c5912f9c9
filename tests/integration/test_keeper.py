"""What keeps a host's place with a scheduler: the agent ends with it, and it with the agent."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from local_jobs import list_left, plan_program, wait_for

from flagscale.runner.launch.archive import KEEPER, build_archive
from flagscale.runner.launch.files import NewFile, write_all
from flagscale.runner.launch.folder import RunRef, describe_job, list_files, list_folders, make_run_id, ref_of
from flagscale.runner.launch.keeper import split_environment
from flagscale.runner.launch.procs import KEPT, read_environ
from flagscale.runner.monitor.state import query_run

LABEL = "host_0_localhost"


def write_run(base: Path, *argv: str, **fields: Any) -> RunRef:
    plan = plan_program(base / "exp", *argv, launcher="ray", **fields)
    run_id = make_run_id(datetime.now(UTC))
    values: Any = {"master_port": "1", "next_port": "2", "run_id": run_id}
    files = list_files(plan, run_id, values, describe_job(plan, run_id, values, {}, []), 5.0)
    run = ref_of(plan, run_id)
    write_all([*files, NewFile(run.folder / "keeper.pyz", build_archive(KEEPER))], list_folders(plan, run_id))
    return run


def start_keeper(run: RunRef, *secrets: str, **env: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-I", str(run.folder / "keeper.pyz"), "Ray", str(run.spec_path(LABEL)), *secrets]
    return subprocess.Popen(
        words, env={"PATH": os.environ["PATH"], **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(autouse=True)
def _own_list_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))


def test_the_job_gets_its_secret_and_the_keeper_its_exit_code(tmp_path: Path) -> None:
    code = f"echo $TOKEN > {tmp_path}/told; exit 7"
    run = write_run(tmp_path, "bash", "-c", code)
    with start_keeper(run, "TOKEN=OUTER", OUTER="hush") as keeper:
        out, err = keeper.communicate(timeout=60)
    assert keeper.returncode == 7, err
    assert json.loads(out)["agent"]
    assert (tmp_path / "told").read_text() == "hush\n"
    assert query_run(run).state == "failed"
    kept = [path for path in run.folder.rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    assert kept == []


def test_the_job_ends_once_its_keeper_is_gone(tmp_path: Path) -> None:
    run = write_run(tmp_path, "sleep", "600")
    with start_keeper(run) as keeper:
        agent = json.loads(keeper.stdout.readline() if keeper.stdout else "")["agent"]
        assert read_environ(agent)[KEPT] == run.load_spec(LABEL).token
        keeper.kill()
        keeper.communicate()
    wait_for(lambda: query_run(run).has_ended)
    state = query_run(run)
    assert (state.state, state.exit_code) == ("lost", None)
    assert f"Ray has given up the place of {LABEL}: process" in str(state.reason)
    assert list_left(run) == []


def test_a_signal_that_nobody_owns_up_to_is_a_lost_place(tmp_path: Path) -> None:
    run = write_run(tmp_path, "sleep", "600")
    with start_keeper(run) as keeper:
        assert keeper.stdout
        keeper.stdout.readline()
        keeper.send_signal(signal.SIGTERM)
        keeper.communicate(timeout=60)
    assert keeper.returncode == 1
    assert "SIGTERM from process" in str(query_run(run).reason)
    assert query_run(run).state == "lost"


def test_a_keeper_leaves_when_its_parent_does(tmp_path: Path) -> None:
    run = write_run(tmp_path, "sleep", "600")
    words = [sys.executable, "-I", str(run.folder / "keeper.pyz"), "Ray", str(run.spec_path(LABEL))]
    code = f"import subprocess, time; subprocess.Popen({words!r}); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as parent:
        wait_for(lambda: query_run(run).state == "running")
        parent.kill()
        parent.communicate()
    wait_for(lambda: query_run(run).state == "lost")
    assert list_left(run) == []


def test_a_secret_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    run = write_run(tmp_path, "true")
    with start_keeper(run, "TOKEN=OUTER") as keeper:
        _, err = keeper.communicate(timeout=60)
    assert keeper.returncode == 1
    assert "the secret 'OUTER' is not set where Ray starts the job" in err
    assert query_run(run).state == "never_started"


def test_secrets_stay_out_of_the_agents_environment() -> None:
    env = {"A": "1", "OUTER": "x", "TOKEN": "y", "FLAGSCALE_RUN_TOKEN": "t"}
    assert split_environment(env, ["TOKEN=OUTER"]) == ({"A": "1"}, {"TOKEN": "x"})
