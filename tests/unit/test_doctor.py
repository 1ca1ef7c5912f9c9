"""The doctor names what is missing and how to get it, and fails only for what every job needs."""

import json
from pathlib import Path

import pytest

from flagscale import env
from flagscale.chips import Device, find_chip
from flagscale.chips.probe import Probe
from flagscale.cli import doctor
from flagscale.cli.doctor import Finding, find_all, main


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, object]]]:
    code = main(["--json"])
    return code, {row["name"]: row for row in json.loads(capsys.readouterr().out)["findings"]}


def test_every_missing_thing_has_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = findings(capsys)
    assert code == 0
    assert rows["pydantic"]["found"]
    assert {name for name, row in rows.items() if row["found"] is None and not row["remedy"]} == set()


def test_a_fetched_source_is_seen_and_a_missing_one_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.SOURCE_DIR, str(tmp_path))
    code, rows = findings(capsys)
    assert code == 0
    assert rows["Megatron-LM"] == {
        "group": "train",
        "name": "Megatron-LM",
        "found": None,
        "remedy": "flagscale source fetch megatron",
        "needed": False,
    }


def test_a_state_folder_that_cannot_be_written_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(env.STATE_DIR, str(tmp_path / "file" / "state"))
    code, rows = findings(capsys)
    assert code == 1
    assert env.STATE_DIR in str(rows["list of runs"]["remedy"])


def test_a_missing_package_that_every_job_needs_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_version", lambda name: None if name == "hydra-core" else "1.0")
    code, rows = findings(capsys)
    assert code == 1
    assert rows["hydra-core"]["remedy"] == "pip install -e ."


def test_the_table_shows_every_finding_and_its_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    doctor._print_table(
        (Finding("train", "numpy", None, 'pip install -e ".[train]"'), Finding("train", "torch", "2.0"))
    )
    shown = capsys.readouterr().out
    assert 'pip install -e ".[train]"' in shown
    assert "missing" in shown
    assert "torch" in shown


def test_nothing_heavy_is_imported_to_find_out() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from flagscale.cli.doctor import find_all; find_all(); "
        "print([name for name in ('torch', 'ray', 'vllm', 'hydra', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_groups_stand_together() -> None:
    groups = [row.group for row in find_all()]
    assert len(set(groups)) == len([a for a, b in zip(groups, [*groups[1:], ""], strict=True) if a != b])


def test_transformer_engine_is_looked_for_beside_nvidia_s_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    def names_on(chip: str, *devices: Device) -> set[str]:
        found = find_chip(chip)
        assert found
        monkeypatch.setattr("flagscale.chips.probe.probe_host", lambda: Probe(found, devices, "a tool", ()))
        return {row.name for row in find_all()}

    assert "transformer_engine" in names_on("H100", Device(0, "H100"))
    assert "transformer_engine" not in names_on("MLU590", Device(0, "MLU590"))
    assert "transformer_engine" not in names_on("H100")
