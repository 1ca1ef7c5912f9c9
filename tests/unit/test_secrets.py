"""Secrets: found in the environment, masked everywhere else, a fault where they stand in the open."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import SITE, changed, load, train_tree, write_config

from flagscale.errors import ConfigError, Fault
from flagscale.runner.config.compose import compose_config
from flagscale.runner.config.load import Config, load_config
from flagscale.runner.config.secrets import find_secrets, is_secret, mask_fault, mask_secrets, mask_text
from flagscale.runner.launch.dry import describe_plan, render_dry_run
from flagscale.runner.plan.registry import plan_config

SECRET = "hunter2-of-all"


def tree(**experiment: Any) -> dict[str, Any]:
    return changed(train_tree(), {f"experiment.{key}": value for key, value in experiment.items()})


def load_files(folder: Path, values: dict[str, Any], *overrides: str) -> Config:
    path = write_config(folder, values)
    return load_config(compose_config(path.parent, path.stem, overrides), folder)


def test_a_secret_reaches_the_plan_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    values = tree(secrets=["HF_TOKEN", "WANDB_API_KEY"], envs={"HF_TOKEN": "${oc.env:MY_TOKEN}", "A": "1"})
    config = load_files(tmp_path, values)
    plan = plan_config(config, SITE)
    assert plan.secrets == (("HF_TOKEN", "MY_TOKEN"), ("WANDB_API_KEY", "WANDB_API_KEY"))
    shown = json.dumps(describe_plan(plan)) + render_dry_run(plan) + json.dumps(config.values)
    assert SECRET not in shown
    assert config.values["experiment"]["envs"] == {"HF_TOKEN": "***", "A": "1"}
    assert "HF_TOKEN=<secret: taken from $MY_TOKEN at launch>" in render_dry_run(plan)


def test_a_variable_that_reads_a_listed_name_is_secret_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    config = load_files(tmp_path, tree(secrets=["MY_TOKEN"], envs={"OTHER_NAME": "${oc.env:MY_TOKEN}"}))
    assert config.secrets == {"MY_TOKEN": "MY_TOKEN", "OTHER_NAME": "MY_TOKEN"}


def test_secrets_by_host_are_found_in_either_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    values = tree(secrets=["T"], envs={"nodes_envs": {"10.0.0.1": {"T": "${oc.env:MY_TOKEN}"}}})
    config = load_files(tmp_path, values)
    assert config.secrets == {"T": "MY_TOKEN"}
    assert SECRET not in json.dumps(config.values)


@pytest.mark.parametrize(
    "written",
    [SECRET, "${oc.env:MY_TOKEN}x", "Bearer ${oc.env:MY_TOKEN}", "${oc.env:MY_TOKEN,fallback}",
     "${oc.env:MY_TOKEN}${oc.env:MY_TOKEN}"],
)  # fmt: skip
def test_a_secret_in_the_open_is_a_fault_that_does_not_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    with pytest.raises(ConfigError) as caught:
        load_files(tmp_path, tree(secrets=["T"], envs={"T": written}))
    assert [fault.path for fault in caught.value.faults] == ["experiment.envs.T"]
    assert "holds a secret in the open; expected `${oc.env:T}` and nothing else" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_secret_typed_as_an_override_is_masked_in_the_place_of_the_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_files(tmp_path, tree(secrets=["T"]), f"+experiment.envs.T={SECRET}", "+experiment.runner.nnode=1")
    assert SECRET not in str(caught.value)
    assert "override `+experiment.envs.T=***`" in str(caught.value)


@pytest.mark.parametrize("path", ["train.data.data_path", "experiment.exp_name", "experiment.cmds.before_start"])
def test_a_secret_on_a_command_line_or_in_a_script_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    values = changed(tree(secrets=["MY_TOKEN"]), {path: "see ${oc.env:MY_TOKEN}"})
    with pytest.raises(ConfigError) as caught:
        load_files(tmp_path, values)
    assert [fault.path for fault in caught.value.faults] == [path]
    assert SECRET not in str(caught.value)


def test_a_malformed_list_still_hides(tmp_path: Path) -> None:
    values = tree(secrets="T", envs={"T": SECRET})
    with pytest.raises(ConfigError) as caught:
        load_files(tmp_path, changed(values, {"experiment.exp_name": [SECRET]}))
    assert "experiment.secrets: is `T`; expected a list" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_one_name_read_from_two_sources_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "first-secret")
    monkeypatch.setenv("B_TOKEN", "second-secret")
    hosts = {"h1": {"T": "${oc.env:A_TOKEN}"}, "h2": {"T": "${oc.env:B_TOKEN}"}}
    with pytest.raises(ConfigError, match=r"reads \$B_TOKEN, but elsewhere `T` is read from \$A_TOKEN"):
        load_files(tmp_path, tree(secrets=["T"], node_specific=hosts))


@pytest.mark.parametrize("default", ["null", "''", '""'])
def test_an_unset_secret_hides_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default: str) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    config = load_files(tmp_path, tree(secrets=["T"], seed=None, envs={"T": f"${{oc.env:MY_TOKEN,{default}}}"}))
    assert config.secrets == {"T": "MY_TOKEN"}
    assert config.values["experiment"]["exp_name"] == "demo"


def test_names_of_secrets_are_names_of_variables() -> None:
    with pytest.raises(ConfigError, match=r"experiment\.secrets\.0: is `A B`; expected a name of a variable"):
        load(tree(secrets=["A B"]))


def test_no_list_no_secrets() -> None:
    assert find_secrets({"experiment": {"envs": {"T": "x"}}}, {}) == ({}, frozenset(), [])
    assert find_secrets({}, {}) == ({}, frozenset(), [])


def test_short_secrets_are_looked_for_whole_and_long_ones_within() -> None:
    assert is_secret("abc", {"abc"})
    assert not is_secret("abcd", {"abc"})
    assert is_secret("x" + SECRET, {SECRET})
    assert is_secret(123456, {"123456"})
    assert not is_secret(None, {"None"})
    assert not is_secret(True, {"True"})


def test_masking_keeps_the_shape() -> None:
    hidden = frozenset({SECRET, "12345678"})
    node = {"a": [SECRET, 1, {"b": f"x{SECRET}"}], "n": 12345678, "c": None}
    assert mask_secrets(node, hidden) == {"a": ["***", 1, {"b": "***"}], "n": "***", "c": None}
    assert mask_text(f"a {SECRET} b", hidden) == "a *** b"
    assert mask_text("abcdef abc", {"abc", "abcdef"}) == "*** ***"
    fault = mask_fault(Fault("p", SECRET, SECRET, SECRET, SECRET), hidden)
    assert str(fault) == "***: p: ***; expected ***; did you mean `***`?"
