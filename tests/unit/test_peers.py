"""What agents of one run tell each other through its folder."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.runner.launch import peers
from flagscale.runner.launch.journal import Spec
from flagscale.runner.launch.notice import Notice, load_notice, write_notice
from flagscale.runner.launch.peers import Peers


def make_spec(folder: Path, label: str = "host_0_a", **fields: Any) -> Spec:
    paths = {name: str(folder / f"{label}.{name}") for name in ("output", "pid_file", "agent_log", "stop_request")}
    return Spec(
        run_id="r",
        token="t",
        label=label,
        node_rank=0,
        processes=(),
        events=str(folder / f"{label}.events.jsonl"),
        heartbeat=str(folder / f"{label}.heartbeat"),
        rank_dir=str(folder),
        details_dir=str(folder),
        cwd="/",
        ending=str(folder / "ending.json"),
        neighbour="host_1_b",
        **paths,
        **fields,
    )


def test_the_first_to_end_the_run_is_the_one_that_is_named(tmp_path: Path) -> None:
    a, b = Peers(make_spec(tmp_path)), Peers(make_spec(tmp_path, "host_1_b"))
    assert (a.find_notice(), b.find_notice()) == (None, None)
    b.tell("rank 3 died of SIGKILL")
    a.tell("rank 0 ended with exit code 1")
    assert b.find_notice() is None
    notice = a.find_notice()
    assert notice
    assert notice.text == "ended because of host_1_b: rank 3 died of SIGKILL"
    assert not list(tmp_path.glob(".*"))


def test_of_many_at_once_one_is_first(tmp_path: Path) -> None:
    path, won = tmp_path / "ending.json", []

    def write(number: int) -> None:
        if write_notice(path, Notice(f"host_{number}", "why")):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert load_notice(path) == Notice(f"host_{won[0]}", "why")


def test_force_is_added_and_the_reason_stays(tmp_path: Path) -> None:
    path = tmp_path / "ending.json"
    assert write_notice(path, Notice("", "stopped by a"))
    assert write_notice(path, Notice("", "stopped by b", is_forced=True))
    assert not write_notice(path, Notice("", "stopped by c", is_forced=True))
    assert load_notice(path) == Notice("", "stopped by a", True)


@given(st.binary(max_size=40))
def test_a_notice_that_cannot_be_read_is_none(raw: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"notice.{os.getpid()}"
    path.write_bytes(raw)
    try:
        assert load_notice(path) is None
    finally:
        path.unlink()


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    assert not write_notice(tmp_path / "missing" / "ending.json", Notice("", "why"))
    alone = Peers(Spec(**{**_fields(make_spec(tmp_path)), "ending": "", "neighbour": ""}))
    alone.tell("why")
    assert alone.find_notice() is None
    assert alone.find_silence() is None


def _fields(spec: Spec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(peers.time, "monotonic", lambda: self.now)


def beat(folder: Path, label: str, count: int) -> None:
    path = folder / f"{label}.heartbeat"
    path.touch()
    os.utime(path, (count, count))


def silence_after(folder: Path, clock: Clock, beats: int, *, own: bool, theirs: bool) -> str | None:
    watch = Peers(make_spec(folder))
    said = None
    for count in range(1, beats + 1):
        if own or count == 1:
            beat(folder, "host_0_a", count)
        if theirs or count == 1:
            beat(folder, "host_1_b", count)
        said = watch.find_silence() or said
        clock.now += 5.0
    return said


@pytest.mark.parametrize(
    ("beats", "own", "theirs", "is_silent"),
    [
        (20, True, False, True),  # it vanished
        (20, True, True, False),
        (12, True, False, False),  # not yet
        (20, False, False, False),  # the disk is full: nobody's heartbeat can be written
    ],
)
def test_a_neighbour_s_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: int, own: bool, theirs: bool, is_silent: bool
) -> None:
    said = silence_after(tmp_path, Clock(monkeypatch), beats, own=own, theirs=theirs)
    assert (said is not None) is is_silent
    if is_silent:
        assert said == "no heartbeat from host_1_b for 60 s"


def test_a_neighbour_that_has_ended_or_never_began_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    watch = Peers(make_spec(tmp_path))
    for count in range(30):
        beat(tmp_path, "host_0_a", count + 1)
        assert watch.find_silence() is None
        clock.now += 5.0
    (tmp_path / "host_1_b.events.jsonl").write_text('{"time": 1, "event": "job_ended"}\n')
    assert silence_after(tmp_path, clock, 30, own=True, theirs=False) is None
