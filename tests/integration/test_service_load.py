"""A service under load: replicas that die, updates that replace them, numbers of them that follow the requests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import Bench, wait_for

from flagscale.serve.folder import find_control


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench.make(tmp_path)
    made.write_model("model", token_s=0.02)
    yield made
    made.serve("stop", str(made.exp_dir), "--force")
    assert made.list_left() == []


def test_a_killed_replica_costs_only_requests_that_had_begun(bench: Bench) -> None:
    bench.write(resources={"num_replicas": 2})
    bench.start()
    with bench.load(num_callers=6) as load:
        wait_for(lambda: load.num_good > 20)
        os.kill(bench.find_pid("m-0"), signal.SIGKILL)
        before = load.num_good
        wait_for(lambda: load.num_good > before + 20)
        wait_for(lambda: "m-0: ended" in bench.read_log())
        wait_for(lambda: bench.look()["state"] == "ready")
    assert len(load.faults) <= 6, load.faults
    assert load.num_begun == len(load.faults), load.faults
    assert "m-0: ended: m died of SIGKILL" in bench.read_log()
    assert [row["starts"] for row in bench.look()["replicas"]] == [2, 1]


def test_an_update_under_load_loses_no_request(bench: Bench) -> None:
    bench.write(resources={"num_replicas": 2})
    bench.start()
    bench.write_model("newer", token_s=0.01)
    with bench.load() as load:
        wait_for(lambda: load.num_good > 10)
        done = bench.serve("update", str(bench.exp_dir), "--model-path", "./newer", "--engine-args", '{"seed": 7}')
        assert done.returncode == 0, done.stderr + bench.read_log()
        before = load.num_good
        wait_for(lambda: load.num_good > before + 10)
    assert load.faults == []
    assert "version 2 serves" in done.stdout
    status = bench.look()
    assert (status["state"], status["version"], status["update"]["state"]) == ("ready", 2, "done")
    assert {row["version"] for row in status["replicas"]} == {2}
    words = Path(f"/proc/{bench.find_pid(status['replicas'][0]['name'])}/cmdline").read_bytes().split(b"\0")
    assert str(bench.base / "newer").encode() in words

    # what was changed stays, for the next update and for a controller that starts anew
    done = bench.serve("update", str(bench.exp_dir), "--replicas", "1")
    assert done.returncode == 0, done.stderr
    status = bench.look()
    assert (status["version"], len(status["replicas"])) == (3, 1)
    process = Path("/proc", str(bench.find_pid(status["replicas"][0]["name"])))
    assert b"7" in (process / "cmdline").read_bytes().split(b"\0")
    # the only one has all cores
    threads = f"OMP_NUM_THREADS={len(os.sched_getaffinity(0))}".encode()
    assert threads in (process / "environ").read_bytes().split(b"\0")


def test_only_the_number_of_replicas_changes_where_nothing_else_does(bench: Bench) -> None:
    bench.write(resources={"num_replicas": 1}, experiment__envs={"OMP_NUM_THREADS": "1"})
    bench.start()
    first = bench.find_pid("m-0")
    done = bench.serve("update", str(bench.exp_dir), "--replicas", "3")
    assert done.returncode == 0, done.stderr + bench.read_log()
    assert "version 1 stays, and the number of replicas changes" in done.stderr
    assert [(row["name"], row["state"]) for row in bench.look()["replicas"]] == [
        ("m-0", "ready"), ("m-1", "ready"), ("m-2", "ready"),
    ]  # fmt: skip
    # a controller that starts anew knows of it
    control = find_control(bench.exp_dir)
    assert control is not None
    os.kill(control.pid, signal.SIGKILL)
    wait_for(lambda: find_control(bench.exp_dir) not in (None, control))
    wait_for(lambda: bench.look()["models"][0]["ready"] == 3)
    done = bench.serve("update", str(bench.exp_dir), "--replicas", "1")
    assert (done.returncode, done.stdout) == (0, "service demo: version 1 serves\n"), done.stderr
    assert [row["name"] for row in bench.look()["replicas"]] == ["m-0"]
    assert bench.find_pid("m-0") == first
    # a model that cannot be loaded any more: what is new ends, what serves stays
    bench.write_model("model", last_words="ValueError: broken")
    done = bench.serve("update", str(bench.exp_dir), "--replicas", "2")
    assert (done.returncode, "version 1 serves on" in done.stderr) == (1, True), done.stderr
    assert bench.find_pid("m-0") == first
    assert bench.complete() == "w0 w1 w2"


def test_an_update_that_does_not_start_leaves_the_old_version(bench: Bench) -> None:
    bench.write()
    bench.start()
    bench.write_model("broken", last_words="ValueError: No available memory for the cache blocks.")
    with bench.load(num_callers=2) as load:
        done = bench.serve("update", "--model-path", "./broken")
        assert done.returncode == 1
        assert "what is new did not start, version 1 serves on" in done.stderr
        assert "No available memory for the cache blocks" in done.stderr
        wait_for(lambda: bench.look()["state"] == "ready")
        before = load.num_good
        wait_for(lambda: load.num_good > before + 5)
    assert load.faults == []
    status = bench.look()
    assert ([row["name"] for row in status["replicas"]], status["version"]) == (["m-0"], 1)
    refused = bench.serve("update", "--model-path", "./nowhere")
    assert (refused.returncode, "there is no model at" in refused.stderr) == (2, True)
    refused = bench.serve("update", "--engine-args", '{"seeed": 1}')
    assert (refused.returncode, "did you mean `seed`" in refused.stderr) == (2, True)


def test_what_an_update_cannot_change_is_refused_by_name(bench: Bench) -> None:
    config = bench.write()
    bench.start()
    config.write_text(config.read_text().replace(f"port: {bench.port}", f"port: {bench.port + 1}"))
    done = bench.serve("update", str(bench.exp_dir), str(config))
    assert (done.returncode, "an update cannot change `port`" in done.stderr) == (2, True)
    config.write_text(config.read_text().replace(str(bench.exp_dir), str(bench.base / "other")))
    done = bench.serve("update", str(bench.exp_dir), str(config))
    assert (done.returncode, "expected that of the service" in done.stderr) == (2, True)


def test_replicas_follow_the_requests_between_their_bounds(bench: Bench) -> None:
    resources = {
        "min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 1,
        "downscale_delay_s": 2,
    }  # fmt: skip
    bench.write(resources=resources)
    bench.start()
    with bench.load(num_callers=12, num_tokens=100) as load:
        wait_for(lambda: bench.look()["models"][0]["ready"] == 3)
    wait_for(lambda: len(bench.look()["replicas"]) == 1)
    assert load.faults == []
    assert bench.complete() == "w0 w1 w2"
    log = bench.read_log()
    assert "replicas are to be 3" in log
    assert "is not needed any more" in log


def test_a_replica_that_dies_again_and_again_is_given_up_with_its_cause(bench: Bench) -> None:
    bench.write(resources={"num_replicas": 2})
    bench.start()
    bench.write_model("model", last_words="ModuleNotFoundError: No module named 'gone'")
    for replica in ("m-0", "m-1"):
        os.kill(bench.find_pid(replica), signal.SIGKILL)
    wait_for(lambda: all(row["state"] == "failed" for row in bench.look()["replicas"]), 90)
    status = bench.look()
    assert status["state"] == "degraded"
    assert "`gone` is not installed" in status["why"]
    examined = bench.serve("doctor")
    assert examined.returncode == 1
    assert "`gone` is not installed" in examined.stdout
