"""What accelerators this host has, who says so, and why the others were not believed.

A host can carry tools of several vendors, and a CUDA-compatible stack often brings an `nvidia-smi` of its own, so the
first tool that answers is not the one to believe. The tools are asked in a fixed order, each vendor's own before the
one that is imitated, and two witnesses that no tool can talk over stand beside them: the vendor ids of the host's PCI
functions, and the files that a driver makes below /dev. A tool that hangs, fails or prints rubbish is told of and not
believed; then its driver's files are counted instead. The price is that one tool which hangs costs TIMEOUT_S.

Whoever calls may bring the runner of commands and the root folder: so recorded outputs are probed as hosts are.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.chips.ids import Device, card_of
from flagscale.chips.parsers import TOOLS, UnreadableError
from flagscale.chips.records import (
    CAMBRICON,
    GENERIC_CPU,
    HUAWEI,
    HYGON,
    ILUVATAR,
    KUNLUNXIN,
    METAX,
    MOORE_THREADS,
    NVIDIA,
    T_HEAD,
    TSING_MICRO,
    Chip,
)

if TYPE_CHECKING:
    import subprocess

TIMEOUT_S = 10.0
MOST_OUTPUT_BYTES = 1 << 20

ORDER = (HUAWEI, CAMBRICON, MOORE_THREADS, TSING_MICRO, ILUVATAR, METAX, KUNLUNXIN, HYGON, T_HEAD, NVIDIA)
"""Who is asked first: stacks with an interface of their own, then those that imitate CUDA's, then CUDA's."""

PLACES = (
    "/usr/local/sbin",
    "/opt/hyhal/bin",
    "/usr/local/corex/bin",
    "/opt/maca/bin",
    "/usr/local/PPU_SDK/ppu-smi/bin",
)
"""Where vendors put their tools beside PATH."""

ACCELERATOR_CLASSES = (0x0300, 0x0302, 0x0380, 0x0B40, 0x1200)
"""PCI classes: VGA, 3D and other display controllers, co-processors, processing accelerators.

Hygon and Huawei make processors and network cards too: their vendor id alone says nothing of accelerators.
"""

NO_ACCELERATORS = frozenset({(0x19E5, 0x1711)})
"""(vendor, device) of functions in those classes that compute nothing: the screen of Huawei's board controller."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command gave: its output and exit code, or the reason why it gave nothing."""

    text: str = ""
    code: int = 0
    fault: str | None = None


Run = Callable[[Sequence[str]], Answer | None]
"""argv -> what it gave, None where there is no such program."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one probe.

    source: the tool that was asked, or `device files`
    notable: something of this vendor is here, although it was not believed
    """

    chip: str
    source: str
    believed: bool
    reason: str
    notable: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """A host's chip and devices; `decided_by` is the source of the verdict that was believed, None for no verdict."""

    chip: Chip
    devices: tuple[Device, ...]
    decided_by: str | None
    verdicts: tuple[Verdict, ...]

    @property
    def doubts(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.notable and not verdict.believed)


@dataclass(frozen=True, slots=True)
class _Host:
    run: Run
    root: Path
    pci: tuple[tuple[int, str], ...]

    def functions_of(self, chip: Chip) -> tuple[str, ...]:
        return tuple(address for vendor, address in self.pci if vendor == chip.pci_vendor)


@dataclass(frozen=True, slots=True)
class _Found:
    chip: Chip
    source: str
    devices: tuple[Device, ...]


def find_program(name: str) -> str | None:
    """The path of a vendor's tool: on PATH, else where its vendor puts it."""
    import os
    import shutil

    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(PLACES))


def run_tool(argv: Sequence[str], timeout_s: float = TIMEOUT_S) -> Answer | None:
    """Run a discovery tool in a session of its own, and end that session if it takes longer than `timeout_s`.

    Its output goes into a file: a pipe would be held open by whatever the tool leaves behind, and waited for.
    """
    program = find_program(argv[0])
    if program is None:
        return None
    import os
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                [program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )
        except OSError as error:
            return Answer(fault=f"cannot be run: {error.strerror}")
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return Answer(fault=f"did not answer within {timeout_s:g} s")
        finally:
            _end_session(process)
        output.seek(0)
        return Answer(output.read(MOST_OUTPUT_BYTES).decode(errors="replace"), code)


def _end_session(process: "subprocess.Popen[bytes]") -> None:
    """End a tool that still runs. One that its driver holds in the kernel is left behind: nothing ends it."""
    import contextlib
    import os
    import signal
    import subprocess

    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)


