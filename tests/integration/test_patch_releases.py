"""Patch sets of this project on releases of the package index: how they carry over, and that every outcome occurs."""

import json

import pytest
from factories import ROOT

from flagscale.cli.patch import main as patch
from flagscale.errors import SourceError

pytestmark = pytest.mark.slow

MEGATRON = ("0.16.1", "0.17.1", "0.18.2", "0.19.0", "0.19.1", "0.19.2")
VLLM = ("0.6.0", "0.6.6", "0.7.3", "0.8.5", "0.9.0", "0.9.2", "0.10.0", "0.10.2", "0.11.0", "0.11.2", "0.12.0")
LOGGING = ROOT / "tests" / "fixtures" / "patches" / "vllm_logging" / "vllm"


def verify(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, str]]:
    """Release -> patch -> outcome; skips where the index is not reached."""
    try:
        patch(["verify", *words, "--json"])
    except SourceError as error:
        pytest.skip(f"the package index cannot be reached: {str(error).splitlines()[0]}")
    table: dict[str, dict[str, str]] = {}
    for row in json.loads(capsys.readouterr().out)["verdicts"]:
        table.setdefault(row["release"], {})[row["patch"]] = row["kind"]
    return table


def test_generic_cpu_fits_the_releases_of_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    table = verify(capsys, "megatron", "--device-type", "Generic_CPU", "--against", *MEGATRON)
    assert set(table) == set(MEGATRON)
    for release in ("0.19.0", "0.19.1", "0.19.2"):
        assert set(table[release].values()) == {"clean"}
    carried = [sum(outcome == "clean" for outcome in table[release].values()) for release in MEGATRON]
    assert carried == sorted(carried)


def test_one_line_changes_over_vllm_show_every_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    table = verify(capsys, "vllm", "--series", str(LOGGING), "--against", *VLLM)
    outcomes = {outcome for row in table.values() for outcome in row.values()}
    assert outcomes == {"clean", "three-way", "conflict", "already upstream", "obsolete"}
    assert set(table["0.8.5"].values()) == {"clean"}
    assert table["0.12.0"]["vllm/entrypoints/launcher.py.patch"] == "already upstream"
    assert table["0.12.0"]["vllm/utils.py.patch"] == "obsolete"
