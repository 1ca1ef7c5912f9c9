"""The start-up benchmark measures what it says: its inputs work, and a broken promise is told by the exit code."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import patches  # noqa: E402
import startup  # noqa: E402


def test_both_sides_run_and_the_dry_run_is_of_all_hosts(tmp_path: Path) -> None:
    job, empty = startup.write_inputs(tmp_path)
    shown = subprocess.run(job, check=True, capture_output=True, text=True).stdout
    assert shown.count("# ==== host_") == startup.NUM_HOSTS
    fewer, _ = startup.write_inputs(tmp_path / "fewer", 16)
    shown = subprocess.run(fewer, check=True, capture_output=True, text=True).stdout
    assert shown.count("# ==== host_") == 16
    assert subprocess.run(empty, check=True, capture_output=True, text=True).stdout == ""


def test_a_kept_and_a_broken_promise(capsys: pytest.CaptureFixture[str]) -> None:
    quick, slow = (
        [sys.executable, "-c", "pass"],
        [sys.executable, "-c", "import json, decimal, email.message, http.client"],
    )
    assert startup.compare("quick / slow", quick, slow, promised=50, runs=1)
    assert not startup.compare("slow / quick", slow, quick, promised=0.001, runs=1)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("quick / slow: ")
    assert shown[0].endswith("kept")
    assert shown[1].endswith("BROKEN")


def test_the_patch_benchmark_applies_reverts_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patches, "NUM_PATCHES", 5)
    monkeypatch.setattr(patches, "NUM_RELEASES", 2)
    chance = random.Random(0)
    source = patches.make_source(chance, 20)
    upstream, series = patches.make_series(tmp_path, chance, source)
    assert len(series.patches) == 5
    patches.compare(tmp_path, upstream, series, runs=1)
    places = patches.make_releases(tmp_path, chance, source)
    assert patches.time_verify(upstream, series, places)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == [
        "apply / git apply",
        "revert / git apply",
        "verify of 5 patches on 2 releases",
    ]
