"""What the vendors' discovery tools print, read into devices: pure functions of text, one a tool.

Half of these tools print only a table meant for eyes, whose columns move from release to release. So a parser asks
for little (the tool's own banner, then rows that it knows) and checks what can be checked: a table that stops in the
middle, that counts other than it lists, or that some other vendor's tool of the same name printed, is `UnreadableError`
and not half believed. Any text at all gives devices or `UnreadableError`, nothing else.
"""

import re
from collections.abc import Callable, Iterator

from flagscale.chips.ids import Device

MIB = 1024**2
WIDEST = 400
"""characters of a line that are looked at: no tool's table is wider, and rubbish may be without end"""

Parser = Callable[[str], tuple[Device, ...]]


class UnreadableError(ValueError):
    """The text is not what the tool prints; the message says why."""


BUS = r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]"
NUMBER = r"[0-9]{1,6}"
# Patterns are compiled when a tool has printed something: most hosts that are asked have none of these tools.
_ROW = rf"\|\s*({NUMBER})\s+([^\s|][^|]*?)\s*\|\s*({BUS})"
_MEMORY = r"([0-9]{1,9})\s*(?:MiB)?\s*/\s*([0-9]{1,9})\s*MiB"
_PROCESSES = r"(?i)Process(es)?\s*:|Process id|Process name"


def _bus(text: str | None) -> str | None:
    """A PCI address as /sys spells it: a domain of four digits, lower case."""
    if text is None:
        return None
    domain, rest = text.lower().split(":", 1)
    return f"{int(domain, 16):04x}:{rest}"


def _mib(text: str) -> int | None:
    return int(text) * MIB if text.isascii() and text.isdecimal() else None


def _distinct(devices: list[Device]) -> tuple[Device, ...]:
    seen: set[int] = set()
    for device in devices:
        if device.index in seen:
            raise UnreadableError(f"lists device {device.index} twice")
        seen.add(device.index)
    return tuple(devices)


def _table(text: str, banner: str) -> Iterator[str]:
    """The lines of the device table: those from `banner` to the table of processes."""
    lines = [line[:WIDEST] for line in text.splitlines()]
    start = next((number for number, line in enumerate(lines) if re.search(banner, line)), None)
    if start is None:
        raise UnreadableError("prints no table of its own: its heading is missing")
    for line in lines[start:]:
        if re.search(_PROCESSES, line):
            return
        yield line


def parse_nvidia_smi(text: str) -> tuple[Device, ...]:
    """`nvidia-smi --query-gpu=index,name,memory.total,pci.bus_id,uuid --format=csv,noheader,nounits`, MiB."""
    devices = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line == "No devices were found":
            return ()
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5 or not re.fullmatch(NUMBER, cells[0]):
            raise UnreadableError(f"prints `{line[:60]}` where a row of 5 values is asked for")
        bus = cells[3] if re.fullmatch(BUS, cells[3]) else None
        devices.append(Device(int(cells[0]), cells[1], _mib(cells[2]), _bus(bus), cells[4] or None))
    return _distinct(devices)


def parse_nvidia_smi_list(text: str) -> tuple[Device, ...]:
    """`nvidia-smi -L`: a line a device, and below it one for each part that it is cut into, which count nothing."""
    devices = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line == "No devices found." or line.startswith("MIG "):
            continue
        found = re.fullmatch(rf"GPU ({NUMBER}): (.+?) \(UUID: ([\w-]+)\)", line)
        if found is None:
            raise UnreadableError(f"prints `{line[:60]}` where a device is to be listed")
        devices.append(Device(int(found[1]), found[2], uuid=found[3]))
    return _distinct(devices)


