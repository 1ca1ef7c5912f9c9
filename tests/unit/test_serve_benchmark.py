"""The serving benchmark measures what it says, and a broken promise is told by the exit code."""

import subprocess
import sys

import pytest
from factories import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import serve


def a_round(tokens_per_s: float, *first_token_s: float) -> serve.Round:
    return serve.Round(tokens_per_s, list(first_token_s), 0.5, 1.0, 1000)


def test_kept_and_broken_promises(capsys: pytest.CaptureFixture[str]) -> None:
    straight = [a_round(1000, 0.2, 0.2), a_round(2000, 0.2, 0.2)]
    assert serve.compare(straight, [a_round(980, 0.202, 0.202), a_round(1990, 0.202, 0.201)])
    assert not serve.compare(straight, [a_round(900, 0.2, 0.2), a_round(1500, 0.2, 0.2)])
    assert not serve.compare(straight, [a_round(1000, 0.21, 0.21), a_round(2000, 0.21, 0.21)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "throughput   0.988 of straight (1485 tokens/s); promised at least 0.95: kept"
    assert lines[1] == "first token  +2.00 ms (200.0 -> 202.0 ms); promised at most 3 ms: kept"
    assert lines[2] == "router       50% of one processor, 500 µs a token"
    assert [line.rpartition(" ")[2] for line in lines if "promised" in line] == [
        "kept", "kept", "BROKEN", "kept", "kept", "BROKEN",
    ]  # fmt: skip


def test_it_runs() -> None:
    words = ["--streams", "2", "--rounds", "1", "--tokens", "4", "--tokens-per-s", "1000"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serve.py"), *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr
    assert len(done.stdout.splitlines()) == 3
