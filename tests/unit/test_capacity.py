"""What a host can hold: ranks against the chips that are seen, and a disk with room."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_ssh import make_plan

from flagscale.chips.ids import Device
from flagscale.chips.probe import Probe
from flagscale.chips.records import CAMBRICON, GENERIC_CPU, NVIDIA, Chip
from flagscale.errors import LaunchError, UserError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch import capacity, checks
from flagscale.runner.launch.capacity import find_disk_faults, weigh_chips


def seen(chip: Chip, count: int) -> Probe:
    return Probe(chip, tuple(map(Device, range(count))), "its tool" if count else None, ())


NOTHING = seen(GENERIC_CPU, 0)


@pytest.mark.parametrize(
    ("chip", "probe", "fault", "note"),
    [
        ("NVIDIA", seen(NVIDIA, 1), None, None),
        ("A800", seen(NVIDIA, 8), None, None),
        (None, seen(NVIDIA, 1), None, None),
        (None, NOTHING, None, None),
        ("Generic_CPU", seen(NVIDIA, 0), None, None),
        ("NVIDIA", NOTHING, None, "not checked whether it has 1 chips (NVIDIA): no tool there tells of any"),
        ("NVIDIA", seen(CAMBRICON, 4), "its chips are Cambricon_MLU (its tool), but the hostfile says NVIDIA", None),
    ],
)
def test_ranks_and_chips(tmp_path: Path, chip: str | None, probe: Probe, fault: str | None, note: str | None) -> None:
    (host,) = make_plan(tmp_path, Host("a", 1, chip)).hosts
    assert weigh_chips(host, lambda: probe) == (fault, note)


def test_fewer_chips_than_ranks_names_both(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, Host("a", 1), Host("b", 1, "A800"))
    processes = tuple(process for host in plan.hosts for process in host.processes)
    for host, told in zip(plan.hosts, ("; ranks that compute on its CPU say `type=Generic_CPU`", ""), strict=True):
        two = SimpleNamespace(host=host.host, processes=processes)
        fault, note = weigh_chips(two, lambda: seen(NVIDIA, 1))  # type: ignore[arg-type]
        assert (fault, note) == (f"2 ranks, but its tool sees 1 NVIDIA chips{told}", None)


def test_a_program_without_ranks_needs_no_chips_that_we_count(tmp_path: Path) -> None:
    (host,) = make_plan(tmp_path, Host("a", 1, "NVIDIA")).hosts
    alone = SimpleNamespace(host=host.host, processes=())
    assert weigh_chips(alone, lambda: pytest.fail("asked")) == (None, None)  # type: ignore[arg-type]


def test_a_full_disk_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path, Host("localhost", 1))
    assert list(find_disk_faults(plan)) == []
    disk = SimpleNamespace(f_bavail=1, f_frsize=1 << 20, f_files=10, f_favail=5)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert list(find_disk_faults(plan)) == [f"its disk is full: 1 MiB are free in {tmp_path}; expected 64 at least"]
    with pytest.raises(LaunchError, match="its disk is full"):
        checks.check_capacity(plan)
    disk.f_bavail, disk.f_favail = 1000, 0
    assert list(find_disk_faults(plan)) == [f"its disk takes no more files: no inode is free in {tmp_path}"]
    disk.f_files = 0  # a file system that counts none
    assert list(find_disk_faults(plan)) == []


def test_what_is_wrong_or_unknown_here_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path, Host("localhost", 1, "NVIDIA"))
    monkeypatch.setattr(checks, "weigh_chips", lambda _: (None, "not checked"))
    checks.check_capacity(plan)
    assert capsys.readouterr().err == "note: localhost: not checked\n"
    monkeypatch.setattr(checks, "weigh_chips", lambda _: ("2 ranks, 1 chip", None))
    with pytest.raises(UserError, match="localhost: 2 ranks, 1 chip"):
        checks.check_capacity(plan)
    assert capacity.nearest_folder(tmp_path / "a" / "b") == tmp_path
