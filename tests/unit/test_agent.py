"""The parts of the agent: processes, events, torchrun's summary, the archive."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale import env
from flagscale.runner.launch import archive, procs, watch
from flagscale.runner.launch.journal import Entry, Journal, Spec, find_failures, load_spec, write_small

SPEC = Spec(
    run_id="20260101T000000-abcd",
    token="t",
    label="host_0_localhost",
    node_rank=0,
    processes=(Entry("main", "/s.sh", 2, 4, True),),
    **dict.fromkeys(
        ("output", "pid_file", "events", "heartbeat", "agent_log", "rank_dir", "details_dir", "stop_request", "cwd"),
        "/x",
    ),
)


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_process_is_read_whatever_its_name(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 ("
    shutil.copy(shutil.which("sleep") or "", program)
    with subprocess.Popen([program, "60"]) as child:
        proc = procs.find_proc(child.pid)
        assert proc is not None
        assert (proc.pid, proc.ppid, proc.is_zombie) == (child.pid, os.getpid(), False)
        assert procs.is_same_alive(proc.pid, proc.start_time)
        assert child.pid in procs.find_descendants(os.getpid(), procs.list_procs())
        child.kill()


def test_a_dead_process_that_nobody_waited_for_is_not_alive() -> None:
    child = subprocess.Popen(["sleep", "60"])
    proc = procs.find_proc(child.pid)
    assert proc is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not procs.is_same_alive(proc.pid, proc.start_time)
    assert child.wait() == -signal.SIGKILL
    assert procs.find_proc(child.pid) is None
    assert procs.read_environ(child.pid) == {}
    procs.send_signal(proc, signal.SIGTERM)


def test_a_signal_goes_to_this_very_process_or_to_none() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        proc = procs.find_proc(child.pid)
        assert proc is not None
        procs.send_signal(procs.Proc(proc.pid, proc.ppid, proc.start_time + 1, False), signal.SIGKILL)
        assert child.poll() is None
        procs.send_signal(proc, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_ours_are_those_who_bear_the_token() -> None:
    other = {**os.environ, procs.TOKEN: "theirs"}
    ours = {**os.environ, procs.TOKEN: "ours-7f"}
    with subprocess.Popen(["sleep", "60"], env=other) as theirs, subprocess.Popen(["sleep", "60"], env=ours) as mine:
        # a fresh child still shows our own environment until it has become `sleep`
        while procs.read_environ(mine.pid).get(procs.TOKEN) != "ours-7f":
            pass
        assert [proc.pid for proc in procs.find_ours("ours-7f")] == [mine.pid]
        assert procs.end_leftovers("ours-7f", 5.0) == 1
        assert mine.wait() == -signal.SIGTERM
        assert theirs.poll() is None
        assert procs.end_leftovers("ours-7f", 5.0) == 0
        theirs.kill()


def test_a_program_that_is_not_there_says_so(tmp_path: Path) -> None:
    output = os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT)
    pid = procs.spawn(["/no/such/program"], {}, "/", output)
    assert procs.split_status(os.waitpid(pid, 0)[1]) == {"exit_code": 127, "signal": None}
    assert "/no/such/program" in (tmp_path / "output").read_text()
    os.close(output)


@given(st.integers(0, 255))
def test_an_exit_code_is_kept(code: int) -> None:
    assert procs.split_status(code << 8) == {"exit_code": code, "signal": None}


@given(st.integers(1, 64))
def test_a_signal_has_a_name(signum: int) -> None:
    result = procs.split_status(signum)
    assert result["exit_code"] is None
    assert str(result["signal"]).startswith("SIG")


# --- what is told ----------------------------------------------------------------------------------------------------


def test_a_spec_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(asdict(SPEC)))
    assert load_spec(path) == SPEC


FULL = """
import resource, sys
from pathlib import Path
from flagscale.runner.launch.journal import Journal
journal = Journal(sys.argv[1], "h")
journal.write("first")
size = Path(sys.argv[1]).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
journal.write("second", text="x" * 50)
journal.write("third")
assert Path(sys.argv[1]).stat().st_size == size, "no half event stays"
assert len(journal.waiting) == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.close()
"""


def test_a_disk_that_takes_nothing_delays_events_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "events"
    subprocess.run([sys.executable, "-c", FULL, str(path)], check=True)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["first", "second", "third"]


def test_the_reserve_is_given_up_at_the_end(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "events"), "h")
    journal.keep_reserve()
    assert journal.reserve.stat().st_size > 0
    journal.write("job_ended")
    assert journal.holds("job_ended")
    assert not journal.holds("after_stop")
    journal.close()
    assert not journal.reserve.exists()


def test_a_small_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "small"
    write_small(str(path), "one")
    write_small(str(path), "two")
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]
    assert path.read_text() == "two"
    write_small(str(tmp_path / "missing" / "small"), "three")


# --- torchrun's summary ----------------------------------------------------------------------------------------------


def render_row(number: int, rank: int, local_rank: int, code: int, pid: int) -> str:
    return f"""[{number}]:
  time      : 2026-11-20_22:59:54
  host      : localhost
  rank      : {rank} (local_rank: {local_rank})
  exitcode  : {code} (pid: {pid})
  error_file: <N/A>
  traceback : something
