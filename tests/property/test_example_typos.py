"""Laws of misspelling: one wrong letter in any key of a shipped example is found, placed, and answered with a name.

A typo is made in the text of a copy of the example's folder, so that file, line and dotted path are tested as a user
meets them. Free maps (`envs`) and Hydra's own section take any name and are left out.
"""

import re
import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import EXPERIMENTS, name_of
from factories import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.errors import ConfigError, Fault
from flagscale.runner.config.arguments import CUSTOMARY_GROUPS, LAUNCHER_KEYS
from flagscale.runner.config.catalogue import load_catalogue
from flagscale.runner.config.compose import compose_config
from flagscale.runner.config.load import HYDRA_KEYS, ROOT_KEYS, Config, load_config
from flagscale.runner.config.section import Section
from flagscale.runner.config.spellings import ENVIRONMENT_MAPS
from flagscale.runner.config.tasks import Train

FREE = re.compile(r"hydra\..*|defaults\..*|experiment\.(envs|node_specific|device_type_specific)\..*")
LETTERS = string.ascii_lowercase
LAW = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
FEW = settings(LAW, max_examples=10)


@dataclass(frozen=True)
class Key:
    """A key as it stands in a file: `text[start:end]`, under the dotted path `parent`, beside `siblings`."""

    experiment: Path
    file: Path
    parent: str
    name: str
    start: int
    end: int
    siblings: frozenset[str]

    def path(self, name: str) -> str:
        return f"{self.parent}.{name}" if self.parent else name


def keys_of(experiment: Path, file: Path, package: str) -> Iterator[Key]:
    root = yaml.compose(file.read_text(), Loader=yaml.SafeLoader)
    yield from _walk(root, package, experiment, file)


def _walk(node: yaml.Node, path: str, experiment: Path, file: Path) -> Iterator[Key]:
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _walk(child, f"{path}.{index}", experiment, file)
    if not isinstance(node, yaml.MappingNode):
        return
    names = frozenset(str(key.value) for key, _ in node.value)
    for key, child in node.value:
        found = Key(experiment, file, path, str(key.value), key.start_mark.index, key.end_mark.index, names)
        yield found
        yield from _walk(child, found.path(found.name), experiment, file)


def size_file(experiment: Path) -> Path:
    chosen = next(row["train"] for row in yaml.safe_load(experiment.read_text())["defaults"] if isinstance(row, dict))
    return experiment.parent / "train" / f"{chosen}.yaml"


ALL_KEYS = [
    key
    for experiment in EXPERIMENTS
    for file, package in ((experiment, ""), (size_file(experiment), "train"))
    for key in keys_of(experiment, file, package)
]
KEYS = [key for key in ALL_KEYS if not FREE.fullmatch(key.path(key.name))]
ARGUMENTS = [key for key in KEYS if key.file.parent.name == "train" and "_" in key.name]


def _section_names(model: type[Section]) -> Iterator[str]:
    for kind in model.__subclasses__():
        yield from kind.model_fields
        yield from _section_names(kind)


SECTION_NAMES = frozenset((*_section_names(Section), *ROOT_KEYS, *HYDRA_KEYS, *ENVIRONMENT_MAPS))


def is_known(key: Key, name: str) -> bool:
    """Whether the name means something where the key stands, so that it is no typo."""
    spelled = name.replace("-", "_")
    if not spelled.strip("_") or name in key.siblings:
        return True
    if key.parent.startswith("train."):
        return bool(load_catalogue("megatron").find(spelled)) or spelled in {*CUSTOMARY_GROUPS, *LAUNCHER_KEYS}
    return spelled in (Train.model_fields if key.parent == "train" else SECTION_NAMES)


@st.composite
def typos(draw: st.DrawFn, word: str) -> str:
    """The word with one letter dropped, doubled, replaced, or swapped with the next."""
    at = draw(st.integers(0, len(word) - 1))
    head, letter, tail = word[:at], word[at], word[at + 1 :]
    match draw(st.sampled_from(["drop", "double", "replace", "swap"])):
        case "drop":
            return head + tail
        case "double":
            return head + letter + letter + tail
        case "swap" if tail:
            return head + tail[0] + letter + tail[1:]
    return head + draw(st.sampled_from(LETTERS)) + tail


