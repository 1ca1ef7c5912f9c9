"""`flagscale explain` and `flagscale dryrun`: where a value came from, and what would run."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import train_tree, write_config

from flagscale.cli import main


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, train_tree()).relative_to(tmp_path)


def explain(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["explain", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_value_and_its_place(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = 1 + Path("train/small.yaml").read_text().splitlines().index("  num_layers: 4")
    assert explain(capsys, config, "train.model.num_layers") == (
        f"train.model.num_layers: 4\n    train/small.yaml:{line}\n"
    )


def test_what_an_override_won_over(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = explain(capsys, config, "train.model.num_layers", "train.model.num_layers=8").splitlines()
    assert out[:2] == ["train.model.num_layers: 8", "    override `train.model.num_layers=8`"]
    assert out[2].startswith("    over train/small.yaml:")


def test_options_may_stand_between_overrides(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = explain(capsys, config, "experiment.exp_name=a", "--json", "experiment.exp_name", "~action")
    assert json.loads(out) == {
        "experiment.exp_name": {"value": "a", "set_by": ["exp.yaml:5", "override `experiment.exp_name=a`"]}
    }


def test_a_section_is_all_its_keys(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = explain(capsys, config, "train.data")
    assert [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")] == [
        "train.data.mock_data", "train.data.tokenizer.tokenizer_type", "train.data.tokenizer.vocab_size",
    ]  # fmt: skip
    assert "experiment.exp_dir" in explain(capsys, config)


def test_an_unknown_key_has_the_nearest_one(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(config), "train.model.num_layer"]) == 2
    assert "there is no such key; did you mean `train.model.num_layers`?" in capsys.readouterr().err


def test_secrets_are_masked_in_values_and_in_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", "hunter2-from-env")
    envs = {"T": "${oc.env:MY_TOKEN}", "node_specific": {"h": {"T": "${oc.env:MY_TOKEN}"}}}
    config = write_config(tmp_path, train_tree(experiment__secrets=["T", "U"], experiment__envs=envs))
    for words in ([], ["--json"], ["experiment.envs"]):
        out = explain(capsys, config, "+experiment.envs.U=hunter3-typed", *words)
        assert "hunter" not in out
        assert "***" in out


def test_configurations_that_are_not_there(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "exq.yaml"]) == 2
    assert "did you mean `exp.yaml`?" in capsys.readouterr().err
    assert main(["explain", "no_such_model"]) == 2
    assert "there is no example `no_such_model` with a train.yaml" in capsys.readouterr().err
    assert config.is_file()


def test_dryrun_is_text_or_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dryrun", str(config), "experiment.exp_name=mine"]) == 0
    assert capsys.readouterr().out.startswith("# mine: train with megatron on 1 host(s), 2 ranks\n")
    assert main(["dryrun", str(config), "experiment.exp_name=mine", "--json", "experiment.exp_dir=/x"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["plan"]["exp_name"] == "mine"
    assert described["plan"]["exp_dir"] == "/x"
    assert described["hosts"][0]["processes"][0]["argv"][0] == "torchrun"
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["exp.yaml", "train"]


def test_warnings_stand_beside_the_output(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+train.model.brand_new=1", "+experiment.task.unknown_args=warn"]
    assert main(["dryrun", str(config), *words]) == 0
    captured = capsys.readouterr()
    assert "--brand-new 1" in captured.out
    assert captured.err.startswith("warning: override `+train.model.brand_new=1`: train.model.brand_new: Megatron-LM")


def test_faults_are_messages(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dryrun", str(config), "train.model.num_layers=x", "action=rnu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 2 faults in the configuration:\n")
    assert "Traceback" not in err
