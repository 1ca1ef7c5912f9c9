"""What starts a job's processes on one host, watches them, and ends exactly what it started: standard library only.

Run from its archive (`archive.build_archive`, one file that any Python 3.11 runs) as `python -I agent.pyz <spec.json>`,
it reads one line of secrets (a JSON object) from standard input, leaves its terminal, prints one line of JSON once the
job's processes are started, and works on in the background as two processes:

    guard ── agent ── bash <script> ── torchrun ── ranks ...
      └── whatever the agent leaves behind, if it dies

Both are subreapers, so that a process which forks twice still comes back to them. If the agent dies, the guard ends
the job and says so; if the guard dies, the agent does. If both are killed at one stroke, the top processes get SIGTERM
from the kernel, and what still lives can be found by its token (`procs.end_leftovers`). What both do is `watch.Watch`.

SIGTERM asks for a stop: SIGTERM to all that is ours, SIGKILL after the grace; SIGUSR1 asks for it without the grace.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from flagscale.runner.launch import procs
from flagscale.runner.launch.journal import Spec, load_spec
from flagscale.runner.launch.watch import SIGNALS, Watch


def guard(spec: Spec, secrets: dict[str, str], ready: int) -> None:
    """Wait for the agent, pass on what is asked of it, and take its place if it dies."""
    procs.set_process_option(procs.PR_SET_CHILD_SUBREAPER, 1)
    name_process("flagscale-guard")
    guard_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        os._exit(run_agent(spec, secrets, ready, guard_pid))
    os.close(ready)
    while True:
        info = signal.sigtimedwait(SIGNALS, 5.0)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if info and info.si_signo in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, info.si_signo)  # its number cannot have passed on: we have not waited for it
    if status != 0:
        watch = Watch(spec, secrets, pid, None)
        result = procs.split_status(status)
        how = f"was killed by {result['signal']}" if result["signal"] else f"failed, see {spec.agent_log}"
        watch.end("lost", f"the agent (process {pid}) {how}; its guard ended the job")
        watch.run()


def run_agent(spec: Spec, secrets: dict[str, str], ready: int, guard_pid: int) -> int:
    try:
        procs.set_process_option(procs.PR_SET_CHILD_SUBREAPER, 1)
        procs.set_process_option(procs.PR_SET_PDEATHSIG, signal.SIGUSR2)
        name_process("flagscale-agent")
        watch = Watch(spec, secrets, os.getpid(), guard_pid)
        watch.start()
        with contextlib.suppress(OSError):  # who asked may have been killed meanwhile; the job runs on
            os.write(ready, json.dumps({"agent": os.getpid(), "guard": guard_pid}).encode() + b"\n")
        os.close(ready)
        watch.run()
    except Exception:  # whatever it was, the guard must learn of it by the exit code, and a person by the log
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def name_process(name: str) -> None:
    """What `ps -e` and `top` show; its command line is that of whoever started it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def leave_terminal(spec: Spec) -> None:
    """A session of our own, and no descriptor shared with whoever started us."""
    os.setsid()
    log = os.open(spec.agent_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir("/")


def start_agent(spec: Spec, secrets: dict[str, str]) -> dict[str, Any] | None:
    """Leave guard and agent behind; their numbers once the job's processes are started, None where they are not."""
    if spec.meet_port:
        import flagscale.runner.launch.wire  # noqa: F401 the guard may need it when its file is gone
    told, ready = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if os.fork() == 0:
        try:
            os.close(told)
            os.environ.pop(procs.TOKEN, None)  # that of an outer job, if this one is started from within it
            leave_terminal(spec)
            guard(spec, secrets, ready)
        except Exception:  # nobody is left to raise to
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(ready)
    with os.fdopen(told, "rb") as file:
        line = file.readline()
    numbers: dict[str, Any] | None = json.loads(line) if line else None
    return numbers


def describe_failed_start(spec: Spec) -> str:
    return f"the agent of {spec.label} did not start; see {spec.agent_log}"


def main(argv: list[str]) -> int:
    spec = load_spec(Path(argv[1]))
    numbers = start_agent(spec, json.loads(sys.stdin.readline() or "{}"))
    print(json.dumps(numbers) if numbers else describe_failed_start(spec), file=sys.stdout if numbers else sys.stderr)
    return 0 if numbers else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
