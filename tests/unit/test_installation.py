"""Installing a backend: which way it comes, what is missing for it, and what a build of this toolkit may do of that."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from factories import ROOT

from flagscale.chips import CHIPS, find_chip
from flagscale.cli import install as verb
from flagscale.errors import SourceError, UserError
from flagscale.patch import installation
from flagscale.patch.installation import BUILDS, WHEELS, check_way, find_missing, list_commands, run_commands
from flagscale.patch.pins import find_pin

THIRD_PARTY = ROOT / "third_party"
MEGATRON, VLLM, SGLANG, LLAMA = (find_pin(name, THIRD_PARTY) for name in ("megatron", "vllm", "sglang", "llama_cpp"))


def test_ways_are_of_chips_and_backends_that_there_are() -> None:
    backends = {pin.backend for pin in (MEGATRON, VLLM, SGLANG, LLAMA)}
    for backend, chip in (*WHEELS, *BUILDS):
        assert backend in backends
        assert chip in {known.name for known in CHIPS}


def test_a_backend_from_a_tree_needs_no_command_on_any_chip() -> None:
    for chip in CHIPS:
        check_way(MEGATRON, chip.name, "Generic_CPU")
        assert list_commands(MEGATRON, chip.name, Path("/tree")) == ()


def test_a_wheel_is_taken_where_it_was_built_for_the_chip() -> None:
    check_way(VLLM, "NVIDIA", "NVIDIA")
    assert list_commands(VLLM, "NVIDIA", Path("/tree")) == ((sys.executable, "-m", "pip", "install", "vllm==0.32.0"),)


def test_where_there_is_neither_wheel_nor_build_the_vendor_s_own_is_asked_for() -> None:
    with pytest.raises(
        SourceError, match=r"sglang 0\.5\.23 is not installed, and for Generic_CPU .*vendor's own build"
    ):
        check_way(SGLANG, "Generic_CPU", "Generic_CPU")


def test_everything_that_a_build_lacks_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SourceError) as caught:
        check_way(LLAMA, "Generic_CPU", "Generic_CPU")
    assert "2 things are missing" in str(caught.value)
    assert "a C++ compiler: apt install g++" in str(caught.value)
    assert "the program `cmake`: apt install cmake" in str(caught.value)
    with pytest.raises(SourceError, match=r"the program `ninja`.*\n.*the program `cargo`"):
        check_way(VLLM, "Generic_CPU", "Generic_CPU")


def test_a_build_with_all_it_needs_has_commands_on_its_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("g++", "cmake"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check_way(LLAMA, "Generic_CPU", "Generic_CPU")
    configure, build = list_commands(LLAMA, "Generic_CPU", Path("/tp/llama.cpp/src"))
    assert configure[:5] == ("cmake", "-S", "/tp/llama.cpp/src", "-B", "/tp/llama.cpp/build")
    assert "llama-server" in build


def test_commands_run_in_order_and_the_first_failure_ends_them(tmp_path: Path) -> None:
    def touch(name: str, code: int = 0) -> tuple[str, ...]:
        write = "pathlib.Path(sys.argv[1]).write_text(os.environ['SETUPTOOLS_SCM_PRETEND_VERSION'])"
        script = f"import os, sys, pathlib; {write}; sys.exit({code})"
        return (sys.executable, "-c", script, str(tmp_path / name))

    with pytest.raises(SourceError, match=r"installing vllm 0\.32\.0 failed \(exit code 3\): "):
        run_commands(VLLM, "Generic_CPU", (touch("a"), touch("b", 3), touch("c")))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "0.32.0", "b": "0.32.0"}


def test_what_a_tree_needs_beside_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    hidden = {"psutil", "pybind11"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else real(name, *rest))
    assert find_missing(MEGATRON) == ("psutil", "pybind11")
    assert find_missing(LLAMA) == ()


# the verb


@pytest.fixture
def nothing_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Nothing is fetched or run; what would be is listed."""
    done: list[str] = []
    monkeypatch.setenv("FLAGSCALE_SOURCE_DIR", str(tmp_path))
    monkeypatch.setattr(
        "flagscale.cli.source.fetch", lambda pin, _dir, chips, _replace: done.append(f"{pin.name}{chips}")
    )
    monkeypatch.setattr(installation, "run_commands", lambda _pin, _chip, commands: done.extend(commands))
    return done


