"""Composing YAML: what is refused is one message with a place; what cannot be resolved comes together."""

from pathlib import Path

import pytest
from factories import compress_tree, train_tree, write_config

from flagscale.errors import ConfigError, UserError
from flagscale.runner.config.compose import Composed, compose_config, split_config_path


def compose(folder: Path, text: str, *overrides: str) -> Composed:
    (folder / "exp.yaml").write_text(text)
    return compose_config(folder, "exp", overrides)


def faults_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(folder, text, *overrides)
    return str(caught.value)


def test_values_leave_as_plain_dicts_without_hydras_own_node(tmp_path: Path) -> None:
    path = write_config(tmp_path, compress_tree())
    composed = compose_config(path.parent, path.stem)
    assert type(composed.values) is dict
    assert set(composed.values) == {"experiment", "action", "compress"}
    assert type(composed.values["compress"]["compress_args"]["quantization"]) is list


def test_overrides_change_add_and_delete(tmp_path: Path) -> None:
    text = "a: {b: 1, c: 2}\n"
    values = compose(tmp_path, text, "a.b=5", "+a.d=x y", "++a.e=[1,2]", "~a.c").values
    assert values == {"a": {"b": 5, "d": "x y", "e": [1, 2]}}


def test_keys_are_strings_whatever_yaml_reads(tmp_path: Path) -> None:
    assert compose(tmp_path, "a: {1: x, 1.5: {2: y}}\nb: [{3: z}]\n").values == {
        "a": {"1": "x", "1.5": {"2": "y"}},
        "b": [{"3": "z"}],
    }


def test_hydras_own_resolvers_work(tmp_path: Path) -> None:
    composed = compose(tmp_path, "a: ${hydra:job.config_name}\n")
    assert composed.values == {"a": "exp"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "exp.yaml:3: found duplicate key a"),
        ("a: [1, 2\nb: 3\n", "exp.yaml:2: expected ',' or ']'"),
        ("a:\n\t- 1\n", "exp.yaml:2: found character '\\t'"),
        ("a: !!int abc\n", "exp.yaml: cannot be read: invalid literal"),
        ("a: !!timestamp abc\n", "exp.yaml: cannot be read"),
        ("a: !!python/object/apply:os.system [exit]\n", "exp.yaml:1: could not determine a constructor"),
        ("a: &x [*x]\n", "holds itself by an anchor"),
        ("a: " + "[" * 700, "nested too deeply"),
        ("a: " + "9" * 5000 + "\n", "exp.yaml: cannot be read"),
        ("- a\n- b\n", "primary config 'exp' must be a DictConfig"),
        ("a: \x07\n", "exp.yaml: special characters are not allowed (at byte 3)"),
        ("x: 1\ni: '${'\n", "exp.yaml:2: i: is not an interpolation that can be read"),
        ("hydra: 3\n", "int is not a subclass of HydraConf"),
        ("defaults: 3\n", "defaults must be a list"),
    ],
)  # fmt: skip
def test_what_yaml_or_hydra_refuses_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    message = faults_of(tmp_path, text)
    assert says in message
    assert "\n" not in message


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "exp.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"exp\.yaml: cannot be read: 'utf-8' codec"):
        compose_config(tmp_path, "exp")


def test_a_missing_group_and_a_missing_file_have_their_nearest_names(tmp_path: Path) -> None:
    write_config(tmp_path, train_tree())
    assert "did you mean `train/small`?" in faults_of(tmp_path, "defaults: [_self_, {train: smal}]\n")
    with pytest.raises(ConfigError, match="did you mean `exp`"):
        compose_config(tmp_path, "exq")
    with pytest.raises(ConfigError, match="expected one of exp"):
        compose_config(tmp_path, "zzzzzz")


def test_split_config_path_takes_a_path_with_or_without_suffix(tmp_path: Path) -> None:
    write_config(tmp_path, train_tree())
    assert split_config_path(tmp_path / "exp") == split_config_path(tmp_path / "exp.yaml") == (tmp_path, "exp")
    with pytest.raises(UserError, match=r"did you mean `exp\.yaml`"):
        split_config_path(tmp_path / "ex.yaml")
    with pytest.raises(UserError, match="no such configuration"):
        split_config_path(tmp_path / "nowhere" / "ex.yaml")


