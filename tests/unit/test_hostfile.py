"""The hostfile's grammar, and every fault of a file with its line."""

from pathlib import Path

import pytest

from flagscale.runner.config.hostfile import Host, load_hostfile

KEY = "experiment.runner.hostfile"


def read(folder: Path, text: str | bytes) -> tuple[tuple[Host, ...], list[str]]:
    path = folder / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found, faults = load_hostfile(path, KEY)
    return found, [str(fault).removeprefix(f"{path}:").replace(f"{KEY}: ", "") for fault in faults]


def test_what_a_line_may_hold(tmp_path: Path) -> None:
    text = """\
# the first is the master

node1 slots=8 type=A800   # its chip
  user@node-2.cluster:2222\tslots=4 type=A800
10.0.0.3 type=gpu slots=16
[fe80::1]:22 slots=1 type=cpu
"""
    assert read(tmp_path, text) == (
        (
            Host("node1", 8, "A800"),
            Host("node-2.cluster", 4, "A800", "user", 2222),
            Host("10.0.0.3", 16, "gpu"),
            Host("fe80::1", 1, "cpu", None, 22),
        ),
        [],
    )


@pytest.mark.parametrize("text", ["\ufeffa slots=1\n", "a slots=1\r\n", "a slots=1", "a   slots=01\n"])
def test_marks_of_editors_do_no_harm(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == ((Host("a", 1),), [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a", "host `a` has no slots="),
        ("a slots=", "`slots=` cannot be read"),
        ("a slots=0", "host `a` has slots=0"),
        ("a slots=-1", "host `a` has slots=-1"),
        ("a slots=8garbage", "host `a` has slots=8garbage"),
        ("a slots=" + "9" * 5000, "host `a` has slots=999"),
        ("a slots=8 slots=9", "`slots=9` cannot be read"),
        ("a slots=8 typ=A100", "`typ=A100` cannot be read"),
        ("a slots=8 trailing", "`trailing` cannot be read"),
        ("h1;touch slots=8", "`h1;touch` is not a host name"),
        ("$(reboot) slots=8", "`$(reboot)` is not a host name"),
        ("-oProxyCommand=x slots=8", "`-oProxyCommand=x` is not a host name"),
        ("a/../b slots=8", "`a/../b` is not a host name"),
        ("a'b slots=8", "`a'b` is not a host name"),
        (".. slots=8", "`..` is not a host name"),
        ("a:70000 slots=8", "port 70000 is not a port"),
        ("a:0 slots=8", "port 0 is not a port"),
        ("a:" + "1" * 5000 + " slots=8", "is not a host name"),
    ],
)
def test_a_line_that_cannot_be_right(tmp_path: Path, line: str, says: str) -> None:
    _, faults = read(tmp_path, f"ok slots=1\n\n{line}\n")
    assert len(faults) == 1
    assert faults[0].startswith("3: ")
    assert says in faults[0]
    assert faults[0].endswith("; expected `[user@]host[:port] slots=N [type=CHIP]`")


def test_every_fault_of_a_file_is_told(tmp_path: Path) -> None:
    _, faults = read(tmp_path, "a slots=1\na slots=2\nb\nc slots=1 type=X\n")
    assert [fault.split(";")[0] for fault in faults[:2]] == [
        "2: host `a` stands here a second time",
        "3: host `b` has no slots=",
    ]
    assert faults[2].endswith("type= is given for some hosts but not for a")


@pytest.mark.parametrize("text", ["", "# nothing\n\n"])
def test_a_file_without_hosts_is_a_fault(tmp_path: Path, text: str) -> None:
    assert "names no host" in read(tmp_path, text)[1][0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "is not UTF-8 text" in read(tmp_path, b"\xff\xfe")[1][0]
    for path, says in ((tmp_path, "Is a directory"), (tmp_path / "no", "No such file"), (Path("a\0b"), "is not UTF-8")):
        found, faults = load_hostfile(path, KEY)
        assert found == ()
        assert says in str(faults[0])


def test_this_machine_has_two_names() -> None:
    assert [Host(name, 1).is_local for name in ("localhost", "127.0.0.1", "node1")] == [True, True, False]
