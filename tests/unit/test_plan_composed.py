"""`plan_composed`: the program with the head of Ray, workers on other hosts, what nodes are given, what is secret."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import ROOT, changed, plan
from graphs import NODES, graph_tree, node, write_models

from flagscale.errors import ConfigError, LaunchError
from flagscale.runner.launch.checks import gather_secrets
from flagscale.runner.launch.procs import find_ours
from flagscale.runner.plan.graph import GraphPlan, NodePlan
from flagscale.runner.plan.job import DRAWN, JobPlan
from flagscale.runner.plan.scaling import Scaling
from flagscale.runner.plan.service import ServicePlan, decode_service, encode_service
from flagscale.runner.render.argv import render_argv
from flagscale.runner.render.script import render_script
from flagscale.serve.graph.cluster import Cluster
from flagscale.serve.graph.deployments import find_cause, find_shortage, is_serial, make_options, read_view
from flagscale.serve.graph.ray_node import NUM_STARTS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    write_models(tmp_path)
    return tmp_path


def service_of(job: JobPlan) -> ServicePlan:
    assert job.service is not None
    return decode_service(job.service)


def graph_of(job: JobPlan) -> GraphPlan:
    graph = service_of(job).graph
    assert graph is not None
    return graph


def test_one_host(folder: Path) -> None:
    job = plan(
        graph_tree(experiment__cmds={"before_start": "export RAY_DEDUP_LOGS=0", "after_stop": "echo bye"}), folder
    )
    ((process,), host) = job.hosts[0].processes, job.hosts[0]
    words = render_argv(process)
    assert words[:5] == (
        "python", "-m", "flagscale.serve.graph", f"{folder}/outputs/runs/<run_id: chosen at launch>/job.json",
        "127.0.0.1:<master_port: chosen at launch>",
    )  # fmt: skip
    text = " ".join(words)
    assert "ray start --block --disable-usage-stats --head --port <master_port: chosen at launch>" in text
    assert "--node-ip-address" not in text
    assert words[-2:] == ("--num-gpus", "0")
    script = render_script(job, host, process)
    assert "|| exit 1\nexport RAY_DEDUP_LOGS=0\n" in script
    assert host.after_stop is not None
    assert host.after_stop.startswith("echo bye\nrm -rf -- /tmp/fs-")
    assert (job.task, job.backend, job.secrets) == ("serve", "Ray Serve", (("RAY_AUTH_TOKEN", DRAWN),))
    assert graph_of(job) == GraphPlan(
        nodes=(
            NodePlan("A", f"{folder}/models.py", "Upper", (), Scaling()),
            NodePlan("B", f"{folder}/models.py", "Length", ("A",), Scaling()),
            NodePlan("C", f"{folder}/models.py", "Join", ("A", "B"), Scaling()),
        ),
        route="/generate",
        request=(("prompt", "str"),),
    )
    service = service_of(job)
    assert (service.host, service.port, service.models) == ("127.0.0.1", 6701, ())
    assert decode_service(encode_service(service)) == service


def test_many_hosts(folder: Path) -> None:
    (folder / "hosts").write_text("localhost slots=8 type=A800\nh1 slots=4 type=A800\n")
    runner = {"hostfile": "hosts", "master_addr": "10.0.0.1", "ray_port": 6399, "device_type": None}
    tree = changed(graph_tree(), {f"experiment.runner.{name}": value for name, value in runner.items()})
    job = plan(tree, folder)
    head, worker = (" ".join(render_argv(host.processes[0])) for host in job.hosts)
    assert "127.0.0.1:6399 ray start --block --disable-usage-stats --head --port 6399" in head
    assert "--node-ip-address 10.0.0.1" in head
    assert head.endswith("--num-gpus 8")
    assert worker.startswith(
        "python -m flagscale.serve.graph.ray_node ray start --block --disable-usage-stats --address 10.0.0.1:6399 "
    )
    assert worker.endswith("--num-gpus 4")
    assert job.hosts[0].before_start != job.hosts[1].before_start
    assert (graph_of(job).num_hosts, job.master_port, job.master_addr) == (2, 6399, "10.0.0.1")


def test_what_a_node_asks_for_as_ray_takes_it(folder: Path) -> None:
    wants = {"min_replicas": 2, "max_replicas": 3, "num_gpus": 0.5, "num_cpus": 2, "target_ongoing_requests": 7}
    nodes = (*NODES[:2], node("C", "Join", "A", "B", resources=wants))
    tree = changed(graph_tree(*nodes), {"experiment.runner.device_type": "gpu", "experiment.runner.nproc_per_node": 4})
    tree = changed(tree, {"experiment.runner.deploy.working_dir": "."})
    graph = graph_of(plan(tree, folder))
    first, second, last = graph.nodes
    assert graph.working_dir == str(folder)
    assert (is_serial(first), is_serial(second), is_serial(last)) == (True, False, True)
    options = make_options(last)
    assert options["ray_actor_options"] == {
        "num_cpus": 2.0, "num_gpus": 0.5,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}},
    }  # fmt: skip
    bounds = options["autoscaling_config"]
    assert (bounds["min_replicas"], bounds["initial_replicas"], bounds["max_replicas"]) == (2, 2, 3)
    assert (bounds["target_ongoing_requests"], bounds["upscale_delay_s"], bounds["downscale_delay_s"]) == (7, 30, 600)
    assert "num_replicas" not in options
    options = make_options(first)
    assert (options["num_replicas"], options["ray_actor_options"]) == (1, {"num_cpus": 0.0})
    assert options["max_ongoing_requests"] == 1 < make_options(second)["max_ongoing_requests"]


@pytest.mark.parametrize(
    ("resources", "chip", "told"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "cpu", "are not in this order"),
        ({"min_replicas": 0}, "cpu", "a service keeps a replica"),
        ({"num_gpus": 1}, "cpu", "is 1, but the hosts have none: cpu"),
        ({"num_gpus": 1}, "Cambricon_MLU", "which Ray does not hand out"),
    ],
)
def test_resources_that_cannot_be_right(resources: dict[str, Any], chip: str, told: str, folder: Path) -> None:
    tree = graph_tree(*NODES[:2], node("C", "Join", "A", "B", resources=resources))
    with pytest.raises(ConfigError, match=told) as caught:
        plan(changed(tree, {"experiment.runner.device_type": chip}), folder)
    assert caught.value.faults[0].path.startswith("serve.2.resources")


def test_faults_of_all_nodes_are_told_at_once(folder: Path) -> None:
    rows = [{**row, "resources": {"min_replicas": 3, "max_replicas": 2}} for row in NODES]
    with pytest.raises(ConfigError) as caught:
        plan(graph_tree(*rows), folder)
    assert [fault.path for fault in caught.value.faults] == [f"serve.{index}.resources" for index in range(3)]


def test_chips_of_another_kind_are_asked_for_by_their_name(folder: Path) -> None:
    tree = graph_tree(node("A", "Upper", resources={"num_gpus": 2}))
    job = plan(changed(tree, {"experiment.runner.device_type": "Huawei_Atlas800TA3"}), folder)
    options = make_options(graph_of(job).nodes[0])
    assert options["ray_actor_options"] == {"num_cpus": 0.0, "resources": {"NPU": 2.0}}


def test_the_token_of_ray_is_drawn_anew_for_each_launch_and_the_key_is_the_callers(folder: Path) -> None:
    job = plan(changed(graph_tree(), {"experiment.runner.deploy.api_key_env": "MY_KEY"}), folder)
    first, second = (gather_secrets(job, {"MY_KEY": "k"}) for _ in range(2))
    assert first["MY_KEY"] == "k"
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert len(first["RAY_AUTH_TOKEN"]) >= 32


def test_a_shortage_is_found() -> None:
    def graph(**fields: Any) -> GraphPlan:
        return GraphPlan((NodePlan("A", "/m.py", "A", (), **fields),), "/", ())

    hosts = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 8.0}]
    assert find_shortage(graph(scaling=Scaling(12, 12, 12), num_cpus=1), hosts) is None
    assert "need 13 CPU, and the hosts have 12" in str(
        find_shortage(graph(scaling=Scaling(13, 13, 13), num_cpus=1), hosts)
    )
    assert "A needs 3 GPU in one place, and the largest host has 2" in str(
        find_shortage(graph(scaling=Scaling(), num_gpus=3), hosts)
    )
    assert "has 0" in str(find_shortage(graph(scaling=Scaling(), num_gpus=1), [{"CPU": 4.0}]))


def test_the_cause_is_found_in_what_ray_says() -> None:
    said = "The deployment failed to start 1 times. Error:\nray::Replica()\n  flagscale.NodeStartError: m.py:3: no\n"
    assert find_cause(said) == "m.py:3: no"
    assert find_cause("first\nsecond") == "first"
    assert find_cause("") == ""


def test_what_ray_tells_of_a_node_is_read() -> None:
    made = NodePlan("A", "/m.py", "A", (), Scaling())
    early = read_view(made, {})
    assert (early.wanted, early.replicas, early.is_healthy, early.is_failed) == (1, (), False, False)
    row = {"replica_id": "x1", "state": "RUNNING", "pid": 7, "node_ip": "10.0.0.1", "start_time_s": 1.5}
    fresh = {"replica_id": "x2", "state": "STARTING", "start_time_s": 2.5}
    seen = read_view(made, {"status": "UPSCALING", "message": "", "target_num_replicas": 2, "replicas": [row, fresh]})
    assert (seen.wanted, seen.num_ready, seen.is_healthy) == (2, 1, True)
    assert [(it.id, it.state, it.pid, it.host) for it in seen.replicas] == [
        ("A-x1", "ready", 7, "10.0.0.1"), ("A-x2", "starting", None, "-"),
    ]  # fmt: skip
    assert read_view(made, {"status": "DEPLOY_FAILED", "message": "no"}).is_failed
    broken = read_view(made, {"status": "UPDATING", "message": "Retrying. Error:\nNodeStartError: m.py:3: no"})
    assert (broken.is_failed, broken.message) == (True, "m.py:3: no")


def test_without_ray_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LaunchError, match=r"Ray Serve is not here .*`pip install 'flagscale\[ray\]'`"):
        Cluster(("ray",), "127.0.0.1:1").start(1, 1.0)


def test_a_head_that_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flagscale.serve.graph.cluster._import_ray", lambda: None)
    with pytest.raises(LaunchError, match="`/no/ray` cannot be started: No such file"):
        Cluster(("/no/ray",), "127.0.0.1:1").start(1, 1.0)
    ended = Cluster(("false",), "127.0.0.1:1")
    with pytest.raises(LaunchError, match="the head of Ray ended with exit code 1"):
        ended.start(1, 20.0)
    ended.stop()


def test_a_head_that_failed_is_ended_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flagscale.serve.graph.cluster._import_ray", lambda: None)
    monkeypatch.setenv("FLAGSCALE_RUN_TOKEN", token := f"token-of-{tmp_path.name}")
    with subprocess.Popen(["sleep", "1000"]) as helper:  # of the job, but of no head
        cluster = Cluster(("bash", "-c", f"sleep 1000 & echo $! >> {tmp_path}/pids; exit 1"), "127.0.0.1:1")
        with pytest.raises(LaunchError, match="ended with exit code 1"):
            cluster.start(1, 20.0)
        pids = (tmp_path / "pids").read_text().split()
        assert len(pids) == NUM_STARTS
        assert [proc.pid for proc in find_ours(token)] == [helper.pid]
        helper.kill()


def test_a_node_that_ends_while_it_comes_up_is_tried_again(tmp_path: Path) -> None:
    command = f"echo >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) -gt 1 ] && exec sleep 1000; sleep 1000 & exit 7"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FLAGSCALE_RUN_TOKEN": (token := f"token-of-{tmp_path.name}")}
    words = [sys.executable, "-m", "flagscale.serve.graph.ray_node", "bash", "-c", command]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as node_process:
        assert node_process.stdout is not None
        assert node_process.stdout.readline() == "the node of Ray ended with exit code 7; it is started again\n"
        while len(find_ours(token)) != 2:  # it, and its second child: what the first left is gone
            assert node_process.poll() is None
        node_process.terminate()
        assert node_process.wait(20) == 128 + signal.SIGTERM
    assert find_ours(token) == []
