"""The files of a service: private, whole, and read back as they were, or not at all."""

import stat
from pathlib import Path

from factories import plan, serve_model, serve_tree

from flagscale.runner.plan.job import AtLaunch
from flagscale.runner.plan.service import decode_service, encode_service, list_first_jobs
from flagscale.serve.folder import (
    Control,
    ServiceState,
    find_control,
    find_state,
    is_run_alive,
    list_replica_runs,
    save_control,
    save_state,
)
from flagscale.serve.replicas import bind_threads

CONTROL = Control(1234, "token", "key", 99)


def make_state() -> ServiceState:
    job = plan(serve_tree(serve_model("native")))
    assert job.service is not None
    service = encode_service(decode_service(job.service))
    return ServiceState("20261121T000000-aaaa", 3, service, {"a": 1}, {"m": 2})


def test_what_was_saved_is_found_and_for_the_owner_alone(tmp_path: Path) -> None:
    state = make_state()
    save_control(tmp_path, CONTROL)
    save_state(tmp_path, state)
    assert find_control(tmp_path) == CONTROL
    assert CONTROL.url == "http://127.0.0.1:1234"
    found = find_state(tmp_path)
    assert found is not None
    assert decode_service(found.service) == decode_service(state.service)
    assert (found.config, found.wanted, found.version) == (state.config, state.wanted, 3)
    for path in (tmp_path / "serve").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    save_control(tmp_path, Control(5, "t", "k", 1))
    assert sorted(path.name for path in (tmp_path / "serve").iterdir()) == ["control.json", "state.json"]


def test_what_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    assert find_control(tmp_path) is None
    assert find_state(tmp_path) is None
    for text in ("", "{", "[]", '{"port": 1}', '{"format": 99}', '{"format": 1, "run_id": "x"}'):
        (tmp_path / "serve").mkdir(exist_ok=True)
        (tmp_path / "serve" / "control.json").write_text(text)
        (tmp_path / "serve" / "state.json").write_text(text)
        assert find_control(tmp_path) is None
        assert find_state(tmp_path) is None


def test_folders_without_a_run_that_can_be_read_are_passed_over(tmp_path: Path) -> None:
    assert list_replica_runs(tmp_path) == []
    for name, text in (("m-0", "no run id"), ("m-1", "20261121T000000-aaaa")):
        folder = tmp_path / "serve" / name / "runs"
        folder.mkdir(parents=True)
        (folder / "current").write_text(text)
    assert list_replica_runs(tmp_path) == []


def test_threads_are_bound_and_nothing_else() -> None:
    job = plan(serve_tree(serve_model("native")))
    assert job.service is not None
    (replica,) = list_first_jobs(decode_service(job.service))
    (process,) = bind_threads(replica, 3).hosts[0].processes
    assert dict(process.env)["OMP_NUM_THREADS"] == "3"
    assert AtLaunch("master_port") in process.argv
    assert bind_threads(bind_threads(replica, 3), 5) == bind_threads(replica, 3)


def test_a_damaged_run_is_not_alive(tmp_path: Path) -> None:
    from flagscale.runner.launch.folder import RunRef

    run = RunRef("20261121T000000-aaaa", tmp_path, tmp_path / "logs", "replica", "m-0", ("host_0_localhost",))
    assert not is_run_alive(run)
