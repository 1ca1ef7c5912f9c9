"""A new chip's patch set: the template's patches, a platform module of its own, nothing overwritten."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from factories import ROOT

from flagscale.errors import UserError
from flagscale.patch.new_chip import PLATFORM, make_platform_patch, start_chip
from flagscale.patch.series import load_series

HARDWARE = ROOT / "hardware"
WORDS = ("Megatron-LM", "mlu", "cncl")


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "Generic_CPU").symlink_to(HARDWARE / "Generic_CPU")
    return tmp_path / "hardware"


def test_a_new_chip_starts_with_every_patch_of_the_template_and_a_platform_of_its_own(hardware: Path) -> None:
    folder = start_chip(hardware, "Generic_CPU", "Acme_X1", *WORDS, "someone@acme.example")
    made, template = load_series(folder), load_series(HARDWARE / "Generic_CPU" / "Megatron-LM")
    assert (made.name, made.contact, made.version) == ("Acme_X1/Megatron-LM", "someone@acme.example", template.version)
    differing = [new.name for new, old in zip(made.patches, template.patches, strict=True) if new != old]
    assert differing == [f"{PLATFORM}.patch"]


def test_the_platform_module_is_python_and_names_the_chip_s_plugin() -> None:
    patch = make_platform_patch("Acme_X1", "mlu", "cncl")
    text = "".join(
        line[1:] + "\n" for line in patch.diff.decode().splitlines() if line[:1] == "+" and line[:3] != "+++"
    )
    tree = ast.parse(text)
    assert {"torch", "torch_mlu"} <= {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    assert 'device_type = "mlu"' in text
    assert 'collectives = "cncl"' in text
    assert "Acme_X1" in patch.header.why


def test_nothing_is_overwritten(hardware: Path) -> None:
    folder = start_chip(hardware, "Generic_CPU", "Acme_X1", *WORDS)
    (folder / "mine.txt").touch()
    with pytest.raises(UserError, match="is there already, and nothing of it is overwritten"):
        start_chip(hardware, "Generic_CPU", "Acme_X1", *WORDS)
    assert (folder / "mine.txt").is_file()


@pytest.mark.parametrize(
    ("template", "chip", "words", "message"),
    [
        ("Generic_CPU", "acme_X1", WORDS, "expected <Vendor>_<Chip>"),
        ("Generic_CPU", "Acme", WORDS, "expected <Vendor>_<Chip>"),
        ("Generic_CPU", "Acme_X1_Y", WORDS, "expected <Vendor>_<Chip>"),
        ("Generic_CPU", "Acme_X1", ("Megatron-LM", "m lu", "cncl"), "--device m lu: expected a word"),
        ("Generic_CPU", "Acme_X1", ("Megatron-LM", "mlu", "a-b"), "--collectives a-b: expected a word"),
        ("Generic_CPUs", "Acme_X1", WORDS, r"no patch set to start from; .*did you mean `Generic_CPU`\?"),
    ],
)
def test_what_cannot_be_right_is_refused(
    hardware: Path, template: str, chip: str, words: tuple[str, str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start_chip(hardware, template, chip, *words)
    assert [path.name for path in hardware.iterdir()] == ["Generic_CPU"]


def test_the_tool_says_what_is_wrong_without_a_traceback() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "patch" / "new_chip.py")]
    ran = subprocess.run(
        [*tool, "--device-type", "Generic_CPU", "--device", "cpu", "--collectives", "gloo"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")
    assert "is there already" in ran.stderr
    helped = subprocess.run([*tool, "--help"], capture_output=True, text=True, check=True)
    assert "--device-type" in helped.stdout
