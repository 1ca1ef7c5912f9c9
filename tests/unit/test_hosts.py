"""Which hosts run how many ranks: what was asked for, or a fault."""

from typing import Any

import pytest
from factories import hosts, train_tree

from flagscale.runner.config.experiment import Experiment
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.hosts import choose_hosts


def choose(listed: tuple[Host, ...] | None, envs: dict[str, str] | None = None, **runner: Any) -> Any:
    tree = train_tree()["experiment"]
    experiment = Experiment.model_validate({**tree, "runner": runner, "envs": envs or {}})
    chosen, faults, warnings = choose_hosts(experiment, listed)
    return [(host.name, host.slots) for host in chosen], [*map(str, faults)], [*map(str, warnings)]


def test_without_a_hostfile_the_job_runs_here() -> None:
    assert choose(None) == ([("localhost", 1)], [], [])
    assert choose(None, nproc_per_node=4) == ([("localhost", 4)], [], [])
    assert choose(None, {"CUDA_VISIBLE_DEVICES": "0,1,3"}) == ([("localhost", 3)], [], [])


def test_more_nodes_than_there_are_is_a_fault() -> None:
    assert choose(None, nnodes=2)[1] == [
        "experiment.runner.nnodes: is 2, but there is no hostfile; expected experiment.runner.hostfile"
    ]
    assert choose(hosts(2), nnodes=3)[1] == ["experiment.runner.nnodes: is 3, but the hostfile names 2 hosts"]


def test_fewer_nodes_than_listed_is_a_warning_that_names_who_stays_idle() -> None:
    chosen, faults, warnings = choose(hosts(3), nnodes=1)
    assert (chosen, faults) == ([("node0", 8)], [])
    assert warnings == ["experiment.runner.nnodes: is 1: of the hostfile's 3 hosts these stay idle: node1, node2"]


@pytest.mark.parametrize(("nnodes", "count"), [("2", 2), ("2:4", 2), (None, 3), (3, 3)])
def test_nnodes_counts_its_minimum(nnodes: Any, count: int) -> None:
    assert len(choose(hosts(3), nnodes=nnodes)[0]) == count


@pytest.mark.parametrize("nnodes", ["0", "-1", "two", "2:x", "1:", ":2", "9" * 5000, ""])
def test_nnodes_that_is_no_number(nnodes: str) -> None:
    assert "expected a whole number above 0, or `min:max`" in choose(hosts(3), nnodes=nnodes)[1][0]


def test_ranks_are_never_fewer_than_asked_for() -> None:
    assert choose(hosts(2, slots=8), nproc_per_node=4)[0] == [("node0", 4), ("node1", 4)]
    assert choose(hosts(1, slots=2), nproc_per_node=4, hostfile="h")[1] == [
        "experiment.runner.nproc_per_node: is 4, but its hostfile line has 2 slots on node0"
    ]
    assert choose(hosts(1), {"CUDA_VISIBLE_DEVICES": "0,1"}, nproc_per_node=4)[1] == [
        "experiment.runner.nproc_per_node: is 4, but only 2 devices are visible on node0"
    ]
    assert choose(hosts(1), {"CUDA_VISIBLE_DEVICES": "0,1"})[0] == [("node0", 2)]


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_hiding_every_device_is_how_a_cpu_job_is_written(hidden: str) -> None:
    assert choose(None, {"CUDA_VISIBLE_DEVICES": hidden}, nproc_per_node=4) == ([("localhost", 4)], [], [])


def test_only_the_chips_own_variable_counts() -> None:
    envs = {"CUDA_VISIBLE_DEVICES": "0"}
    assert choose(hosts(1, chip="cpu"), envs, nproc_per_node=4)[1] == []
    assert choose(hosts(1, chip="A800"), envs, nproc_per_node=4)[1] != []
    assert choose(None, envs, nproc_per_node=4, device_type="cpu")[:2] == ([("localhost", 4)], [])


def test_the_first_host_must_be_reachable_by_its_name() -> None:
    listed = (Host("localhost", 8), Host("node1", 8))
    assert "experiment.runner.master_addr: is missing: the first host is `localhost`" in choose(listed)[1][0]
    assert choose(listed, master_addr="10.0.0.1")[1] == []
    assert choose(listed, per_node_task=True)[1] == []
    assert choose((Host("localhost", 8), Host("127.0.0.1", 8)))[1] == []


def test_a_cloud_platform_says_who_this_machine_is() -> None:
    faults = choose(None, type="cloud")[1]
    assert [fault.split(":")[0].removeprefix("experiment.runner.") for fault in faults] == [
        "node_rank", "master_addr", "master_port", "nnodes",
    ]  # fmt: skip
    whole = {"type": "cloud", "master_addr": "m", "master_port": 1, "nnodes": 2, "nproc_per_node": 8}
    assert choose(None, node_rank=1, **whole) == ([("localhost", 8)], [], [])
    assert choose(None, node_rank=2, **whole)[1] == [
        "experiment.runner.node_rank: is 2, but runner.nnodes is 2; expected 0 to 1"
    ]
