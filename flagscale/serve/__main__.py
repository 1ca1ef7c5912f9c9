"""`python -m flagscale.serve <job.json>`: a service's controller, started again whenever it is killed.

The first process does nothing but wait, so that nothing can go wrong with it. Replicas are started by the second, and
outlive it: the next one finds them. If the first is killed too, the run's agent ends all that is left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

CHILD = "--controller"
LONGEST_PAUSE_S = 30.0
STABLE_S = 60.0
MOST_DEATHS = 5
"""in a row; then the controller itself is at fault"""


def watch(job_path: str) -> int:
    """Keep a controller running until it ends by itself; returns its exit code."""
    child: subprocess.Popen[bytes] | None = None
    is_ending = False

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        nonlocal is_ending
        is_ending = True
        if child is not None and child.poll() is None:
            child.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, pass_on)
    deaths = 0
    while True:
        begun = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", "flagscale.serve", CHILD, job_path])
        code = child.wait()
        if code >= 0 or is_ending:
            return code if code >= 0 else 128 - code
        deaths = 1 if time.monotonic() - begun > STABLE_S else deaths + 1
        if deaths >= MOST_DEATHS:
            return 128 - code
        print(f"the controller died of {signal.Signals(-code).name}; it is started again", flush=True)
        time.sleep(min(LONGEST_PAUSE_S, 0.5 * 2**deaths))


def main(words: list[str]) -> int:
    if words[:1] != [CHILD]:
        return watch(words[0])
    from flagscale.errors import FlagScaleError
    from flagscale.serve.controller import run_controller

    code = 0
    try:
        run_controller(json.loads(Path(words[1]).read_text()))
    except FlagScaleError as error:
        print(f"error: {error}", flush=True)
        code = error.exit_code
    os._exit(code)  # threads that wait for a silent host must not keep a service from ending


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