def test_all_that_cannot_be_resolved_is_told_together(tmp_path: Path) -> None:
    text = """\
a: ${b}
b: ${a}
path: ${data_path:??}
home: ${env:X}
name: ${oc.env:NO_SUCH_VARIABLE}
gap: ???
lost: ${nope.x}
made: ${no_resolver:1}
fine: ${gone}
"""
    lines = faults_of(tmp_path, text + "gone: 1\n").splitlines()
    assert lines[0] == "8 faults in the configuration:"
    found = {line.split(": ")[1]: line for line in lines[1:]}
    assert list(found) == ["a", "b", "path", "home", "name", "gap", "lost", "made"]
    for number, line in enumerate(lines[1:], 1):
        assert line.lstrip().split(": ")[0].endswith(f"exp.yaml:{number}")
    assert "for one from the environment: `${oc.env:DATA_PATH}`" in found["path"]
    assert "expected `${oc.env:X}`" in found["home"]
    assert "Environment variable 'NO_SUCH_VARIABLE' not found" in found["name"]
    assert "KeyError" not in found["name"]
    assert "expected a value in the file, or gap=<value>" in found["gap"]


def test_a_misspelt_name_stands_beside_the_interpolation_that_it_breaks(tmp_path: Path) -> None:
    tree = train_tree()
    tree["experiment"]["runer"] = tree["experiment"].pop("runner")
    tree["experiment"]["exp_name"] = "${experiment.runner.nproc_per_node}"
    path = write_config(tmp_path, tree)
    with pytest.raises(ConfigError) as caught:
        compose_config(path.parent, path.stem)
    assert [(fault.path, fault.suggestion) for fault in caught.value.faults] == [
        ("experiment.exp_name", None),
        ("experiment.runer", "runner"),
    ]


def test_what_is_read_from_the_environment_is_not_in_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "hunter2")
    message = faults_of(tmp_path, "x: ${made.of.${oc.env:A_TOKEN}}\n")
    assert "hunter2" not in message
    assert "$A_TOKEN" in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("a.zz=1", "override `a.zz=1`: Could not override 'a.zz': Key 'zz' is not in struct. To append"),
        ("+a.b=1", "override `+a.b=1`: Could not append to config. An item is already at 'a.b'. Either remove +"),
        ("~a.z", "override `~a.z`: Could not delete from config"),
        ("a.b=[1", "override `a.b=[1`: cannot be read"),
        ("a b=1", "override `a b=1`: cannot be read"),
        ("", "override ``: cannot be read"),
        ("a.b=${nope}", "override `a.b=${nope}`: a.b: `${nope}` cannot be resolved"),
        ("+a.c='", "override `+a.c='`: cannot be read"),
        ("+a.c=x\0y", "cannot be read"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, says: str) -> None:
    assert says in faults_of(tmp_path, "a: {b: 1}\n", override)


def test_an_override_with_an_unknown_name_has_the_nearest_one(tmp_path: Path) -> None:
    assert "did you mean `learning_rate`?" in faults_of(tmp_path, "a: {learning_rate: 1}\n", "a.learning_rat=2")


def test_references_of_every_kind_are_seen(tmp_path: Path) -> None:
    text = """\
experiment: {seed: 1, own: {deep: 2}, list: [7]}
train:
  near: 5
  a: ${experiment.seed}
  b: ${..experiment.own.deep}
  c: ${.near}
  d: ${oc.select:experiment.maybe,3}
  e: ${experiment.list[0]}
  f: pre-${experiment.seed}-${train.near}
  g: ${oc.env:HOME,""}
"""
    assert compose(tmp_path, text).references >= {
        "experiment.seed", "experiment.own.deep", "train.near", "experiment.maybe", "experiment.list.0",
    }  # fmt: skip


def test_values_from_the_environment_are_known_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "hunter2")
    composed = compose(tmp_path, "e: {t: '${oc.env:A_TOKEN}', l: ['x${oc.env:A_TOKEN}']}\n")
    assert composed.environment == {"e.t": "${oc.env:A_TOKEN}", "e.l.0": "x${oc.env:A_TOKEN}"}
    assert composed.values == {"e": {"t": "hunter2", "l": ["xhunter2"]}}
