"""Datagrams between agents: who is heard, what is believed, who is missed."""

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_peers import make_spec

from flagscale.runner.launch import wire
from flagscale.runner.launch.notice import Notice, load_notice
from flagscale.runner.launch.peers import Peers
from flagscale.runner.launch.ports import find_free_port
from flagscale.runner.launch.wire import Wire, pack, unpack

WHY = Notice("host_1_b", "rank 3 died of SIGKILL")


def make_wires(folder: Path, count: int = 3, **fields: Any) -> list[Wire]:
    """The head's first."""
    port = find_free_port()
    meeting = {"meet_host": "127.0.0.1", "meet_port": port, "meet_key": "t", **fields}
    return [
        Wire(make_spec(folder, f"host_{number}_{name}", leads=number == 0, **meeting))
        for number, name in zip(range(count), "abcdef", strict=False)
    ]


def close(*wires: Wire) -> None:
    for end in wires:
        end.leave(None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "AGAIN_S", 0.01)


def test_a_notice_of_one_reaches_all_by_way_of_the_head(tmp_path: Path) -> None:
    head, first, second = make_wires(tmp_path)
    assert [end.exchange(None) for end in (first, second, head)] == [None, None, None]
    assert set(head.heard) == {"host_1_b", "host_2_c"}
    first.exchange(WHY)
    assert head.exchange(None) == WHY
    assert second.exchange(None) is None
    head.exchange(WHY)
    assert second.exchange(None) == WHY
    close(head, first, second)


def test_one_that_comes_late_is_told_at_once(tmp_path: Path) -> None:
    head, late = make_wires(tmp_path, 2)
    head.exchange(WHY)
    late.exchange(None)
    head.exchange(WHY)
    assert late.exchange(None) == WHY
    close(head, late)


def test_who_fails_asks_whether_another_did_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, first, second = make_wires(tmp_path)
    monkeypatch.setattr(wire, "ANSWER_S", 0.1)
    assert second.ask(None) is None  # nobody answers
    head.exchange(None)
    second.exchange(None)
    first.exchange(WHY)
    answering = threading.Thread(target=lambda: (time.sleep(0.02), head.exchange(WHY)))
    monkeypatch.setattr(wire, "ANSWER_S", 30.0)
    answering.start()
    assert second.ask(None) == WHY
    answering.join()
    assert head.ask(None) is None  # it is told by all, and need not ask
    close(head, first, second)


def test_a_head_that_ends_is_not_missed_and_says_why(tmp_path: Path) -> None:
    head, other = make_wires(tmp_path, 2)
    other.exchange(None)
    head.exchange(None)
    other.exchange(None)
    head.leave(WHY)
    assert other.exchange(None) == WHY
    assert other.find_silence(0.0) is None
    other.next_word = 0.0
    other.exchange(WHY)  # nobody listens there any more
    assert other.find_silence(0.0) is None
    close(other)


def test_who_was_heard_and_is_silent_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, other = make_wires(tmp_path, 2)
    now = 1000.0
    monkeypatch.setattr(wire.time, "monotonic", lambda: now)
    assert head.find_silence(60) is None  # never heard, never missed
    other.exchange(None)
    head.exchange(None)
    other.exchange(None)
    now += 59
    assert (head.find_silence(60), other.find_silence(60)) == (None, None)
    now += 1
    assert head.find_silence(60) == "no word from host_1_b for 60 s"
    assert other.find_silence(60) == "no word from host_0_a for 60 s"
    other.exchange(None)
    head.exchange(None)
    assert head.find_silence(60) is None
    close(head, other)


def test_a_head_host_without_an_agent_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, other = make_wires(tmp_path, 2)
    head.leave(None)
    now = 1000.0
    monkeypatch.setattr(wire.time, "monotonic", lambda: now)
    for _ in range(3):
        other.exchange(None)
        now += 30
    assert other.find_silence(60) == "no agent of this run listens on 127.0.0.1 for 60 s"
    close(other)


def test_a_head_whose_name_is_not_known_harms_nothing(tmp_path: Path) -> None:
    (lost,) = make_wires(tmp_path, 1)
    lost.leave(None)
    stray = Wire(make_spec(tmp_path, "host_1_b", meet_host="nosuch.invalid", meet_port=1))
    assert stray.exchange(WHY) is None
    assert stray.find_silence(0.0) is None
    stray.leave(WHY)


def test_without_the_token_nothing_is_believed_and_nothing_a_second_time(tmp_path: Path) -> None:
    (head,) = make_wires(tmp_path, 1)
    row = {"from": "host_1_b", "count": 5, "notice": {"label": "x", "reason": "y", "is_forced": True}}
    true = pack("t", {**row, "is_leaving": False})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.connect(("127.0.0.1", head.spec.meet_port))
        for packet in (b"", b"x", pack("other", {**row, "is_leaving": False}), true[:-1], b"0" * 64 + true[64:]):
            stranger.send(packet)
            assert head.exchange(None) is None
        assert head.heard == {}
        stranger.send(true)
        assert head.exchange(None) == Notice("x", "y", True)
        stranger.send(true)
        assert head.exchange(None) is None
        stranger.send(pack("t", {**row, "count": 4, "is_leaving": False}))
        assert head.exchange(None) is None
    close(head)


@given(st.text(max_size=5), st.binary(max_size=200))
def test_only_what_was_signed_is_read(token: str, packet: bytes) -> None:
    assert unpack(token, packet) is None
    row = {"said": packet.hex()}
    assert unpack(token, pack(token, row)) == row
    assert unpack(token + "x", pack(token, row)) is None


def test_a_long_reason_fits_into_a_datagram(tmp_path: Path) -> None:
    head, other = make_wires(tmp_path, 2)
    other.exchange(Notice("host_1_b", "ä" * 5000))
    told = head.exchange(None)
    assert told
    assert told.reason == "ä" * wire.MOST_REASON
    assert len(json.dumps({"reason": told.reason})) < wire.MOST_BYTES - 300
    close(head, other)


def test_the_files_of_hosts_become_the_same(tmp_path: Path) -> None:
    """What one writes into its own folder, all have in theirs."""
    port = find_free_port()
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    a, b, c = (
        Peers(
            make_spec(
                folder, f"host_{number}_x", leads=number == 0, meet_host="127.0.0.1", meet_port=port, meet_key="k"
            )
        )
        for number, folder in enumerate(folders)
    )
    for peer in (b, c, a):
        assert peer.find_notice() is None
    c.tell("rank 2 ended with exit code 1")
    assert c.find_notice() is None  # its own
    assert a.find_notice() == Notice("host_2_x", "rank 2 ended with exit code 1")
    a.find_notice()  # passes it on
    assert b.find_notice() == Notice("host_2_x", "rank 2 ended with exit code 1")
    assert {load_notice(folder / "ending.json") for folder in folders} == {a.known}
    for peer in (a, b, c):
        peer.leave()


def test_a_disk_that_takes_nothing_ends_no_less(tmp_path: Path) -> None:
    port = find_free_port()
    (tmp_path / "a").mkdir()
    whole = Peers(make_spec(tmp_path / "a", leads=True, meet_host="127.0.0.1", meet_port=port, meet_key="k"))
    full = Peers(make_spec(tmp_path / "missing", "host_1_b", meet_host="127.0.0.1", meet_port=port, meet_key="k"))
    full.find_notice()
    full.tell("no space left")
    full.find_notice()
    assert whole.find_notice() == Notice("host_1_b", "no space left")
    whole.leave()
    full.leave()