def test_a_dry_run_says_what_would_be_done(capsys: pytest.CaptureFixture[str], nothing_done: list[str]) -> None:
    assert verb.main(["--backend", "megatron", "--device", "cpu", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would fetch megatron-core 0.19.2 into" in said
    assert "Megatron-LM/Generic_CPU, patched for Generic_CPU" in said
    assert verb.main(["--backend", "vllm", "--device", "A800", "--without-chip", "--dry-run"]) == 0
    assert "would run: " in capsys.readouterr().out
    assert nothing_done == []


def test_a_wheel_of_gigabytes_is_not_taken_where_its_chip_is_not(
    nothing_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flagscale.chips.probe.probe_host", lambda: SimpleNamespace(chip=find_chip("cpu")))
    with pytest.raises(SourceError, match=r"this machine has none \(Generic_CPU\).* --without-chip"):
        verb.main(["--backend", "vllm", "--device", "A800"])
    assert nothing_done == []
    assert verb.main(["--backend", "vllm", "--device", "A800", "--without-chip", "--dry-run"]) == 0


def test_a_program_that_is_built_is_named_and_a_package_of_the_name_is_something_else(
    capsys: pytest.CaptureFixture[str], nothing_done: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("flagscale.cli.doctor.find_version", lambda _name: "0.3.36")  # llama-cpp-python
    assert verb.main(["--backend", "llama_cpp", "--device", "cpu"]) == 0
    assert nothing_done[0] == "llama.cpp()"
    assert [command[:2] for command in nothing_done[1:]] == [("cmake", "-S"), ("cmake", "--build")]
    assert nothing_done[-1][-1].isdigit()
    assert f"--bin-dir {tmp_path}/llama.cpp/build/bin" in capsys.readouterr().out


def test_a_backend_from_a_tree_ends_on_the_path(
    capsys: pytest.CaptureFixture[str], nothing_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verb.main(["--backend", "megatron", "--device", "cpu"]) == 0
    assert nothing_done == ["Megatron-LM('Generic_CPU',)"]
    assert "on the path of every job on Generic_CPU" in capsys.readouterr().out
    monkeypatch.setattr(installation, "find_missing", lambda _pin: ("torch",))
    assert verb.main(["--backend", "megatron", "--device", "cpu"]) == 1
    assert "-m pip install torch" in capsys.readouterr().out


def test_a_package_of_another_release_is_refused_before_anything_is_fetched(
    nothing_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flagscale.cli.doctor.find_version", lambda _name: "0.9.1+cpu")
    with pytest.raises(UserError, match=r"vllm 0\.9\.1\+cpu is installed, and this toolkit is made for 0\.32\.0"):
        verb.main(["--backend", "vllm", "--device", "cpu"])
    assert nothing_done == []


def test_a_package_that_is_there_is_patched_and_not_installed_again(
    capsys: pytest.CaptureFixture[str], nothing_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flagscale.cli.doctor.find_version", lambda _name: "0.32.0+cpu")
    assert verb.main(["--backend", "vllm", "--device", "cpu"]) == 0
    assert nothing_done == ["vllm()"]
    assert "there is nothing to patch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "vlm", "--device", "cpu"], "did you mean `vllm`"),
        (["--backend", "vllm", "--device", "cpus"], "cpus: no such chip"),
    ],
)
def test_a_mistyped_word_gets_its_nearest_name(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        verb.main(words)


# the build backend


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flagscale_build", ROOT / "build_backend" / "flagscale_build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "settings",
    [{"backend": "megatron", "device": "cpu"}, {"backend": "megatron,device=cpu"}, {"device": "cpu,backend=megatron"}],
)
def test_both_ways_to_write_the_settings_are_one(build: ModuleType, settings: dict[str, str]) -> None:
    assert build.read_settings({**settings, "--global-option": "x"}) == (
        {"backend": "megatron", "device": "cpu"},
        {"--global-option": "x"},
    )


@pytest.mark.parametrize(
    "settings", [{"backend": "megatron"}, {"device": "cpu"}, {"backend": "a,devise=b"}, {"backend": ""}]
)
def test_settings_that_say_half_are_refused(build: ModuleType, settings: dict[str, str]) -> None:
    with pytest.raises(SystemExit, match="expected backend=<name>,device=<chip>"):
        build.read_settings(settings)


def test_without_settings_it_is_setuptools_alone(build: ModuleType) -> None:
    assert build.read_settings(None) == ({}, {})
    assert "pyyaml" not in build.get_requires_for_build_wheel()
    assert "pyyaml" in build.get_requires_for_build_wheel({"backend": "megatron,device=cpu"})


def test_a_build_puts_a_tree_where_the_installed_toolkit_looks(
    build: ModuleType, nothing_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLAGSCALE_SOURCE_DIR")
    monkeypatch.setenv("HOME", "/home/someone")
    settings = {"backend": "megatron", "device": "cpu"}
    monkeypatch.setattr(os, "environ", dict(os.environ))
    build.install_backend(settings, is_editable=True)
    assert "FLAGSCALE_SOURCE_DIR" not in os.environ
    build.install_backend(settings, is_editable=False)
    assert os.environ["FLAGSCALE_SOURCE_DIR"] == "/home/someone/.cache/flagscale/third_party"
    assert nothing_done == ["Megatron-LM('Generic_CPU',)"] * 2


def test_what_has_to_be_installed_cannot_come_from_a_build(build: ModuleType) -> None:
    with pytest.raises(SystemExit, match="flagscale install --backend vllm --device Generic_CPU"):
        build.install_backend({"backend": "vllm", "device": "cpu"}, is_editable=True)