@st.composite
def misspelt_keys(draw: st.DrawFn) -> tuple[Key, str]:
    key = draw(st.sampled_from(KEYS))
    return key, draw(typos(key.name).filter(lambda name: not is_known(key, name)))


def load_with(key: Key, name: str, folder: Path) -> Config:
    """The key's experiment with that one key renamed, from a copy in `folder`."""
    conf = folder / "conf"
    shutil.rmtree(conf, ignore_errors=True)
    shutil.copytree(key.experiment.parent, conf)
    text = key.file.read_text()
    (conf / key.file.relative_to(key.experiment.parent)).write_text(text[: key.start] + name + text[key.end :])
    return load_config(compose_config(conf, key.experiment.stem), ROOT)


def faults_with(key: Key, name: str, folder: Path) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        load_with(key, name, folder)
    assert all(str(fault) in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


@LAW
@given(misspelt=misspelt_keys())
def test_a_typo_in_any_key_is_reported_with_file_path_and_suggestion(misspelt: tuple[Key, str], tmp_path: Path) -> None:
    key, name = misspelt
    faults = [fault for fault in faults_with(key, name, tmp_path) if fault.path == key.path(name)]
    assert len(faults) == 1, "the typo is reported once, under its own dotted path"
    line = key.file.read_text()[: key.start].count("\n") + 1
    where = tmp_path / "conf" / key.file.relative_to(key.experiment.parent)
    assert faults[0].where == f"{where}:{line}"
    assert faults[0].suggestion is not None
    assert is_known(key, faults[0].suggestion.rpartition(".")[2]), "what is suggested exists"


@FEW
@given(key=st.sampled_from(ARGUMENTS))
def test_hyphens_for_underscores_are_no_typo(key: Key, tmp_path: Path) -> None:
    plain = load_with(key, key.name, tmp_path)
    hyphened = load_with(key, key.name.replace("_", "-"), tmp_path)
    assert [(row.name, row.value) for row in hyphened.arguments[0]] == [
        (row.name, row.value) for row in plain.arguments[0]
    ]


@pytest.mark.parametrize("name", [name_of(path) for path in EXPERIMENTS])
@settings(LAW, max_examples=4)
@given(data=st.data())
def test_a_typo_in_the_defaults_names_the_folder_and_the_nearest_file(
    name: str, data: st.DataObject, tmp_path: Path
) -> None:
    experiment = (ROOT / "examples" / name.replace("/", "/conf/")).with_suffix(".yaml")
    size = size_file(experiment)
    there = {path.stem for path in size.parent.glob("*.yaml")}
    group = data.draw(st.sampled_from(["train", typo_of("train", data)]))
    chosen = typo_of(size.stem, data) if group == "train" else size.stem
    if (group == "train" and chosen in there) or not chosen:
        return
    conf = tmp_path / "conf"
    shutil.rmtree(conf, ignore_errors=True)
    shutil.copytree(experiment.parent, conf)
    text = experiment.read_text()
    (conf / experiment.name).write_text(text.replace(f"train: {size.stem}", f"{group}: {chosen}", 1))
    with pytest.raises(ConfigError) as caught:
        load_config(compose_config(conf, experiment.stem), ROOT)
    (fault,) = caught.value.faults
    assert (fault.where or "").startswith(str(conf))
    assert fault.suggestion in {f"train/{stem}" for stem in there}
    assert f"{group}/{chosen}" in str(fault)


def typo_of(word: str, data: st.DataObject) -> str:
    return data.draw(typos(word).filter(lambda name: name != word))


def test_the_keys_that_are_drawn_cover_both_levels_and_every_example() -> None:
    assert {key.experiment for key in KEYS} == set(EXPERIMENTS)
    drawn = {key.path(key.name) for key in KEYS}
    assert {"experiment", "defaults", "hydra", "action", "experiment.runner.nnodes"} <= drawn
    assert {"train.model.hidden_size", "train.system.precision", "train.data.tokenizer"} <= drawn
    assert not any(path.startswith(("experiment.envs.", "hydra.")) for path in drawn)
