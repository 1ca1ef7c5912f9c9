"""A private Slurm for tests: its own munged, slurmctld and slurmd's, on ports of their own, in a folder of its own.

A module says `pytest_plugins = ("slurm_fixtures",)` and asks for `slurm`. Several slurmd's under different node names
make several nodes of one machine.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flagscale.runner.launch.ports import find_free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
START_LIMIT_S = 60.0
CONF = """
ClusterName=flagscaletest
SlurmctldHost={hostname}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket
SlurmctldPort={port}
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)" if absent else None


@dataclass(frozen=True, slots=True)
class Slurm:
    """A cluster. `env` is what its commands need."""

    base: Path
    daemons: dict[str, subprocess.Popen[bytes]]

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.base / "slurm.conf")}

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            with suppress(AssertionError):
                if is_so():
                    return
            logs = [f"{path.name}: {path.read_text()[-500:]}" for path in self.base.glob("*.out")]
            assert time.monotonic() < deadline, logs
            time.sleep(0.2)


@contextmanager
def slurm_up(base: Path, nodes: tuple[str, ...]) -> Iterator[Slurm]:
    """A cluster of these nodes, two processors each; all of its daemons are ended afterwards."""
    munge = base / "munge"
    munge.mkdir(mode=0o700, parents=True)
    (base / "state").mkdir()
    (munge / "key").write_bytes(os.urandom(256))
    (munge / "key").chmod(0o400)
    hostname = socket.gethostname().partition(".")[0]
    rows = [
        f"NodeName={name} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={find_free_port()} CPUs=2 State=UNKNOWN"
        for name in nodes
    ]
    text = CONF.format(base=base, hostname=hostname, port=find_free_port(), nodes="\n".join(rows))
    (base / "slurm.conf").write_text(text)
    slurm = Slurm(base, {})
    files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
    commands = {
        "munged": ["munged", "--foreground", "--force", f"--socket={munge}/socket", *files],
        "slurmctld": ["slurmctld", "-D", "-i"],
        **{name: ["slurmd", "-D", "-N", name] for name in nodes},
    }
    with ExitStack() as stack:
        for name, command in commands.items():
            slurm.daemons[name] = stack.enter_context(_daemon(command, slurm, name))
            slurm.wait_for((munge / "socket").exists)
        slurm.wait_for(lambda: slurm.ask("sinfo", "--noheader", "--format=%D %t").split() == [str(len(nodes)), "idle"])
        yield slurm
        for job in slurm.ask("squeue", "--noheader", "--format=%A").split():
            slurm.ask("scancel", job)
        slurm.wait_for(lambda: not slurm.ask("squeue", "--noheader").strip())


@contextmanager
def _daemon(command: list[str], slurm: Slurm, name: str) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, **slurm.env, "PATH": SBIN}
    with (slurm.base / f"{name}.out").open("wb") as log:
        program = shutil.which(command[0], path=SBIN) or command[0]
        process = subprocess.Popen([program, *command[1:]], env=env, stdout=log, stderr=log, cwd=slurm.base)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
