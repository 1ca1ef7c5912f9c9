"""Where a value came from: the last file or override that set it, by line."""

from pathlib import Path

import pytest
from factories import train_tree, write_config

from flagscale.runner.config.compose import compose_config
from flagscale.runner.config.origins import Origins, read_lines


@pytest.fixture
def origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Origins:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "base.yaml").write_text("system:\n  tp: 1\nmodel:\n  layers: 2\n")
    (tmp_path / "train" / "big.yaml").write_text("defaults:\n  - base\n  - _self_\n\nmodel:\n  layers: 9\n")
    (tmp_path / "exp.yaml").write_text(
        "defaults:\n  - train: big\n  - _self_\n\nexperiment:\n  envs:\n    A: 1\n\ntrain:\n  system:\n    tp: 4\n"
    )
    composed = compose_config(tmp_path, "exp", ["experiment.envs.A=2", "+train.model.extra=1"])
    assert composed.values["train"] == {"system": {"tp": 4}, "model": {"layers": 9, "extra": 1}}
    assert composed.find_origins is not None
    return composed.find_origins()


def test_every_place_is_known_in_the_order_of_merging(origins: Origins) -> None:
    assert origins.get("train.model.layers") == ("train/base.yaml:4", "train/big.yaml:6")
    assert origins.get("train.system.tp") == ("train/base.yaml:2", "exp.yaml:11")
    assert origins.get("experiment.envs.A") == ("exp.yaml:7", "override `experiment.envs.A=2`")
    assert origins.get("train.model.extra") == ("override `+train.model.extra=1`",)


def test_a_fault_is_placed_at_the_nearest_section_that_stands_somewhere(origins: Origins) -> None:
    assert origins.get_nearest("train.model.missing") == "train/big.yaml:5"
    assert origins.get_nearest("experiment.runner.nnodes") == "exp.yaml:5"
    assert origins.get_nearest("rl") == "exp.yaml"
    assert origins.get("rl") == ()


def test_merge_keys_stand_where_they_act(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("base: &base\n  x: 1\nuse:\n  <<: *base\n  y: 2\nrows:\n  - a\n  - b: 3\n")
    assert dict(read_lines(file, "p")) == {
        "p.base": 1, "p.base.x": 2, "p.use": 3, "p.use.x": 2, "p.use.y": 5,
        "p.rows": 6, "p.rows.0": 7, "p.rows.1": 8, "p.rows.1.b": 8,
    }  # fmt: skip


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert list(read_lines(tmp_path / "a.yaml", "")) == []


def test_list_elements_of_a_serve_file_are_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, train_tree())
    composed = compose_config(path.parent, path.stem)
    assert composed.find_origins is not None
    assert composed.find_origins().get_nearest("train.data.tokenizer.vocab_size").startswith("train/small.yaml:")
