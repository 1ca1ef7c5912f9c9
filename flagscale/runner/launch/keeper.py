"""What keeps a host's place with a scheduler for as long as the host's agent lives: standard library, in an archive.

A scheduler (Slurm, Ray) gives a place to one process and takes it back when that process ends. The agent cannot be that
process, since it leaves for a session of its own to outlive whoever started it. So the scheduler runs this one: it
starts the agent, waits for its end, and ends with the job's exit code. It has written down who it is, and the agent
ends the job once it is gone: a place that is taken back is left (`peers.py`).

    keeper.pyz <what keeps the place> <spec.json> [NAME=SOURCE ..]     NAME=SOURCE: secrets, and where they are found
    keeper.pyz --port                                                  a free port of this machine

Secrets come in this process's environment and go to the agent over its standard input; the agent's own has none.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from flagscale.runner.launch.journal import Spec, load_spec, write_small
from flagscale.runner.launch.network import interface_env
from flagscale.runner.launch.place import Keeper
from flagscale.runner.launch.ports import find_free_port
from flagscale.runner.launch.procs import KEPT, TOKEN, Proc, find_proc, is_same_alive, send_signal

MASTER_ADDR, SECOND_ADDR = "FLAGSCALE_MASTER_ADDR", "FLAGSCALE_SECOND_ADDR"
"""the names of `slurm_script.py`: the first machine that a scheduler chose, and the second"""
POLL_S = 0.5
PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def split_environment(env: Mapping[str, str], secrets: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(what the agent has in its environment, the values of secrets under their names in the job).

    Raises:
        KeyError: the source of a secret is not set.
    """
    pairs = [secret.partition("=")[::2] for secret in secrets]
    hidden = {TOKEN, *(name for pair in pairs for name in pair)}
    return {name: value for name, value in env.items() if name not in hidden}, {
        name: env[source] for name, source in pairs
    }


def find_event(spec: Spec, kind: str) -> dict[str, Any] | None:
    """The last event of a kind that the agent wrote."""
    with contextlib.suppress(OSError):
        for line in reversed(Path(spec.events).read_bytes().splitlines()):
            with contextlib.suppress(ValueError):
                row: dict[str, Any] = json.loads(line)
                if row.get("event") == kind:
                    return row
    return None


def find_watchers(spec: Spec) -> list[Proc]:
    """Agent and guard, dead or alive."""
    event = find_event(spec, "agent_started") or {}
    pairs = ((event.get("pid"), event.get("start_time")), (event.get("guard"), event.get("guard_start_time")))
    return [Proc(pid, 0, start_time, False) for pid, start_time in pairs if pid and start_time]


def keep_place(spec: Spec, parent: int) -> int:
    """Wait for the agent's end; returns the job's exit code. Leaves at once if whoever started us is gone."""
    watchers = find_watchers(spec)

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        for proc in watchers:
            send_signal(proc, signum)

    for signum in PASSED_ON:
        signal.signal(signum, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while any(is_same_alive(proc.pid, proc.start_time) for proc in watchers):
        if os.getppid() != parent:
            return 1
        time.sleep(POLL_S)
    ended = find_event(spec, "job_ended")
    code = ended.get("exit_code") if ended else None
    return code if isinstance(code, int) else 1


def main(argv: list[str]) -> int:
    if argv[1:] == ["--port"]:
        print(find_free_port() or "")
        return 0
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is an agent to pass them on to
    parent = os.getppid()
    what, spec_path, *secrets = argv[1:]
    spec = load_spec(Path(spec_path))
    me = find_proc(os.getpid())
    if me is not None:
        write_small(spec.keeper, json.dumps(asdict(Keeper(me.pid, me.start_time, what))))
    try:
        env, values = split_environment(os.environ, secrets)
    except KeyError as error:
        print(f"{spec.label}: the secret {error} is not set where {what} starts the job", file=sys.stderr)
        return 1
    peer = env.get(SECOND_ADDR if spec.node_rank == 0 else MASTER_ADDR, "")
    env = {**interface_env(spec.interface_vars, peer), **env, KEPT: spec.token}
    agent = Path(argv[0]).with_name("agent.pyz")
    line = json.dumps(values) + "\n"
    done = subprocess.run([sys.executable, "-I", str(agent), spec_path], input=line, env=env, text=True, cwd="/")
    sys.stdout.flush()
    return done.returncode or keep_place(spec, parent)
