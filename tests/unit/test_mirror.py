"""Fetching what other hosts wrote: each byte at its place, whoever fetches, however often."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_peers import make_spec
from test_ssh import RUN_ID, TWO, VALUES, make_plan, write_run
from test_state import agent_started

from flagscale.errors import RunError
from flagscale.runner.launch import errands, folder, procs, reach
from flagscale.runner.launch.files import NewFile, write_all
from flagscale.runner.launch.folder import RunRef, load_ref, ref_of
from flagscale.runner.launch.mirror import fetch_file, fetch_outputs, fetch_rank_files, write_at
from flagscale.runner.launch.record import HostRecord, load_record
from flagscale.runner.monitor.state import query_run


class HostOfTest:
    """Errands answered by this process, for a host whose files lie below a folder of their own."""

    def __init__(self, *silent: str) -> None:
        self.silent = silent
        self.asked: list[str] = []

    def call(self, errand: str, requests: dict[str, Any], _limit_s: float = 1.0) -> dict[str, reach.Reply]:
        self.asked.append(errand)
        return {
            label: reach.Reply({}, "cannot be reached")
            if label in self.silent
            else reach.Reply(json.loads(json.dumps(errands.ERRANDS[errand](request))))
            for label, request in requests.items()
        }

    def run_all(self, commands: dict[str, Any], _limit_s: float) -> dict[str, reach.Reply]:
        assert not commands  # hosts that share a folder are asked so
        return {}

    def each(self, labels: Any, run: Any) -> dict[str, Any]:
        return {label: run(label) for label in labels}


def make_record(base: Path, **events: Any) -> HostRecord:
    spec = make_spec(base / "host")
    (base / "host").mkdir(exist_ok=True)
    rows = tuple({"time": 1.0, "event": name, **fields} for name, fields in events.items())
    return HostRecord(spec, rows, False, True, None, None, base / "mirror")


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=8), st.binary(min_size=1, max_size=400))
def test_fetching_parts_in_any_order_and_twice_gives_the_file(parts: list[tuple[int, int]], whole: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"mirror.{os.getpid()}" / "x"
    try:
        for first, last in [*parts, (0, len(whole)), *parts]:
            if first <= min(last, len(whole)):
                write_at(path, first, whole[first:last])
        assert path.read_bytes() == whole
    finally:
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def test_an_output_is_fetched_from_where_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errands, "CHUNK_BYTES", 7)
    record = make_record(tmp_path, agent_started={"output_start": 12})
    Path(record.spec.output).write_text("earlier run\nthis run writes this\n")
    links: Any = HostOfTest()
    assert fetch_outputs([record], links) == {}
    assert record.output.read_bytes() == b"\0" * 12 + b"this run writes this\n"
    with Path(record.spec.output).open("a") as file:
        file.write("and more\n")
    assert fetch_outputs([record], links) == {}
    assert record.output.read_bytes()[12:] == b"this run writes this\nand more\n"
    ended = make_record(tmp_path, agent_started={"output_start": 12}, job_ended={"output_end": 33})
    links.asked.clear()
    assert fetch_outputs([ended], links) == {}
    assert links.asked == []  # it has all of it


def test_what_cannot_be_fetched_is_told(tmp_path: Path) -> None:
    record = make_record(tmp_path, agent_started={"output_start": 0})
    links: Any = HostOfTest()
    fault = fetch_file(record, links, record.spec.output)
    assert fault == f"{record.spec.output}: No such file or directory"
    silent: Any = HostOfTest(record.label)
    assert fetch_outputs([record], silent) == {record.label: "cannot be reached"}
    assert fetch_outputs([make_record(tmp_path)], silent) == {}  # its agent has not started
    with pytest.raises(RunError, match="cannot keep here what was fetched: /proc/x/y: No such file"):
        write_at(Path("/proc/x/y"), 0, b"")


def test_files_of_a_rank_come_under_their_whole_path(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    for attempt in (0, 1):
        path = tmp_path / "host" / "r" / "x" / f"attempt_{attempt}" / "2" / "stdout.log"
        write_all([NewFile(path, f"attempt {attempt}\n".encode())])
    os.utime(path.parent.parent, (2e9, 2e9))
    links: Any = HostOfTest()
    fetch_rank_files(record, links, 2)
    found = [path for path in (tmp_path / "mirror").rglob("*") if path.is_file()]
    assert [path.read_text() for path in found] == ["attempt 1\n"]
    assert found == [record.locate(str(path))]


# --- a whole run -----------------------------------------------------------------------------------------------------


def write_away(base: Path) -> RunRef:
    run = write_run(make_plan(base / "here", *TWO, no_shared_fs=True), {})
    return load_ref(run.exp_dir, RUN_ID)


def test_a_run_without_a_shared_folder_is_known_as_such(tmp_path: Path) -> None:
    run = write_away(tmp_path)
    assert [remote.is_shared for remote in run.remotes] == [False, False]
    spec = run.load_spec("host_1_b")
    assert (spec.meet_host, spec.meet_port, spec.leads) == ("localhost", int(VALUES["master_port"]), False)
    assert run.load_spec("host_0_a").leads
    assert spec.meet_key == run.load_spec("host_0_a").meet_key != ""
    record = load_record(run, "host_1_b")
    assert record.mirror == run.folder / "fetched" / "host_1_b"
    assert not record.is_watched
    plan = make_plan(tmp_path, TWO[0], no_shared_fs=True)
    assert folder.make_spec(plan, plan.hosts[0], RUN_ID, "t", 1.0, 5).meet_port == 0  # one host has no others
    assert ref_of(plan, RUN_ID, ()).remotes == ()


def test_state_and_last_words_come_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_away(tmp_path)
    there = tmp_path / "there"
    links: Any = HostOfTest("host_0_a")
    monkeypatch.setattr(reach, "Links", lambda *_: _Held(links))
    original = run.load_spec("host_1_b")
    other = run.load_spec("host_0_a")
    moved = replace(
        original, events=str(there / "e.jsonl"), heartbeat=str(there / "beat"), output=str(there / "out"), token="none"
    )
    monkeypatch.setattr(RunRef, "load_spec", lambda _run, label: moved if label == "host_1_b" else other)
    there.mkdir()
    rows = [agent_started(True, "elsewhere") | {"output_start": 4}, {"event": "rank_up", "rank": 1}]
    (there / "e.jsonl").write_text("".join(json.dumps({"time": 9.0, **row}) + "\n" for row in rows))
    (there / "out").write_text("old\n iteration  3/ 10 | lm loss: 2.5 |\n")
    (there / "beat").touch()
    state = query_run(run)
    assert state.state == "unreachable"
    assert [host.state for host in state.hosts] == ["unreachable", "lost"]
    assert state.progress
    assert state.progress.lm_loss == 2.5
    assert (state.hosts[1].heartbeat_age_s or 0) < 60
    last = {"event": "job_ended", "outcome": "failed", "exit_code": 3, "first_rank": 1, "source": str(there / "err")}
    with (there / "e.jsonl").open("a") as file:
        file.write(json.dumps({"time": 12.0, **last, "reason": "rank 1 ended", "output_end": 40}) + "\n")
    (there / "err").write_text("boom\n")
    state = query_run(run)
    assert (state.hosts[1].state, state.hosts[1].exit_code) == ("failed", 3)
    record = load_record(run, "host_1_b")
    path, start, end = record.find_last_part(str(there / "err"))
    assert (path.read_text(), start, end) == ("boom\n", 0, None)
    assert [record.label for record in reach.find_askable(run, reach.load_records(run))] == ["host_0_a"]


def test_watchers_that_have_not_beaten_yet_are_seen_to_live(tmp_path: Path) -> None:
    """The first heartbeat comes a moment after the first events."""
    journal, beat = str(tmp_path / "e.jsonl"), str(tmp_path / "beat")
    Path(journal).write_text(json.dumps({"time": 9.0, **agent_started(True)}) + "\n")
    answer = errands.report({"events": journal, "offset": 0, "heartbeat": beat, "output": journal, "token": "t"})
    assert (answer["is_watched"], answer["beat_age_s"]) == (True, None)
    assert json.loads(answer["events"])["event"] == "agent_started"


def test_watchers_that_come_or_go_while_their_journal_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of them and what they wrote is of one moment."""
    journal = tmp_path / "e.jsonl"
    rows = [agent_started(True), {"event": "job_ended", "outcome": "failed"}]

    def write_next(_path: Path) -> bytes:
        """What is read is what was there before."""
        data = journal.read_bytes() if journal.exists() else b""
        with journal.open("a") as file:
            file.write("".join(json.dumps({"time": 9.0, **row}) + "\n" for row in rows[:1]))
        del rows[:1]
        return data

    monkeypatch.setattr(errands, "read_journal", write_next)
    monkeypatch.setattr(procs, "is_same_alive", lambda *_: False)
    where = str(journal)
    answer = errands.report({"events": where, "offset": 0, "heartbeat": where, "output": where, "token": "t"})
    assert [json.loads(line)["event"] for line in answer["events"].splitlines()] == ["agent_started", "job_ended"]
    assert not answer["is_watched"]


class _Held:
    def __init__(self, links: Any) -> None:
        self.links = links

    def __enter__(self) -> Any:
        return self.links

    def __exit__(self, *_: object) -> None: ...
