"""The shell's look into /proc says what Python's does, and ends who is meant and nobody else."""

import json
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from flagscale.runner.launch.procs import Proc, find_proc, is_same_alive, name_machine
from flagscale.runner.launch.pulse import render_pulse


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def proc_of(process: "subprocess.Popen[bytes]") -> Proc:
    proc = find_proc(process.pid)
    assert proc is not None
    return proc


def feel(pids: list[tuple[int, int]], signum: int | None = None, machine: str | None = None) -> dict[str, Any]:
    watchers = {"machine": machine or name_machine(), "pids": pids}
    done = subprocess.run(render_pulse(watchers, signum), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_process_that_lives_is_found_beside_one_that_does_not(sleeper: "subprocess.Popen[bytes]") -> None:
    meant = (sleeper.pid, proc_of(sleeper).start_time)
    assert feel([meant]) == {"is_watched": True}
    assert feel([(2**22 + 1, 5), meant]) == {"is_watched": True}
    assert feel([meant, (2**22 + 1, 5)]) == {"is_watched": True}
    assert feel([]) == {"is_watched": False}


def test_another_start_time_or_machine_is_another_process(sleeper: "subprocess.Popen[bytes]") -> None:
    pid, start_time = sleeper.pid, proc_of(sleeper).start_time
    assert feel([(pid, start_time + 1)], signal.SIGKILL) == {"is_watched": False}
    assert feel([(pid, start_time)], signal.SIGKILL, machine="another start") == {}
    assert is_same_alive(pid, start_time)


@pytest.mark.parametrize("name", ["plain", "with space", "a) R 1 (b", "new\nline"])
def test_the_name_of_a_process_does_not_matter(name: str) -> None:
    code = f"import ctypes, time; ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)"
    code += "; print(1, flush=True); time.sleep(99)"
    with subprocess.Popen(["python3", "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            proc = proc_of(process)
            assert feel([(proc.pid, proc.start_time)]) == {"is_watched": True}
        finally:
            process.kill()


def test_all_that_are_meant_get_the_signal(sleeper: "subprocess.Popen[bytes]") -> None:
    with subprocess.Popen(["sleep", "1000"]) as other:
        pids = [(process.pid, proc_of(process).start_time) for process in (sleeper, other)]
        assert feel(pids, signal.SIGUSR1) == {"is_watched": True}
        assert (sleeper.wait(), other.wait()) == (-signal.SIGUSR1, -signal.SIGUSR1)


def test_a_zombie_does_not_live() -> None:
    with subprocess.Popen(["true"]) as process:
        while (proc := find_proc(process.pid)) and not proc.is_zombie:
            pass
        assert proc is not None
        assert feel([(proc.pid, proc.start_time)]) == {"is_watched": False}
