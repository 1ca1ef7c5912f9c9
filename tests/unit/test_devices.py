"""`flagscale devices`: what it says of hosts of every kind, by recorded outputs, and of this machine."""

import json
from functools import partial
from pathlib import Path

import pytest
from factories import run_python

from flagscale.chips.probe import probe_host
from flagscale.cli.devices import main, render_columns

RECORDED = Path(__file__).resolve().parent.parent / "fixtures" / "discovery"


@pytest.fixture
def bare_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without PCI functions and device files, whose only programs are those in the folder that is returned."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("flagscale.chips.probe.probe_host", partial(probe_host, root=tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "ILUVATAR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return folder


def install(folder: Path, tool: str, recorded: str) -> None:
    path = folder / tool
    path.write_text(f"#!/bin/sh\nexec /bin/cat '{RECORDED / recorded}'\n")
    path.chmod(0o755)


def test_a_host_without_accelerators_is_no_failure(bare_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bare_host.iterdir()) == []
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out == "Generic_CPU: no accelerator was found; jobs run on the processor (device_type: cpu)\n"
    assert err == ""


def test_devices_are_listed_with_what_the_tool_told(bare_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(bare_host, "npu-smi", "npu-smi_910b.txt")
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Huawei_Atlas800TA3: 4 devices, says npu-smi (device_type: npu)"
    assert lines[1].split() == ["id", "card", "model", "memory", "bus", "health"]
    assert lines[4].split() == ["3", "3", "Ascend910B3", "64", "GiB", "0000:02:00.0", "Alarm"]


def test_what_the_tool_does_not_tell_is_a_dash(bare_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(bare_host, "hy-smi", "hy-smi.txt")
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["0", "0", "-", "-", "-", "-"]


def test_explain_names_the_probe_that_decided_and_why_the_others_did_not(
    bare_host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(bare_host, "ixsmi", "ixsmi.txt")
    install(bare_host, "nvidia-smi", "nvidia-smi.csv")
    install(bare_host, "xpu-smi", "xpu-smi_intel.txt")
    assert main(["--explain"]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line.startswith("  ")}
    assert rows["BI_V150"] == "ixsmi believed lists 4 devices"
    assert rows["NVIDIA"].startswith("nvidia-smi not believed lists 4 devices, but ixsmi spoke before it")
    assert rows["Kunlunxin_R310p"].startswith("xpu-smi not believed prints no table of its own")
    assert rows["Cambricon_MLU"] == "cnmon not believed there is no cnmon"
    assert err == ""


def test_without_explain_a_doubt_is_still_a_warning(bare_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(bare_host, "xpu-smi", "xpu-smi_intel.txt")
    assert main([]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: Kunlunxin_R310p: xpu-smi: prints no table of its own")


def test_the_shell_s_own_choice_of_devices_is_told(
    bare_host: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(bare_host, "nvidia-smi", "nvidia-smi.csv")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert main([]) == 0
    assert "of these, CUDA_VISIBLE_DEVICES shows a job started here: 2, 1\n" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([]) == 0
    assert "shows a job started here: none\n" in capsys.readouterr().out


def test_a_device_that_the_runtime_would_silently_drop_is_named(
    bare_host: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(bare_host, "npu-smi", "npu-smi_910b.txt")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1,2,3")
    assert main([]) == 0
    assert "Huawei_Atlas800TA3 devices 2 are not on this host; it has 0, 1, 3, 4" in capsys.readouterr().err


def test_json_holds_all_of_it(
    bare_host: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(bare_host, "ixsmi", "ixsmi.txt")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    assert main(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["chip"], told["device_type"], told["decided_by"]) == ("BI_V150", "BI-V150", "ixsmi")
    assert told["devices"][3] == {
        "index": 3,
        "name": "Iluvatar BI-V150",
        "memory_bytes": 32 * 1024**3,
        "bus": "0000:1f:00.0",
        "uuid": None,
        "card": 1,
        "health": None,
    }
    assert told["visible"] is None
    assert "devices 9 are not on this host" in told["wrong"]
    assert told["visible_devices"] == ["CUDA_VISIBLE_DEVICES", "ILUVATAR_VISIBLE_DEVICES"]
    assert len(told["verdicts"]) == 10


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert render_columns([("a", "bb", ""), ("ccc", "d", "e")]) == "  a    bb\n  ccc  d   e\n"


def test_this_machine_is_probed_by_the_command_itself() -> None:
    code = "import sys; from flagscale.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run_python("-c", code, "devices", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["chip"] == "Generic_CPU") == (told["devices"] == [])


@pytest.mark.parametrize("tool", ["nvidia-smi", None])
def test_the_doctor_tells_of_chips_by_the_same_probe(
    tool: str | None, bare_host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flagscale.cli import doctor

    if tool:
        install(bare_host, tool, "nvidia-smi.csv")
    doctor.main(["--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["findings"] if row["group"] == "chips"}
    assert rows["Generic_CPU"]["found"] == "always there; device_type: cpu"
    if tool:
        assert rows["NVIDIA"]["found"] == "4 x NVIDIA A800-SXM4-80GB, says nvidia-smi; device_type: gpu"
    else:
        assert rows["accelerator"]["found"] is None
        assert "flagscale devices --explain" in rows["accelerator"]["remedy"]


def test_the_doctor_passes_on_why_a_tool_was_not_believed(bare_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flagscale.cli import doctor

    install(bare_host, "xpu-smi", "xpu-smi_intel.txt")
    doctor.main(["--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["findings"]}
    assert rows["Kunlunxin_R310p"]["remedy"].startswith("xpu-smi: prints no table")
