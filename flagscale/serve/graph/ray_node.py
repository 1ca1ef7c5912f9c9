"""A node of Ray as a child process: `python -m flagscale.serve.graph.ray_node ray start ..` on hosts beside the first.

Ray gives its own processes 30 s to come up, which a busy machine may not, and a node may be early at a head that is
tried again. So a node that ends while it comes up is started anew, after what it left has been ended.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from flagscale.env import RAY_NODE, RUN_TOKEN
from flagscale.errors import LaunchError
from flagscale.runner.launch.procs import find_ours, read_environ, send_signal, signal_name

NUM_STARTS = 3
UP_AFTER_S = 120.0
"""A node that has lived for so long has come up."""


def start_node(words: Sequence[str]) -> "subprocess.Popen[bytes]":
    """
    Raises:
        LaunchError: there is no such program.
    """
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {RAY_NODE: "1"}
    try:
        return subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise LaunchError(f"`{words[0]}` cannot be started: {error.strerror}") from None


def end_leftovers() -> None:
    """End what a node that failed has left of itself: its processes outlive it, and hold its ports."""
    token = os.environ.get(RUN_TOKEN, "")
    while left := [proc for proc in find_ours(token) if RAY_NODE in read_environ(proc.pid)]:
        for proc in left:
            send_signal(proc, signal.SIGKILL)
        time.sleep(0.05)


def describe_end(code: int) -> str:
    return f"died of {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"


def main(words: Sequence[str]) -> int:
    """Be a node until it is told to end, or ends itself; returns its exit code."""
    child: subprocess.Popen[bytes] | None = None
    is_ending = False

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        nonlocal is_ending
        is_ending = True
        if child is not None and child.poll() is None:
            child.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, pass_on)
    for attempt in range(1, NUM_STARTS + 1):
        begun = time.monotonic()
        child = start_node(words)
        code = child.wait()
        if is_ending or time.monotonic() - begun > UP_AFTER_S or attempt == NUM_STARTS:
            break
        end_leftovers()
        print(f"the node of Ray {describe_end(code)}; it is started again", flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LaunchError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_code)
