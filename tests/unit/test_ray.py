"""Ray: what is asked of a cluster, how one of our own is planned, and who may be in it; no Ray needed."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_hosts import choose
from test_ssh import TWO, make_plan

from flagscale.errors import LaunchError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch import ray_cluster, ray_errands, ray_place, ray_places
from flagscale.runner.launch.archive import RAY_ERRANDS, build_archive
from flagscale.runner.launch.folder import find_cluster, list_remotes, ref_of
from flagscale.runner.launch.procs import KEPT, find_descendants, find_ours, list_procs
from flagscale.runner.launch.reach import Links, Reply, pack_archive, pack_request, read_reply
from flagscale.runner.plan.job import HostPlan, JobPlan, decode_plan, encode_plan
from flagscale.runner.render.script import render_script

RUN_ID = "20260101T000000-abcd"
PORTS = {"ports": [1, 2, 3, 4, 5], "address": "10.0.0.1", "head": "10.0.0.1"}

# --- settings --------------------------------------------------------------------------------------------------------


def test_a_running_cluster_chooses_the_machines_unless_a_hostfile_does() -> None:
    found = choose(None, type="ray", ray_address="a:1", nnodes=2, nproc_per_node=4)
    assert found == ([("node0", 4), ("node1", 4)], [], [])
    assert choose((Host("a", 8),), type="ray", ray_address="a:1")[0] == [("a", 8)]
    assert choose(None, type="ray")[0] == [("localhost", 1)]


@pytest.mark.parametrize(
    ("runner", "text"),
    [({"docker": "c"}, "start on the host itself"), ({"no_shared_fs": True}, "expected a folder that all hosts share")],
)
def test_what_a_scheduler_cannot_do(runner: dict[str, Any], text: str) -> None:
    assert text in choose(None, type="ray", **runner)[1][0]
    assert text in choose(None, type="slurm", **runner)[1][0]


# --- what is asked of a cluster --------------------------------------------------------------------------------------


def row(slots: int = 2, **fields: Any) -> dict[str, Any]:
    return {"slots": slots, "chip": ["A800", "NVIDIA"], "device": "cuda", "pin": None, **fields}


def node(name: str = "n", **has: float) -> dict[str, Any]:
    return {"name": name, "has": has}


@pytest.mark.parametrize(
    ("asked", "nodes", "bundle"),
    [
        (row(), [node(A800=8, GPU=8)], {"A800": 2}),
        (row(), [node(NVIDIA=8)], {"NVIDIA": 2}),
        (row(), [node(GPU=8, **{"accelerator_type:A800": 1})], {"accelerator_type:A800": 0.001, "GPU": 2}),
        (row(), [node(GPU=8)], {"GPU": 2}),
        (row(chip=["cpu"], device="cpu"), [node(CPU=8)], {"CPU": 2}),
        (row(chip=["910B"], device="npu"), [node(NPU=8)], {"NPU": 2}),
        (row(chip=["mlu"], device="mlu"), [node(GPU=8)], {"mlu": 2}),
        (row(pin="node:1.2.3.4"), [node(GPU=8)], {"node:1.2.3.4": 0.001, "GPU": 2}),
    ],
)
def test_a_place_asks_by_the_name_that_the_cluster_has_for_its_chip(
    asked: dict[str, Any], nodes: list[Any], bundle: dict[str, float]
) -> None:
    assert ray_place.choose_bundle(asked, nodes) == bundle


def test_a_shortage_is_told_with_what_there_is() -> None:
    nodes = [node("a", GPU=2, memory=9), node("b", GPU=4)]
    told = ray_place.find_shortage([{"GPU": 8}, {"GPU": 4}], nodes)
    assert told == ("the cluster can never give 1 x (8 GPU), each on a node of its own; it has a: 2 GPU; b: 4 GPU")
    assert "3 x (1 GPU)" in str(ray_place.find_shortage([{"GPU": 1}] * 3, nodes))
    assert ray_place.find_shortage([{"GPU": 2}, {"GPU": 4}], nodes) is None


SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@given(SIZES, SIZES)
def test_no_shortage_means_that_every_bundle_fits_somewhere(wanted: list[int], there: list[int]) -> None:
    bundles = [{"GPU": float(size)} for size in wanted]
    nodes = [node(str(number), GPU=size) for number, size in enumerate(there)]
    fits = all(max(there) >= size for size in wanted) and len(wanted) <= len(there)
    assert (ray_place.find_shortage(bundles, nodes) is None) is fits


def test_a_host_of_a_hostfile_is_pinned_and_another_is_not() -> None:
    named = HostPlan(Host("localhost", 2, "A800"), 0, ())
    asked = ray_places.describe_place(named, None)
    assert (asked["host"], asked["chip"], asked["device"]) == ("localhost", ["A800", "NVIDIA"], "cuda")
    assert asked["visible"] == ["CUDA_VISIBLE_DEVICES"]
    assert ray_place.find_pin(asked) == "node:127.0.0.1"
    chosen = ray_places.describe_place(HostPlan(Host("node0", 2, is_placeholder=True), 0, ()), None)
    assert (chosen["host"], ray_place.find_pin(chosen)) == (None, None)
    assert ray_place.find_pin(ray_places.describe_place(named, "host_0_a")) == "host_0_a"
    with pytest.raises(ray_place.PlaceError, match=r"`no\.such\.host` is not known"):
        ray_place.find_pin({**asked, "host": "no.such.host"})


def test_what_ray_changes_is_not_in_a_jobs_environment(tmp_path: Path) -> None:
    """A parent stands for Ray's process of the node, which changes what its worker has."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import json, sys; sys.path.insert(0, {str(Path(ray_place.__file__).parents[3])!r})\n"
        "from flagscale.runner.launch.ray_place import clean_environment\n"
        "print(json.dumps(clean_environment()))\n"
    )
    changed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ADDED": "1", "RAY_JOB_ID": "1"}
    code = (
        "import os, subprocess, sys\n"
        f"env = {{**os.environ, **{changed!r}}}\n"
        f"del env['LD_PRELOAD_'], env['FLAGSCALE_RUN_TOKEN_']\n"
        f"sys.exit(subprocess.run([sys.executable, {str(worker)!r}], env=env).returncode)\n"
    )
    given_env = {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "4",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "LD_PRELOAD_": "ray's own",
        "FLAGSCALE_RUN_TOKEN_": "t",
        "FLAGSCALE_RUN_TOKEN": "cluster",
        "RAY_AUTH_MODE": "token",
        "KEPT": "x y",
    }
    done = subprocess.run([sys.executable, "-c", code], env=given_env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kept = {name: value for name, value in json.loads(done.stdout).items() if name != "LC_CTYPE"}
    assert kept == {"PATH": "/bin", "OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "4,5", "KEPT": "x y"}


def test_an_act_without_ray_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "has no Ray" in ray_place.act({"env": {}, "act": "reserve"})["fault"]


# --- a cluster of our own --------------------------------------------------------------------------------------------


def ray_plan(base: Path, *hosts: Host) -> JobPlan:
    return make_plan(base, *hosts, launcher="ray", launcher_options=(("wait_s", "60"),))


def test_a_cluster_is_planned_over_the_hosts_of_the_job(tmp_path: Path) -> None:
    plan = ray_plan(tmp_path, Host("a", 4, "mlu"), Host("b", 2, "cpu"))
    answers = {"host_0_a": PORTS, "host_1_b": {**PORTS, "address": "10.0.0.2"}}
    cluster = ray_cluster.plan_cluster(plan, RUN_ID, answers)
    assert cluster == ray_cluster.plan_cluster(plan, RUN_ID, answers)
    assert cluster.exp_dir == str(tmp_path / "exp" / "runs" / RUN_ID / "ray")
    head, second = (host.processes[0] for host in cluster.hosts)
    words = [shlex.join(str(word) for word in process.argv) for process in (head, second)]
    assert "--head --port 1 " in words[0]
    assert "--address 10.0.0.1:1 --node-ip-address 10.0.0.2" in words[1]
    assert '{"host_0_a": 1, "mlu": 4}' in words[0]
    assert '{"host_1_b": 1, "cpu": 2}' in words[1]
    for host in cluster.hosts:
        scratch = f"/tmp/fs-{RUN_ID}-{host.node_rank}"
        assert host.after_stop == f"rm -rf -- {scratch}"
        assert f"mkdir -m 700 -- {scratch}" in render_script(cluster, host, host.processes[0], {})
    assert cluster.secrets == ()
    assert decode_plan(encode_plan(plan)) == plan


def test_the_files_of_a_cluster_lie_in_its_run_and_in_no_list(tmp_path: Path) -> None:
    plan = ray_plan(tmp_path, Host("localhost", 1))
    cluster = ray_cluster.plan_cluster(plan, RUN_ID, {"host_0_localhost": PORTS})
    files = ray_cluster.list_cluster_files(cluster, RUN_ID)
    assert all(Path(cluster.exp_dir) in file.path.parents for file in files)
    modes = {file.path.name: file.mode for file in files}
    assert modes["token"] == 0o600
    for file in files:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.path.write_bytes(file.content)
    run = ref_of(plan, RUN_ID)
    assert find_cluster(run) == ref_of(cluster, RUN_ID)
    spec = ref_of(cluster, RUN_ID).load_spec("host_0_localhost")
    assert spec.ending == str(ref_of(cluster, RUN_ID).notice_path)
    assert find_cluster(ref_of(make_plan(tmp_path, *TWO), RUN_ID)) is None


class FakeLinks(Links):
    """Hosts that answer with what the test gives."""

    def __init__(self, plan: JobPlan, **answers: Any) -> None:
        super().__init__(list_remotes(plan))
        self.answers = answers

    def call(self, errand: str, requests: Any, limit_s: float = 0.0) -> dict[str, Reply]:
        del errand, limit_s
        found = {label: self.answers[label.rpartition("_")[2]] for label in requests}
        return {label: Reply({}, said) if isinstance(said, str) else Reply(said) for label, said in found.items()}


HERE = {"ray": "2.61.0", "python": "3.11.7"}


def test_ray_and_python_are_the_same_on_all_hosts(tmp_path: Path) -> None:
    plan = ray_plan(tmp_path, *TWO, Host("localhost", 1))
    ray_cluster.check_versions(plan, FakeLinks(plan, a=HERE, b=HERE), HERE)
    other = {"ray": "2.62.0", "python": "3.11.7"}
    with pytest.raises(LaunchError) as caught:
        ray_cluster.check_versions(plan, FakeLinks(plan, a=other, b={"ray": None, "python": "3.11.7"}), HERE)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 3 hosts cannot take part; nothing was started"
    assert "b" in lines[1]
    assert "has no Ray for" in lines[1]
    assert "has Ray 2.61.0, and the first host 2.62.0; expected the same on all hosts" in lines[2]
    old = {"ray": "2.9.1", "python": "3.11.7"}
    with pytest.raises(LaunchError, match=r"has Ray 2\.9\.1; expected 2\.60 or newer"):
        ray_cluster.check_versions(plan, FakeLinks(plan, a=old, b="cannot be reached"), old)


def test_the_head_is_where_the_others_see_it(tmp_path: Path) -> None:
    plan = ray_plan(tmp_path, *TWO)
    loop = {**PORTS, "address": "127.0.1.1", "head": "127.0.1.1"}
    found = ray_cluster.ask_ports(plan, FakeLinks(plan, a=loop, b={**PORTS, "address": "10.0.0.2"}), {})
    assert (found["host_0_a"]["address"], found["host_1_b"]["address"]) == ("10.0.0.1", "10.0.0.2")
    with pytest.raises(LaunchError, match="does not know the head"):
        ray_cluster.ask_ports(plan, FakeLinks(plan, a=PORTS, b={"fault": "does not know the head host `a`"}), {})


def test_errands_of_ray_answer_from_their_archive() -> None:
    told = ray_errands.ports({"num": 2, "head": "localhost"})
    assert (len(told["ports"]), told["address"], told["head"]) == (2, "127.0.0.1", "127.0.0.1")
    assert "fault" in ray_errands.ports({"num": 1, "head": "no.such.host"})
    links = Links((), module="ray_errands")
    words = [sys.executable, *links.flags, "-c", links.boot]
    packed = pack_archive(build_archive(RAY_ERRANDS)) + pack_request("versions", {})
    done = subprocess.run(words, input=packed, capture_output=True, timeout=60, check=True, cwd="/")
    assert read_reply(words, 0, done.stdout.decode(), "").answer == ray_errands.versions({})


# --- who is below whom -----------------------------------------------------------------------------------------------


def test_an_agent_that_is_kept_for_another_run_is_not_below_a_job() -> None:
    """A cluster's agent must not end the agents of the job that runs in its places."""
    code = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    with subprocess.Popen([sys.executable, "-c", code], env={"PATH": "/bin:/usr/bin", KEPT: "theirs"}) as child:
        while not (below := find_descendants(child.pid, list_procs())):
            pass
        try:
            whole = find_descendants(child.pid, list_procs(), "theirs")
            assert whole == below
            assert find_descendants(child.pid, list_procs(), "ours") == set()
            assert child.pid not in {proc.pid for proc in find_ours("ours", child.pid)}
        finally:
            for pid in below:
                subprocess.run(["kill", "-KILL", str(pid)], check=False)
            child.kill()
