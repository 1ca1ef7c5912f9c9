"""Small real jobs for the tests of launching: plans, and looking for what they leave behind."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.local import start_job, submit_job
from flagscale.runner.launch.procs import find_ours
from flagscale.runner.plan.job import AtLaunch, HostPlan, JobPlan, ProcessSpec

PATIENCE_S = 60.0
ANNOUNCE = """
import os, sys, time
from pathlib import Path
rank = os.environ["RANK"]
print(f"rank {rank} says hello", flush=True)
Path(os.environ["FLAGSCALE_RANK_DIR"], f"rank_{rank}.up").touch()
"""


def plan_program(exp_dir: Path, *argv: str | AtLaunch, **fields: Any) -> JobPlan:
    """A plan of one program without ranks. Fields of HostPlan and JobPlan go where they belong."""
    process = ProcessSpec("main", argv, str(exp_dir.parent), env=fields.pop("env", ()))
    return plan_processes(exp_dir, process, **fields)


def plan_processes(exp_dir: Path, *processes: ProcessSpec, **fields: Any) -> JobPlan:
    of_host = {
        name: fields.pop(name) for name in ("before_start", "after_stop", "files", "make_dirs") if name in fields
    }
    host = HostPlan(Host("localhost", 2), 0, processes, **of_host)
    return JobPlan("train", "megatron", "small", str(exp_dir), str(exp_dir / "logs"), (host,), **fields)


def plan_ranks(exp_dir: Path, code: str, num_ranks: int = 2, **fields: Any) -> JobPlan:
    """torchrun with ranks that announce themselves and then run `code`, which knows `rank`, os, sys, time and Path."""
    script = exp_dir.parent / "rank.py"
    script.write_text(ANNOUNCE + code)
    argv = (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)),
        *("--master-port", AtLaunch("master_port"), "--redirects", "3", "--tee", "3"),
        *("--log-dir", AtLaunch("run_id", f"{exp_dir}/logs/details/host_0_localhost/"), str(script)),
    )
    env = (("OMP_NUM_THREADS", "1"),)
    process = ProcessSpec(
        "torchrun", argv, str(exp_dir.parent), entrypoint="rank.py", num_ranks=num_ranks, announces=True, env=env
    )
    return plan_processes(exp_dir, process, **fields)


def start(plan: JobPlan, env: Mapping[str, str] | None = None, grace_s: float = 5.0) -> RunRef:
    return start_job(plan, config={"train": {}}, command=["test"], env=env or dict(os.environ), grace_s=grace_s)


def submit(plan: JobPlan, grace_s: float = 5.0) -> RunRef:
    return submit_job(plan, config={"train": {}}, command=["test"], env=dict(os.environ), grace_s=grace_s)


def token_of(run: RunRef) -> str:
    return run.load_spec(run.labels[0]).token


def list_left(run: RunRef) -> list[int]:
    """Living processes that bear the run's token."""
    return [proc.pid for proc in find_ours(token_of(run))]


def wait_for(what: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """The first true answer; a test that waits too long fails."""
    deadline = time.monotonic() + patience_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain"
        time.sleep(0.05)
    return found


def with_port(plan: JobPlan, port: int) -> JobPlan:
    return replace(plan, master_port=port)