def probe_host(run: Run = run_tool, root: Path = Path("/")) -> Probe:
    """What accelerators the host has. Never raises for what a tool does; without any, the chip is Generic_CPU."""
    host = _Host(run, root, read_pci(root))
    chosen: _Found | None = None
    verdicts: list[Verdict] = []
    for chip in ORDER:
        found, verdict = _ask_tools(chip, host)
        if found is not None and chosen is not None:
            both = bool(host.functions_of(found.chip))
            verdict = replace(verdict, believed=False, reason=_outranked(found, chosen, both), notable=both)
        chosen = chosen or found
        verdicts.append(verdict)
    if chosen is None:
        chosen = next(filter(None, (_count_files(chip, host) for chip in ORDER)), None)
        if chosen is not None:
            reason = f"its driver made files for {len(chosen.devices)} devices"
            verdicts.append(Verdict(chosen.chip.name, chosen.source, True, reason))
    if chosen is None:
        return Probe(GENERIC_CPU, (), None, tuple(verdicts))
    placed = (replace(device, card=card_of(chosen.chip, device)) for device in chosen.devices)
    devices = tuple(sorted(placed, key=lambda device: device.index))
    return Probe(chosen.chip, devices, chosen.source, tuple(verdicts))


def _ask_tools(chip: Chip, host: _Host) -> tuple[_Found | None, Verdict]:
    """What the chip's tool lists, if it is to be believed, and why or why not.

    A command that prints something else is followed by the next one; one that hangs is not, since the driver does.
    """
    tool, fault = chip.discovery or "", None
    for argv, parse in TOOLS.get(tool, ()):
        answer = host.run(argv)
        if answer is None:
            continue
        tool = argv[0]
        if answer.fault is not None:
            return None, Verdict(chip.name, tool, False, answer.fault, notable=True)
        try:
            devices = parse(answer.text)
        except UnreadableError as error:
            fault = _explain_failure(answer, str(error))
            continue
        if devices:
            return _weigh(_Found(chip, tool, devices), host)
        fault = _explain_failure(answer, "lists no device")
    if fault is not None:
        return None, Verdict(chip.name, tool, False, fault, notable=True)
    return None, _absent(chip, tool, host)


def _weigh(found: _Found, host: _Host) -> tuple[_Found | None, Verdict]:
    text = f"lists {len(found.devices)} devices"
    if doubt := _contradiction(found.chip, host):
        return None, Verdict(found.chip.name, found.source, False, f"{text}, but {doubt}", notable=True)
    return found, Verdict(found.chip.name, found.source, True, text, notable=True)


def _explain_failure(answer: Answer, why: str) -> str:
    """A tool that failed says why in its first line; one that did not printed something else than we read."""
    if answer.code == 0:
        return why
    line = next(filter(None, map(str.strip, answer.text.splitlines())), "no word")
    return f"failed with exit code {answer.code}: {line[:100]}"


def _absent(chip: Chip, tool: str, host: _Host) -> Verdict:
    functions = host.functions_of(chip)
    known = tool in TOOLS
    text = f"there is no {tool}" if known else f"what {tool} prints is not known: only device files count"
    if functions:
        text += f", although PCI has {len(functions)} of its accelerators: is its driver installed?"
    return Verdict(chip.name, tool, False, text, notable=bool(functions))


def _contradiction(chip: Chip, host: _Host) -> str | None:
    """Why PCI speaks against `chip`: it has none of this vendor's functions, and some of another's."""
    if chip.pci_vendor is None or host.functions_of(chip):
        return None
    others = [other.vendor for other in ORDER if other is not chip and host.functions_of(other)]
    return f"the accelerators on PCI are of {' and '.join(others)}: an imitation" if others else None


def _outranked(found: _Found, chosen: _Found, both: bool) -> str:
    """both: PCI has accelerators of this vendor too, so its tool is no imitation"""
    text = f"lists {len(found.devices)} devices, but {chosen.source} spoke before it"
    if both:
        return f"{text}: PCI has both kinds of chip; name the one that a job is for by `device_type: {found.chip.name}`"
    return f"{text}: a stack that is compatible with this one brings its tool along"


def _count_files(chip: Chip, host: _Host) -> _Found | None:
    """The devices for which the chip's driver made files, if PCI has any of them or its vendor's id is not known."""
    functions = host.functions_of(chip)
    if chip.pci_vendor is not None and not functions:
        return None
    dev = host.root / "dev"
    if chip.driver_node is not None and not (dev / chip.driver_node).exists():
        return None
    if chip.device_nodes is None:
        devices = tuple(Device(index, bus=bus) for index, bus in enumerate(functions))
    else:
        parent, _, name = chip.device_nodes.rpartition("/")
        matches = (re.fullmatch(name, path.name) for path in (dev / parent).glob("*"))
        devices = tuple(Device(int(match[1])) for match in matches if match)
    return _Found(chip, "device files", devices) if devices else None


def read_pci(root: Path) -> tuple[tuple[int, str], ...]:
    """(vendor id, address) of the host's accelerators, by address; none where /sys cannot be read."""
    found = []
    for folder in sorted((root / "sys" / "bus" / "pci" / "devices").glob("*")):
        try:
            vendor, device, kind = (int((folder / name).read_text(), 16) for name in ("vendor", "device", "class"))
        except (OSError, ValueError):
            continue  # a function that is just being unplugged has no files to read
        if kind >> 8 in ACCELERATOR_CLASSES and (vendor, device) not in NO_ACCELERATORS:
            found.append((vendor, folder.name))
    return tuple(found)
