"""Jobs over test hosts: a folder they share, a configuration, and the command as a user types it."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factories import ROOT
from hosts import HostSet

from flagscale.runner.launch.folder import RunRef
from flagscale.runner.monitor.runs import load_run

PATIENCE_S = 90.0
ENTRY = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
rank = os.environ["RANK"]
here = Path(__file__).parent
if rank in os.environ.get("FAIL_AT_START", "").split(","):
    sys.exit("out of luck")
if rank in os.environ.get("FILL_DISK", "").split(","):
    with open(os.environ["FILL_AT"], "wb") as file:
        while file.write(bytes(1 << 20)):
            pass
dist.init_process_group("gloo")
import torch
total = torch.ones(1)
dist.all_reduce(total)
print(f"rank {rank} of {int(total)} on {os.uname().nodename}", flush=True)
secret = len(os.environ.get("TOKEN", ""))
print("quoted:", os.environ.get("QUOTED"), "of host:", os.environ.get("OF_HOST"), "secret:", secret, flush=True)
is_over = torch.zeros(1)
while not is_over:  # all ranks leave in the same round
    time.sleep(0.2)
    is_over = torch.tensor([float((here / "go").exists())])
    dist.all_reduce(is_over)
dist.destroy_process_group()  # gloo aborts a rank whose peer leaves before it has closed its connections
print(f"rank {rank} is done", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """A set of hosts, and a folder of experiments that all of them see."""

    hosts: HostSet
    base: Path

    @property
    def exp_dir(self) -> Path:
        return self.base / "exp"

    def write(self, num_hosts: int = 2, slots: int = 1, hostfile: str | None = None, **runner: Any) -> None:
        """The configuration of a torchrun job, one line of the hostfile a host."""
        listed = "".join(f"h{number} slots={slots}\n" for number in range(1, num_hosts + 1))
        (self.base / "hostfile").write_text(listed if hostfile is None else hostfile)
        (self.base / "rank.py").write_text(ENTRY)
        config = {
            "defaults": ["_self_", {"train": "small"}],
            "experiment": {
                "exp_name": "small",
                "exp_dir": str(self.exp_dir),
                "task": {"type": "train", "backend": "pi0", "entrypoint": str(self.base / "rank.py")},
                "runner": {
                    "hostfile": str(self.base / "hostfile"),
                    "start_timeout_s": 90,
                    **runner,
                },
                "envs": {
                    "OMP_NUM_THREADS": "1",
                    "QUOTED": "a 'b' \"c\" $HOME `d` \\e",
                },
                "node_specific": {"h2": {"OF_HOST": "two"}},
                "secrets": ["TOKEN"],
            },
            "action": "run",
            "hydra": {"run": {"dir": "${experiment.exp_dir}/hydra"}},
        }
        conf = self.base / "conf"
        (conf / "train").mkdir(parents=True, exist_ok=True)
        (conf / "config.yaml").write_text(json.dumps(config))
        (conf / "train" / "small.yaml").write_text(json.dumps({"system": {}, "model": {}, "data": {}}))

    def popen(self, *words: str) -> subprocess.Popen[str]:
        env = ["env", f"FLAGSCALE_STATE_DIR={self.base / 'state'}", f"PYTHONPATH={ROOT}", "TOKEN=hidden-value"]
        command = [*env, sys.executable, "-c", "import sys; from flagscale.cli import main; sys.exit(main())", *words]
        return subprocess.Popen(
            self.hosts.command(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.base
        )

    def call(self, *words: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """A verb of the command in a process of its own, in the control namespace."""
        with self.popen(*words) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            finally:
                process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def launch(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.call("run", str(self.base / "conf" / "config.yaml"), *overrides)

    def status(self) -> dict[str, Any]:
        done = self.call("status", str(self.exp_dir), "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @property
    def run(self) -> RunRef:
        return load_run(self.exp_dir)

    def list_left(self) -> list[str]:
        """Command lines of living processes of the run, of all hosts: this process sees them all."""
        run = self.run
        needles = {f"FLAGSCALE_RUN_TOKEN={run.load_spec(label).token}".encode() for label in run.labels}
        found: list[str] = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = set((folder / "environ").read_bytes().split(b"\0"))
                if words & needles and int(folder.name) != os.getpid():
                    found.append(f"{folder.name} " + (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


def wait_for(is_so: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain"
        time.sleep(0.2)


def pid_of(bench: Bench, rank: int) -> int:
    """The process of a rank as this test sees it, from within no namespace of a host."""
    needles = {f"FLAGSCALE_RUN_TOKEN={bench.run.load_spec(label).token}".encode() for label in bench.run.labels}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = set((folder / "environ").read_bytes().split(b"\0"))
            if words & needles and f"RANK={rank}".encode() in words:
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@contextlib.contextmanager
def watch_bystander(bench: Bench, host: str = "h1") -> Iterator[None]:
    """A process of somebody else that looks like the job's, and bears a token: it has to live on."""
    words = ["bash", "-c", f"FLAGSCALE_RUN_TOKEN=another exec -a 'python -m torchrun {bench.base}/rank.py' sleep 1000"]
    with subprocess.Popen(bench.hosts.command(words, host)) as process:
        try:
            yield
            assert process.poll() is None, "somebody else's process was ended"
        finally:
            process.kill()


def is_empty(folder: Path) -> bool:
    return not folder.exists() or not [
        path for path in folder.rglob("*") if path.is_file() and "hydra" not in str(path)
    ]