"""


def render_summary(others: str, root: str) -> str:
    return (
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\nr.py FAILED\n-----\nFailures:\n"
        f"{others or '  <NO_OTHER_FAILURES>'}\n-----\nRoot Cause (first observed failure):\n{root}=====\n"
    )


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(-15, 255).filter(bool)), min_size=1, max_size=5))
def test_every_failed_rank_is_read_and_the_first_stands_first(failed: list[tuple[int, int]]) -> None:
    rows = [render_row(number, rank, rank % 8, code, 1000 + number) for number, (rank, code) in enumerate(failed)]
    found = find_failures("noise\n" + render_summary("".join(rows[1:]), rows[0]) + "more noise\n")
    assert [(row["rank"], row["pid"]) for row in found] == [(rank, 1000 + n) for n, (rank, _) in enumerate(failed)]
    assert [row["first"] for row in found] == [True] + [False] * (len(failed) - 1)
    for row, (_, code) in zip(found, failed, strict=True):
        assert row["exit_code"] == (code if code > 0 else None)
        assert row["signal"] == (signal.Signals(-code).name if code < 0 else None)


def test_only_the_last_summary_counts_and_none_is_none() -> None:
    first = render_summary("", render_row(0, 3, 1, 1, 10))
    last = render_summary("", render_row(0, 5, 1, -9, 11))
    assert [row["rank"] for row in find_failures(first + last)] == [5]
    assert find_failures("Traceback ...\n") == []


TRACEBACK = """Traceback (most recent call last):
    File "torch/distributed/elastic/multiprocessing/errors/__init__.py", line 1, in wrapper
      return f(*args, **kwargs)
  ValueError: rank      : 77 (local_rank: 7)
"""
KILLED = render_row(0, 2, 2, -9, 202).replace("(pid: 202)", "(pid: 202) Signal 9 (SIGKILL) received by PID 202")


def test_tracebacks_and_signals_between_the_rows_confuse_nothing() -> None:
    others = "".join(
        render_row(number, rank, rank, 1, 100 + rank).replace("something\n", TRACEBACK)
        for number, rank in ((1, 0), (2, 1), (3, 3))
    )
    found = find_failures(render_summary(others, KILLED))
    assert [(row["rank"], row["exit_code"], row["signal"], row["first"]) for row in found] == [
        (2, None, "SIGKILL", True),
        (0, 1, None, False),
        (1, 1, None, False),
        (3, 1, None, False),
    ]


def test_a_summary_cut_short_is_read_as_far_as_it_goes_and_names_no_first() -> None:
    whole = render_summary("".join(render_row(n, n, n, 1, 10 + n) for n in range(1, 4)), render_row(0, 0, 0, -6, 10))
    seen = {(row["rank"], row["pid"]) for row in find_failures(whole)}
    root = whole.index("Root Cause")
    for cut in range(len(whole)):
        found = find_failures(whole[:cut])
        assert {(row["rank"], row["pid"]) for row in found} <= seen
        assert any(row["first"] for row in found) is (cut > root and len(found) == 4)
    assert find_failures(whole[whole.index("Failures:") :]) == []


@pytest.mark.parametrize("number", ["1,024", "1.024", "1\u202f024", "one", ""])
def test_a_number_in_another_notation_is_passed_over(number: str) -> None:
    odd = render_row(1, 7, 7, 1, 17).replace("7 (local", f"{number} (local")
    assert [row["rank"] for row in find_failures(render_summary(odd, render_row(0, 3, 3, 1, 13)))] == [3]


# --- the archive -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [archive.AGENT, archive.KEEPER, archive.ERRANDS, archive.SURVEY])
def test_an_archive_needs_only_the_standard_library_and_itself(files: tuple[str, ...]) -> None:
    allowed = {*sys.stdlib_module_names}
    own = {"flagscale." + file.removesuffix(".py").replace("/", ".") for file in files} | {"flagscale.runner.launch"}
    for file in files:
        tree = ast.parse((Path(archive.__file__).parents[2] / file).read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {name for name in names if name.split(".")[0] not in allowed} <= own


def test_the_agent_uses_the_names_of_the_environment_module() -> None:
    assert (procs.TOKEN, procs.KEPT, watch.RANK_DIR) == (env.RUN_TOKEN, env.KEPT_TOKEN, env.RANK_DIR)


def test_equal_sources_give_equal_archives_that_run_without_this_package(tmp_path: Path) -> None:
    assert archive.build_archive() == archive.build_archive()
    path = tmp_path / "agent.pyz"
    path.write_bytes(archive.build_archive())
    done = subprocess.run([sys.executable, "-I", path, tmp_path / "missing.json"], capture_output=True, text=True)
    assert "missing.json" in done.stderr
    assert "ImportError" not in done.stderr


def test_an_archive_runs_from_its_bytecode_and_without_it_from_its_text(tmp_path: Path) -> None:
    path = tmp_path / "agent.pyz"
    path.write_bytes(archive.build_archive())
    source = f"import sys; sys.path.insert(0, {str(path)!r})\nfrom flagscale.runner.launch import agent"
    source += "\nprint(agent.__file__)"
    of_another_python = "import importlib._bootstrap_external as it\nit.MAGIC_NUMBER = b'none'\n"
    for prelude, file in (("", "agent.pyc"), (of_another_python, "agent.py")):
        done = subprocess.run([sys.executable, "-I", "-S", "-c", prelude + source], capture_output=True, text=True)
        assert done.stdout.strip().endswith(f"/runner/launch/{file}"), done.stderr


@pytest.mark.parametrize("num_ranks", [0, 2])
def test_a_process_is_settled_once_all_of_it_is_up(num_ranks: int) -> None:
    top = watch.Top(Entry("main", "/s.sh", num_ranks), 1, 0.0)
    assert not top.is_settled
    top.is_up = True
    assert top.is_settled is (num_ranks == 0)
    top.up.update(range(num_ranks))
    assert top.is_settled
