"""Two spellings of one idea load into one field; two that differ are a fault."""

from typing import Any

import pytest
from factories import load, serve_tree, train_tree

from flagscale.errors import ConfigError
from flagscale.runner.config.spellings import unify_spellings


def unified(experiment: Any) -> tuple[Any, dict[str, str], list[str]]:
    values, written, faults = unify_spellings({"experiment": experiment})
    return values["experiment"], written, [str(fault) for fault in faults]


def test_deploy_moves_under_runner() -> None:
    experiment, written, faults = unified({"deploy": {"port": 1}, "runner": {"nnodes": 2}})
    assert experiment == {"runner": {"nnodes": 2, "deploy": {"port": 1}}}
    assert written == {"experiment.runner.deploy": "experiment.deploy"}
    assert faults == []


def test_deploy_twice_is_fine_while_both_say_the_same() -> None:
    assert unified({"deploy": {"port": 1}, "runner": {"deploy": {"port": 1}}})[2] == []
    assert unified({"deploy": {"port": 1}, "runner": {"deploy": {"port": 2}}})[2] == [
        "experiment.deploy: differs from experiment.runner.deploy, which means the same"
    ]


@pytest.mark.parametrize("runner", ["ssh", [1], 3, True])
def test_a_runner_that_is_no_mapping_is_left_for_the_model(runner: Any) -> None:
    assert unified({"deploy": {"port": 1}, "runner": runner})[0]["runner"] == runner


@pytest.mark.parametrize("nulls", [{"deploy": None}, {"nodes_envs": None}, {"envs": {"node_specific": None}}])
def test_null_is_as_good_as_left_out(nulls: dict[str, Any]) -> None:
    tree = train_tree()
    tree["experiment"] |= nulls
    assert load(tree).experiment.node_specific == {}


@pytest.mark.parametrize("where", ["experiment.nodes_envs", "experiment.node_specific", "experiment.envs.nodes_envs"])
def test_environment_by_host_loads_from_every_spelling(where: str) -> None:
    config = load(serve_tree(**{where: {"h1": {"A": 1, "B": None, "C": True}}}))
    assert config.experiment.node_specific == {"h1": {"A": "1", "C": "True"}}
    assert config.experiment.envs == {"GREETING": "hello"}


def test_environment_by_chip_may_stand_inside_envs() -> None:
    config = load(train_tree(experiment__envs={"A": 1e-5, "device_type_specific": {"mlu590": {"M": "0,1"}}}))
    assert config.experiment.device_type_specific == {"mlu590": {"M": "0,1"}}
    assert config.experiment.envs == {"A": "1e-05"}


def test_two_spellings_that_differ_are_a_fault_under_the_path_that_was_written() -> None:
    tree = train_tree(experiment__nodes_envs={"h": {"A": 1}}, experiment__envs={"node_specific": {"h": {"A": 2}}})
    with pytest.raises(ConfigError, match=r"experiment\.envs\.node_specific: differs from experiment\.nodes_envs"):
        load(tree)


def test_a_fault_is_told_under_the_path_that_was_written() -> None:
    with pytest.raises(
        ConfigError, match=r"experiment\.deploy\.prot: there is no key `prot` here; did you mean `port`"
    ):
        load(serve_tree(experiment__deploy={"prot": 80}))
    with pytest.raises(ConfigError, match=r"experiment\.envs\.node_specific\.h\.A: is"):
        load(train_tree(experiment__envs={"node_specific": {"h": {"A": [1]}}}))


@pytest.mark.parametrize("values", [{}, {"experiment": None}, {"experiment": [1]}, {"experiment": "x"}])
def test_what_is_not_shaped_like_a_configuration_passes_unchanged(values: dict[str, Any]) -> None:
    assert unify_spellings(values) == (values, {}, [])


def test_hyphens_and_underscores_are_one() -> None:
    config = load(train_tree(experiment__runner={"nproc-per-node": 2, "ssh-port": 22}))
    assert config.experiment.runner.nproc_per_node == 2
    with pytest.raises(ConfigError, match="`nproc_per_node` stands here in two spellings that differ"):
        load(train_tree(experiment__runner={"nproc-per-node": 2, "nproc_per_node": 4}))