def _parse_two_lines(text: str, banner: str) -> tuple[Device, ...]:
    """Tables after the manner of nvidia-smi's: id, name and bus on a device's first line, its memory on the second."""
    devices: list[Device] = []
    pending: Device | None = None
    for line in _table(text, banner):
        if row := re.search(_ROW, line):
            if pending is not None:
                break
            name = re.split(r"\s{2,}", row[2])[0]
            pending = Device(int(row[1]), name, bus=_bus(row[3]))
        elif pending is not None and (memory := re.search(_MEMORY, line)):
            devices.append(Device(pending.index, pending.name, _mib(memory[2]), pending.bus))
            pending = None
    if pending is not None:
        raise UnreadableError(f"breaks off at device {pending.index}")
    return _distinct(devices)


def parse_ixsmi(text: str) -> tuple[Device, ...]:
    """`ixsmi`: it lists the dies of two-die cards, each as a device."""
    return _parse_two_lines(text, r"\|\s*IX-ML:")


def parse_xpu_smi(text: str) -> tuple[Device, ...]:
    """Kunlunxin's `xpu-smi`; Intel has a tool of the same name, which prints no such table."""
    return _parse_two_lines(text, r"\|\s*XPU-SMI\b.*XPU-RT Version")


def parse_ppu_smi(text: str) -> tuple[Device, ...]:
    """`ppu-smi`."""
    return _parse_two_lines(text, r"\|\s*PPU-SMI\b")


_CNMON_ROW = rf"\|\s*({NUMBER})\s+\S+\s+(MLU\S*)\s+v\S+\s*\|\s*({BUS})?"


def parse_cnmon(text: str) -> tuple[Device, ...]:
    """`cnmon`; tables of releases before 5 have no bus."""
    devices: list[Device] = []
    pending: Device | None = None
    for line in _table(text, r"\|\s*CNMON v"):
        if row := re.search(_CNMON_ROW, line):
            if pending is not None:
                break
            pending = Device(int(row[1]), row[2], bus=_bus(row[3]))
        elif pending is not None and (memory := re.search(_MEMORY, line)):
            devices.append(Device(pending.index, pending.name, _mib(memory[2]), pending.bus))
            pending = None
    if pending is not None:
        raise UnreadableError(f"breaks off at card {pending.index}")
    return _distinct(devices)


_MX_ROW = rf"\|\s*({NUMBER})\s+([^\s|][^|]*?)\s*\|\s*({NUMBER})\s+O(?:n|ff)\s*\|\s*({BUS})"
_MX_COUNT = rf"Attached GPUs\s*:\s*({NUMBER})"


def parse_mx_smi(text: str) -> tuple[Device, ...]:
    """`mx-smi`; releases from 2.2 on list boards, and the GPUs on them."""
    devices: list[Device] = []
    pending: Device | None = None
    for line in _table(text, r"\|\s*MX-SMI\b"):
        if row := re.search(_MX_ROW, line):
            pending = Device(int(row[3]), row[2], bus=_bus(row[4]), card=int(row[1]))
        elif row := re.search(_ROW, line):
            pending = Device(int(row[1]), row[2], bus=_bus(row[3]))
        elif pending is not None and (memory := re.search(_MEMORY, line)):
            devices.append(Device(pending.index, pending.name, _mib(memory[2]), pending.bus, card=pending.card))
            pending = None
    count = re.search(_MX_COUNT, text)
    if count is not None and int(count[1]) != len(devices):
        raise UnreadableError(f"says that {int(count[1])} GPUs are attached, and lists {len(devices)}")
    return _distinct(devices)


_MT_ROW = rf"({NUMBER})\s+(MTT [^\s|][^|]*?)\s*\|\s*({BUS})\s*\|.*?({NUMBER})MiB\(([0-9]{{1,9}})MiB\)"


def parse_mthreads_gmi(text: str) -> tuple[Device, ...]:
    """`mthreads-gmi`."""
    rows = (re.match(_MT_ROW, line) for line in _table(text, r"mthreads-gmi\s*:"))
    return _distinct([Device(int(row[1]), row[2], _mib(row[5]), _bus(row[3])) for row in rows if row])


