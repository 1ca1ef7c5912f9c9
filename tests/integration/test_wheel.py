"""The wheel works without a checkout: its examples are found, and its jobs have their entry points."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    # a copy, so that building leaves nothing in the checkout and finds nothing there from last time
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "src", "*.egg-info", "*.tar.gz", "__pycache__")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    subprocess.run([*command, str(tree)], cwd=folder, check=True)
    (wheel,) = folder.glob("flagscale-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(unpacked: Path, folder: Path, *words: str) -> str:
    code = "import sys; from flagscale.cli import main; sys.exit(main())"
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_it_is_the_wheel_that_runs(unpacked: Path, tmp_path: Path) -> None:
    shown = json.loads(run(unpacked, tmp_path, "dryrun", "tiny", "--json"))
    (process,) = shown["plan"]["hosts"][0]["processes"]
    assert process["cwd"] == str(unpacked / "flagscale" / "share")
    assert (Path(process["cwd"]) / process["entrypoint"]).is_file()
    assert shown["plan"]["exp_dir"] == str(tmp_path / "outputs" / "tiny")


def test_the_copied_entry_point_does_not_hide_the_package(unpacked: Path, tmp_path: Path) -> None:
    share = unpacked / "flagscale" / "share"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(share), str(unpacked)])}
    code = "import flagscale; print(flagscale.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()) == unpacked / "flagscale" / "__init__.py"


def test_every_example_and_pin_travels(unpacked: Path) -> None:
    share = unpacked / "flagscale" / "share"
    for pattern in ("examples/**/*.yaml", "examples/**/*.txt", "third_party/*/pin.yaml", "tools/**/*.py"):
        there = {path.relative_to(ROOT) for path in ROOT.glob(pattern) if "outputs" not in path.parts}
        assert there
        assert {path.relative_to(share) for path in share.glob(pattern)} >= there


def test_catalogues_and_the_type_marker_travel(unpacked: Path) -> None:
    package = unpacked / "flagscale"
    assert (package / "py.typed").is_file()
    assert (package / "runner" / "config" / "catalogues" / "megatron.json").is_file()
