"""The doctor's knowledge of a vLLM over Ray that waits: a worker that is missing, that ended, or is elsewhere."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from factories import hosts, plan, serve_model, serve_tree, write_hostfile

from flagscale.runner.launch.files import write_all
from flagscale.runner.launch.folder import RunRef, describe_job, list_files, make_run_id, make_spec, ref_of
from flagscale.runner.launch.record import HostRecord
from flagscale.runner.plan.job import JobPlan
from flagscale.runner.plan.service import decode_service, list_first_jobs
from flagscale.serve.causes import Cause
from flagscale.serve.diagnosis import Finding, _explain_end, _look_at_ray
from flagscale.serve.waiting import describe_progress, explain_failure

JOINED = "Local node IP: {ip}\n--------------------\nRay runtime started.\n--------------------\n"


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunRef, JobPlan]:
    """A run of two hosts as the launcher writes it down, that nobody started."""
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))
    write_hostfile(tmp_path, hosts(2, 8, "gpu"))
    args = {"model": "/m", "tensor_parallel_size": 16}
    tree = serve_tree(
        serve_model(engine_args=args),
        experiment__runner={"hostfile": "hostfile.txt"},
        experiment__node_specific={"node1": {"VLLM_HOST_IP": "10.0.0.9"}},
    )
    service = plan(tree, tmp_path).service
    assert service is not None
    (job,) = list_first_jobs(decode_service(service))
    run_id = make_run_id(datetime.now(UTC))
    values = {"master_port": "1", "next_port": "2", "run_id": run_id}
    write_all(list_files(job, run_id, values, describe_job(job, run_id, values, {}, []), 5.0))  # type: ignore[arg-type]
    return ref_of(job, run_id), job


def records_of(run: RunRef, job: JobPlan, *outputs: str, alive: tuple[bool, bool] = (True, True)) -> list[HostRecord]:
    rows = []
    for host, text, is_alive in zip(job.hosts, outputs, alive, strict=True):
        spec = make_spec(job, host, run.run_id, "token", 5.0)
        Path(spec.output).parent.mkdir(parents=True, exist_ok=True)
        Path(spec.output).write_text(text)
        events = (
            () if is_alive else ({"event": "job_ended", "reason": "ray ended with exit code 1", "output_end": 999},)
        )
        rows.append(HostRecord(spec, events, True, is_alive, 0.0))
    return rows


def look(replica: tuple[RunRef, JobPlan], *outputs: str, alive: tuple[bool, bool] = (True, True)) -> list[Finding]:
    return list(_look_at_ray("replica m-0", replica[0], tuple(records_of(*replica, *outputs, alive=alive))))


def test_a_worker_that_has_not_joined_is_named(replica: tuple[RunRef, JobPlan]) -> None:
    head = JOINED.format(ip="10.0.0.1") + "Waiting for creating a placement group of specs for 50 seconds\n"
    waits, missing = look(replica, head, "ConnectionError: Could not connect to Ray at node0:6379\n")
    assert waits.text == "waits for Ray workers since 50 s"
    assert missing.text.startswith("the worker host_1_node1 has not joined: ")
    assert "ray_port" in missing.remedy


def test_a_worker_that_ended_is_named_with_its_end(replica: tuple[RunRef, JobPlan]) -> None:
    (ended,) = look(replica, JOINED.format(ip="10.0.0.1"), "", alive=(True, False))
    assert ended.text == "the worker host_1_node1 has ended: ray ended with exit code 1"


def test_an_address_that_differs_from_ray_s_is_named(replica: tuple[RunRef, JobPlan]) -> None:
    (differs,) = look(replica, JOINED.format(ip="10.0.0.1"), JOINED.format(ip="10.0.0.2"))
    assert differs.text == "VLLM_HOST_IP is 10.0.0.9 on node1, where Ray is at 10.0.0.2"
    assert look(replica, JOINED.format(ip="10.0.0.1"), JOINED.format(ip="10.0.0.9")) == []


def test_an_end_is_explained_by_the_first_host_that_says_why(replica: tuple[RunRef, JobPlan]) -> None:
    records = tuple(records_of(*replica, "", "RuntimeError: it broke"))
    assert _explain_end("x", records, "m ended").text == "ended: RuntimeError: it broke"
    assert _explain_end("x", tuple(records_of(*replica, "", "")), "m ended").text == "ended: m ended"


def test_the_cause_is_the_first_line_and_the_log_follows(tmp_path: Path) -> None:
    log = tmp_path / "serve_logs" / "host_0_localhost.output"
    log.parent.mkdir()
    log.write_text("\n".join(f"line {number}" for number in range(50)))
    cause = str(Cause("memory", "out of memory"))
    row = {"name": "m-0", "state": "failed", "cause": cause, "log_dir": str(log.parent)}
    lines = explain_failure({"replicas": [row], "why": None}).splitlines()
    assert lines[0] == "the service did not start: m-0: out of memory"
    assert lines[1] == f"last lines of {log}:"
    assert lines[-1] == "  line 49"
    assert len(lines) == 17
    assert explain_failure({"replicas": [], "why": "no reason"}) == "the service did not start: no reason"


def test_progress_tells_how_many_and_what_the_one_that_loads_says() -> None:
    models = [{"ready": 1, "wanted": 2}, {"ready": 0, "wanted": 1}]
    rows = [{"state": "ready", "progress": ""}, {"state": "starting", "name": "m-1", "progress": "Loading 50%"}]
    status = {"models": models, "replicas": rows}
    assert describe_progress(status) == "1 of 3 replicas ready; m-1: Loading 50%"
    assert describe_progress({**status, "replicas": []}) == "1 of 3 replicas ready"