_NPU_ROW = rf"\|\s*({NUMBER})\s+(\S+)\s*\|\s*(\w+)\s*\|"
_NPU_CHIP_ROW = rf"\|\s*({NUMBER})(?:\s+({NUMBER}))?\s*\|\s*(?:({BUS})|NA)\s*\|(.*)\|"
_NPU_MEMORY = r"[0-9]{1,9}\s*/\s*([0-9]{1,9})"


def parse_npu_smi(text: str) -> tuple[Device, ...]:
    """`npu-smi info`: two lines a chip, the NPU that it is on and the chip itself.

    A device's id is the chip's `Phy-ID` or `Device` where the table has such a column, else the number of its NPU;
    the memory is that of the last column, HBM where there is any, in MB that are MiB.
    """
    devices: list[Device] = []
    npu: re.Match[str] | None = None
    for line in _table(text, r"\|\s*npu-smi\b"):
        if chip := re.search(_NPU_CHIP_ROW, line):
            if npu is None:
                raise UnreadableError("lists a chip of no NPU")
            memory = re.findall(_NPU_MEMORY, chip[4])
            index, card = int(chip[2] or npu[1]), int(npu[1])
            size = _mib(memory[-1]) if memory else None
            devices.append(Device(index, _ascend(npu[2]), size, _bus(chip[3]), card=card, health=npu[3]))
            npu = None
        elif row := re.search(_NPU_ROW, line):
            npu = row
    if npu is not None:
        raise UnreadableError(f"breaks off at NPU {npu[1]}")
    return _distinct(devices)


def _ascend(name: str) -> str:
    return name if name.startswith("Ascend") else f"Ascend{name}"


_DCU_ROW = rf"({NUMBER})\s+-?[0-9.]+C\b"


def parse_hy_smi(text: str) -> tuple[Device, ...]:
    """`hy-smi`, or the `rocm-smi` of DTK, which prints the same; the table has neither model nor size of memory."""
    lines = [line[:WIDEST].strip() for line in text.splitlines()]
    if not any(re.match(r"(HCU|DCU)\s+Temp\b", line) for line in lines):
        is_amd = any(re.match(r"(GPU|Device)\s+\S", line) for line in lines)
        raise UnreadableError(
            "speaks of GPUs, not of HCUs or DCUs: it is AMD's" if is_amd else "prints no table of HCUs"
        )
    rows = (re.match(_DCU_ROW, line) for line in lines)
    devices = [Device(int(row[1])) for row in rows if row]
    if "End of SMI Log" not in text:
        raise UnreadableError(f"breaks off after {len(devices)} devices")
    return _distinct(devices)


NVIDIA_QUERY = ("--query-gpu=index,name,memory.total,pci.bus_id,uuid", "--format=csv,noheader,nounits")

TOOLS: dict[str, tuple[tuple[tuple[str, ...], Parser], ...]] = {
    "npu-smi": ((("npu-smi", "info"), parse_npu_smi),),
    "cnmon": ((("cnmon",), parse_cnmon),),
    "mthreads-gmi": ((("mthreads-gmi",), parse_mthreads_gmi),),
    "ixsmi": ((("ixsmi",), parse_ixsmi),),
    "mx-smi": ((("mx-smi",), parse_mx_smi),),
    "xpu-smi": ((("xpu-smi",), parse_xpu_smi), (("xpu_smi",), parse_xpu_smi)),
    "hy-smi": ((("hy-smi",), parse_hy_smi), (("rocm-smi",), parse_hy_smi)),
    "ppu-smi": ((("ppu-smi",), parse_ppu_smi),),
    "nvidia-smi": ((("nvidia-smi", *NVIDIA_QUERY), parse_nvidia_smi), (("nvidia-smi", "-L"), parse_nvidia_smi_list)),
}
"""A record's `discovery` -> the commands to try, in order, each with its parser.

`tsm_smi` is not here: what it prints is published nowhere, so its devices are counted by their files below /dev.
"""
