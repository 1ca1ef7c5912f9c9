"""Probing a host: recorded outputs of every tool, hosts with tools of two vendors, and tools that lie, fail or hang."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.chips import CHIPS, Device, find_chip
from flagscale.chips.parsers import TOOLS, Parser, UnreadableError
from flagscale.chips.probe import ORDER, Answer, Probe, Verdict, find_program, probe_host, read_pci, run_tool

RECORDED = Path(__file__).resolve().parent.parent / "fixtures" / "discovery"
GIB = 1024**3
ANY_TIME = settings(deadline=None)

PARSERS: dict[str, Parser] = {
    argv[0] + ("_list" if "-L" in argv else ""): parse for t in TOOLS.values() for argv, parse in t
}


def read(name: str) -> str:
    return (RECORDED / name).read_text(encoding="utf-8")


def parser_of(name: str) -> Parser:
    return PARSERS["nvidia-smi_list"] if name == "nvidia-smi_list.txt" else PARSERS[Path(name).stem.split("_")[0]]


def replay(outputs: dict[str, str | Answer]) -> Callable[[Sequence[str]], Answer | None]:
    """A runner for which only the tools of `outputs` exist; a text is what the tool prints, with exit code 0."""

    def run(argv: Sequence[str]) -> Answer | None:
        output = outputs.get(argv[0])
        return Answer(output) if isinstance(output, str) else output

    return run


def plug_in(root: Path, vendor: int, count: int, kind: int = 0x1200, device: int = 0x1000) -> None:
    """PCI functions of a vendor, as /sys shows them."""
    pci = root / "sys" / "bus" / "pci" / "devices"
    for number in range(count):
        folder = pci / f"0000:{len(list(pci.glob('*'))) + 1:02x}:00.{number % 8}"
        folder.mkdir(parents=True)
        for name, value in (("vendor", f"0x{vendor:04x}"), ("device", f"0x{device:04x}"), ("class", f"0x{kind:04x}00")):
            (folder / name).write_text(value + "\n")


def make_nodes(root: Path, *names: str) -> None:
    for name in names:
        path = root / "dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def verdict_of(probe: Probe, chip: str) -> Verdict:
    return next(verdict for verdict in probe.verdicts if verdict.chip == chip)


READ = {
    "nvidia-smi.csv": (4, "NVIDIA A800-SXM4-80GB", 80, "0000:10:00.0"),
    "nvidia-smi_shared-memory.csv": (1, "NVIDIA GB10", None, "000f:01:00.0"),
    "nvidia-smi_list.txt": (2, "NVIDIA H100 80GB HBM3", None, None),
    "npu-smi_910b.txt": (4, "Ascend910B3", 64, "0000:c1:00.0"),
    "npu-smi_a3.txt": (4, "Ascend910", 64, "0000:9d:00.0"),
    "npu-smi_310p.txt": (2, "Ascend310P3", 43, "0000:01:00.0"),
    "cnmon.txt": (2, "MLU590-M9", 80, "0000:4f:00.0"),
    "cnmon_v4.txt": (1, "MLU370-X4", 22, None),
    "mthreads-gmi.txt": (2, "MTT S5000", 80, "0000:2a:00.0"),
    "ixsmi.txt": (4, "Iluvatar BI-V150", 32, "0000:13:00.0"),
    "mx-smi.txt": (2, "MetaX C550", 64, "0000:0e:00.0"),
    "mx-smi_boards.txt": (2, "MetaX C500", 64, "0000:12:00.0"),
    "xpu-smi.txt": (2, "P800 OAM", 96, "0000:03:00.0"),
    "hy-smi.txt": (3, None, None, None),
    "ppu-smi.txt": (2, "PPU-ZW810E", 96, "0001:c9:00.0"),
}
"""recorded output -> (devices, model, whole GiB of memory, bus of the first)"""


@pytest.mark.parametrize(("name", "expected"), READ.items())
def test_a_recorded_output_is_read(name: str, expected: tuple[int, str | None, int | None, str | None]) -> None:
    devices = parser_of(name)(read(name))
    count, model, gib, bus = expected
    assert len(devices) == count
    assert {device.name for device in devices} == {model}
    size = devices[0].memory_bytes
    assert (None if size is None else size // GIB) == gib
    assert devices[0].bus == bus


def test_every_recorded_output_is_used_and_every_tool_has_one() -> None:
    unread = {"README.md", "nvidia-smi_no-driver.txt", "rocm-smi_amd.txt", "xpu-smi_intel.txt"}
    assert {path.name for path in RECORDED.iterdir()} == set(READ) | unread
    assert {Path(name).stem.split("_")[0] for name in READ} == set(TOOLS)


def test_an_npu_s_ids_are_its_chips_where_it_has_two_and_its_own_with_its_gaps_where_it_has_one() -> None:
    two = parser_of("npu-smi")(read("npu-smi_a3.txt"))
    assert [(device.index, device.card) for device in two] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    one = parser_of("npu-smi")(read("npu-smi_910b.txt"))
    assert [device.index for device in one] == [0, 1, 3, 4]
    assert [device.health for device in one] == ["OK", "OK", "Alarm", "OK"]
    assert [device.card for device in parser_of("npu-smi")(read("npu-smi_310p.txt"))] == [1, 1]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("xpu-smi", read("xpu-smi_intel.txt"), "heading"),
        ("hy-smi", read("rocm-smi_amd.txt"), "it is AMD's"),
        ("hy-smi", read("hy-smi.txt")[:400], "breaks off"),
        ("hy-smi", "", "no table of HCUs"),
        ("mx-smi", re.sub("(Attached.*) 2", r"\1 8", read("mx-smi.txt")), "8 GPUs"),
        ("ixsmi", read("ixsmi.txt").split("| 0%   31C")[0], "breaks off at device 1"),
        ("cnmon", read("cnmon.txt").split("|  0%   47C")[0], "breaks off at card 1"),
        ("npu-smi", read("npu-smi_910b.txt").split("| 0                         | 0000:02")[0], "breaks off at NPU 3"),
        ("npu-smi", "| npu-smi 25\n| 0     0                   | 0000:9D:00.0  | 0 |\n", "a chip of no NPU"),
        ("ixsmi", read("ixsmi.txt").replace("| 1    Iluvatar", "| 0    Iluvatar"), "device 0 twice"),
        ("nvidia-smi", "Segmentation fault", "Segmentation fault"),
        ("nvidia-smi_list", "GPU 0: half a lin", "half a lin"),
    ],
)  # fmt: skip
def test_rubbish_is_told_and_not_half_believed(name: str, text: str, why: str) -> None:
    with pytest.raises(UnreadableError, match=why):
        PARSERS[name](text)


@pytest.mark.parametrize(
    ("name", "text"),
    [("nvidia-smi", "No devices were found\n"), ("nvidia-smi", ""), ("nvidia-smi_list", "No devices found.")],
)
def test_no_device_is_no_device(name: str, text: str) -> None:
    assert PARSERS[name](text) == ()


@ANY_TIME
@given(st.sampled_from(sorted(READ)), st.data())
def test_a_table_that_is_cut_off_gives_its_beginning_or_nothing(name: str, data: st.DataObject) -> None:
    text = read(name)
    cut = text[: data.draw(st.integers(0, len(text)))]
    whole = [(device.index, device.name, device.memory_bytes) for device in parser_of(name)(text)]
    try:
        part = parser_of(name)(cut)
    except UnreadableError:
        return
    assert [(device.index, device.name, device.memory_bytes) for device in part] == whole[: len(part)]


@ANY_TIME
@given(st.sampled_from(sorted(READ)), st.text(max_size=60), st.data())
def test_any_text_gives_devices_or_a_reason(name: str, noise: str, data: st.DataObject) -> None:
    text = read(name)
    place = data.draw(st.integers(0, len(text)))
    for candidate in (noise, text[:place] + noise + text[place:]):
        try:
            devices = parser_of(name)(candidate)
        except UnreadableError as error:
            assert str(error)  # noqa: PT017
        else:
            assert len({device.index for device in devices}) == len(devices)


def test_a_line_without_end_is_read_in_no_time() -> None:
    for parse in PARSERS.values():
        with pytest.raises(UnreadableError):
            parse("| 0 " + " a" * 400_000)


HOSTS = {
    "npu-smi": ("npu-smi_a3.txt", "Huawei_Atlas800TA3"),
    "cnmon": ("cnmon.txt", "Cambricon_MLU"),
    "mthreads-gmi": ("mthreads-gmi.txt", "MUSA_S5000"),
    "ixsmi": ("ixsmi.txt", "BI_V150"),
    "mx-smi": ("mx-smi.txt", "Metax_C550"),
    "xpu-smi": ("xpu-smi.txt", "Kunlunxin_R310p"),
    "xpu_smi": ("xpu-smi.txt", "Kunlunxin_R310p"),
    "hy-smi": ("hy-smi.txt", "Hygon_BW1000"),
    "rocm-smi": ("hy-smi.txt", "Hygon_BW1000"),
    "ppu-smi": ("ppu-smi.txt", "THead_PPU"),
    "nvidia-smi": ("nvidia-smi.csv", "NVIDIA"),
}


@pytest.mark.parametrize("tool", HOSTS)
def test_the_one_tool_that_is_there_decides(tool: str, tmp_path: Path) -> None:
    recorded, name = HOSTS[tool]
    probe = probe_host(replay({tool: read(recorded)}), tmp_path)
    assert (probe.chip.name, probe.decided_by) == (name, tool)
    assert len(probe.devices) == READ[recorded][0]
    assert probe.doubts == ()
    assert [verdict.chip for verdict in probe.verdicts] == [chip.name for chip in ORDER]
    absent = [verdict for verdict in probe.verdicts if not verdict.believed]
    assert all(verdict.reason.startswith(("there is no", "what tsm_smi prints")) for verdict in absent)


@pytest.mark.parametrize("tool", [tool for tool in HOSTS if tool != "nvidia-smi"])
def test_a_vendor_s_own_tool_decides_before_the_nvidia_smi_that_it_brings(tool: str, tmp_path: Path) -> None:
    recorded, name = HOSTS[tool]
    probe = probe_host(replay({"nvidia-smi": read("nvidia-smi.csv"), tool: read(recorded)}), tmp_path)
    assert probe.chip.name == name
    assert f"but {tool} spoke before it" in verdict_of(probe, "NVIDIA").reason
    assert probe.doubts == ()


def test_pci_tells_an_imitation_where_the_vendor_s_own_tool_is_missing(tmp_path: Path) -> None:
    plug_in(tmp_path, 0x1DED, 2)
    make_nodes(tmp_path, "alixpu_ctl", "alixpu", "alixpu_ppu0", "alixpu_ppu1")
    probe = probe_host(replay({"nvidia-smi": read("nvidia-smi.csv")}), tmp_path)
    assert (probe.chip.name, probe.decided_by) == ("THead_PPU", "device files")
    assert [device.index for device in probe.devices] == [0, 1]
    assert "PCI are of T-Head: an imitation" in verdict_of(probe, "NVIDIA").reason
    assert "PCI has 2 of its accelerators" in verdict_of(probe, "THead_PPU").reason
    assert {doubt.chip for doubt in probe.doubts} == {"NVIDIA", "THead_PPU"}


def test_a_host_with_two_kinds_of_chip_says_so(tmp_path: Path) -> None:
    plug_in(tmp_path, 0xCABC, 2)
    plug_in(tmp_path, 0x10DE, 4, kind=0x0302)
    probe = probe_host(replay({"nvidia-smi": read("nvidia-smi.csv"), "cnmon": read("cnmon.txt")}), tmp_path)
    assert probe.chip.name == "Cambricon_MLU"
    (doubt,) = probe.doubts
    assert doubt.chip == "NVIDIA"
    assert "`device_type: NVIDIA`" in doubt.reason


def test_the_processors_of_a_chip_vendor_are_no_accelerators(tmp_path: Path) -> None:
    """A host with a Hygon processor, Huawei's network card and board controller, and NVIDIA's cards."""
    plug_in(tmp_path, 0x1D94, 3, kind=0x0600)
    plug_in(tmp_path, 0x19E5, 1, kind=0x0200)
    plug_in(tmp_path, 0x19E5, 1, kind=0x0300, device=0x1711)
    plug_in(tmp_path, 0x10DE, 4, kind=0x0302)
    probe = probe_host(replay({"nvidia-smi": read("nvidia-smi.csv")}), tmp_path)
    assert (probe.chip.name, probe.doubts) == ("NVIDIA", ())
    assert [vendor for vendor, _ in read_pci(tmp_path)] == [0x10DE] * 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(fault="did not answer within 10 s"), "did not answer within 10 s"),
        (Answer("Segmentation fault", 139), "failed with exit code 139: Segmentation fault"),
        (Answer("", 9), "failed with exit code 9: no word"),
        (Answer("{'devices': 8}"), "heading is missing"),
        (Answer(read("npu-smi_910b.txt").split("| 0     910B3")[0]), "lists no device"),
    ],
)
def test_a_tool_that_hangs_or_fails_is_told_and_its_driver_s_files_are_counted(
    answer: Answer, reason: str, tmp_path: Path
) -> None:
    plug_in(tmp_path, 0x19E5, 4)
    make_nodes(tmp_path, "davinci_manager", "davinci0", "davinci1", "davinci3", "davinci10", "davinci_x")
    probe = probe_host(replay({"npu-smi": answer}), tmp_path)
    assert (probe.chip.name, probe.decided_by) == ("Huawei_Atlas800TA3", "device files")
    assert [device.index for device in probe.devices] == [0, 1, 3, 10]
    assert reason in verdict_of(probe, "Huawei_Atlas800TA3").reason
    assert [doubt.source for doubt in probe.doubts] == ["npu-smi"]


def test_a_command_that_hangs_is_not_followed_by_the_next_one_of_its_vendor(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []

    def run(argv: Sequence[str]) -> Answer | None:
        asked.append(argv)
        return Answer(fault="did not answer") if argv[0] == "nvidia-smi" else None

    assert probe_host(run, tmp_path).chip.name == "Generic_CPU"
    assert [argv for argv in asked if argv[0] == "nvidia-smi"] == [asked[-1]]


def test_an_old_nvidia_smi_that_knows_no_query_is_asked_for_its_list(tmp_path: Path) -> None:
    def run(argv: Sequence[str]) -> Answer | None:
        if argv[0] != "nvidia-smi":
            return None
        return Answer(read("nvidia-smi_list.txt")) if "-L" in argv else Answer("Field is not a valid field", 2)

    probe = probe_host(run, tmp_path)
    assert [device.card for device in probe.devices] == [0, 1]


def test_an_nvidia_host_without_a_driver_computes_on_the_cpu_and_is_told_why(tmp_path: Path) -> None:
    plug_in(tmp_path, 0x10DE, 8, kind=0x0302)
    probe = probe_host(replay({"nvidia-smi": Answer(read("nvidia-smi_no-driver.txt"), 9)}), tmp_path)
    assert (probe.chip.name, probe.devices, probe.decided_by) == ("Generic_CPU", (), None)
    assert "couldn't communicate with the NVIDIA driver" in probe.doubts[0].reason
    bare = probe_host(replay({}), tmp_path)
    assert bare.doubts[0].reason.endswith("PCI has 8 of its accelerators: is its driver installed?")


def test_files_count_only_with_the_witness_of_pci_or_of_the_driver_s_own_file(tmp_path: Path) -> None:
    make_nodes(tmp_path, "nvidia0", "nvidiactl", "accel/accel0", "accel/accel1", "kfd", "dri/renderD128")
    assert probe_host(replay({}), tmp_path).chip.name == "Generic_CPU"
    make_nodes(tmp_path, "accel_drv_mgr")
    probe = probe_host(replay({}), tmp_path)
    assert (probe.chip.name, len(probe.devices)) == ("Tsing_micro", 2)


def test_a_driver_that_makes_no_file_of_its_own_for_a_device_is_counted_by_pci(tmp_path: Path) -> None:
    plug_in(tmp_path, 0x1D94, 2, kind=0x0B40)
    make_nodes(tmp_path, "kfd", "dri/renderD128")
    probe = probe_host(replay({}), tmp_path)
    assert probe.chip.name == "Hygon_BW1000"
    assert [device.bus for device in probe.devices] == ["0000:01:00.0", "0000:02:00.1"]


def test_a_host_without_anything_is_a_cpu(tmp_path: Path) -> None:
    probe = probe_host(replay({}), tmp_path)
    assert (probe.chip, probe.devices, probe.doubts) == (find_chip("cpu"), (), ())
    (tmp_path / "sys/bus/pci/devices/0000:00:00.0").mkdir(parents=True)
    assert read_pci(tmp_path) == ()


def test_every_chip_but_the_cpu_is_asked_for_and_nvidia_last() -> None:
    assert {chip.name for chip in ORDER} == {chip.name for chip in CHIPS} - {"Generic_CPU"}
    assert ORDER[-1].name == "NVIDIA"


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write_tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_tool_runs_in_english_with_its_words_and_both_outputs(bin_dir: Path) -> None:
    write_tool(bin_dir, "tool", 'echo "$LC_ALL $# $1"; echo wrong >&2; exit 3')
    assert run_tool(["tool", "a b"]) == Answer("C 1 a b\nwrong\n", 3)
    assert run_tool(["another"]) is None
    assert find_program("another") is None


def test_output_that_is_no_text_is_read_all_the_same(bin_dir: Path) -> None:
    write_tool(bin_dir, "tool", r"printf '\377\000ok'")
    answer = run_tool(["tool"])
    assert answer is not None
    assert answer.text.endswith("ok")


def test_a_tool_that_is_no_program_is_told(bin_dir: Path) -> None:
    path = bin_dir / "tool"
    path.write_bytes(b"\x7fELF rubbish")
    path.chmod(0o755)
    answer = run_tool(["tool"])
    assert answer is not None
    assert "cannot be run" in str(answer.fault)


def test_a_tool_that_hangs_is_ended_with_all_that_it_started(bin_dir: Path, tmp_path: Path) -> None:
    write_tool(bin_dir, "tool", f"/bin/sleep 600 & echo $! > {tmp_path}/pid; echo half; wait")
    answer = run_tool(["tool"], timeout_s=2.0)
    assert answer == Answer(fault="did not answer within 2 s")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail("what the tool started still runs")


def test_real_programs_are_probed_through_path(bin_dir: Path, tmp_path: Path) -> None:
    write_tool(bin_dir, "ixsmi", f"/bin/cat {RECORDED}/ixsmi.txt")
    write_tool(bin_dir, "nvidia-smi", f"/bin/cat {RECORDED}/nvidia-smi.csv")
    probe = probe_host(root=tmp_path)
    assert (probe.chip.name, probe.decided_by) == ("BI_V150", "ixsmi")
    assert [device.card for device in probe.devices] == [0, 0, 1, 1]
    assert probe.devices[0] == Device(0, "Iluvatar BI-V150", 32 * GIB, "0000:13:00.0", card=0)
