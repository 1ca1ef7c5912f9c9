"""What Slurm says of a run's job: asked anew each time, and what it said last where it has forgotten.

Slurm forgets a job some minutes after its end unless accounting is set up. So the job's script writes down Slurm's own
words as its last act, and `scontrol`, `sacct` and that file are asked in this order. A cluster that does not answer is
`unknown` and never an end.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flagscale.errors import RunError
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.journal import write_small
from flagscale.runner.launch.slurm_script import LAST_WORD, job_name

ASK_LIMIT_S = 20.0
JOB_FILE = "slurm.job"
"""holds the number of the job, which sbatch told"""

Phase = Literal["pending", "running", "ended", "unknown", "forgotten"]
PHASES: Mapping[str, Phase] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"), "pending"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"), "running"),
    **dict.fromkeys(("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"), "ended"),
    **dict.fromkeys(("BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"), "ended"),
}
_CAUSES = {"TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL", "Preempted": "PREEMPTED", "DeadLine": "DEADLINE"}
"""reasons that a job's last words bear while it is still completing -> the state that it will have"""
_PAIR = re.compile(r"(\w+)=(\S*)")


@dataclass(frozen=True, slots=True)
class Queue:
    """A job in Slurm's eyes. state, reason: Slurm's own words; detail: why nothing is known."""

    job_id: str
    phase: Phase
    state: str = ""
    reason: str = ""
    detail: str = ""

    def __str__(self) -> str:
        if not self.state:
            return f"Slurm job {self.job_id}: {self.detail}"
        return f"Slurm job {self.job_id} is {self.state}" + (f" ({self.reason})" if self.reason else "")


def call_slurm(
    argv: Sequence[str], env: Mapping[str, str] | None = None, text: str | None = None
) -> tuple[str | None, str]:
    """(output, what went wrong): output is None where the command is missing, takes too long or fails."""
    try:
        done = subprocess.run(
            [*argv],
            env=dict(env or os.environ),
            input=text or "",
            capture_output=True,
            text=True,
            timeout=ASK_LIMIT_S,
            check=False,
        )
    except FileNotFoundError:
        return None, f"`{argv[0]}` is not on the PATH; expected a machine that belongs to the Slurm cluster"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"`{argv[0]}` does not answer: {error}"
    told = done.stderr.strip()
    return (done.stdout, told) if done.returncode == 0 else (None, told or f"`{argv[0]}` failed: {done.returncode}")


def find_job(run: RunRef) -> str | None:
    """The number of a run's job; by the job's name where the launcher was killed before it could write the number."""
    try:
        return (run.folder / JOB_FILE).read_text().strip() or None
    except OSError:
        pass
    listed, _ = call_slurm(["squeue", "--noheader", "--format=%A", f"--name={job_name(run.run_id)}"])
    found = (listed or "").split()
    if found:
        write_small(str(run.folder / JOB_FILE), f"{found[0]}\n")
    return found[0] if found else None


def find_queue(run: RunRef) -> Queue | None:
    """What Slurm says of the run's job; None where the run was not started by Slurm, or was never submitted."""
    if run.launcher != "slurm":
        return None
    job_id = find_job(run)
    if job_id is None:
        return None
    shown, fault = call_slurm(["scontrol", "show", "job", "-o", job_id])
    if shown is not None and (queue := _read_job(job_id, shown)):
        return queue
    last = _read_last_word(run, job_id)
    if shown is None and "Invalid job id" not in fault:
        return last or Queue(job_id, "unknown", detail=f"Slurm cannot be asked: {fault}")
    return _ask_accounting(job_id) or last or Queue(job_id, "forgotten", detail="Slurm does not know it any more")


def _read_job(job_id: str, line: str) -> Queue | None:
    fields: dict[str, Any] = dict(_PAIR.findall(line))
    state, reason = fields.get("JobState", ""), fields.get("Reason", "")
    if state not in PHASES:
        return None
    return Queue(job_id, PHASES[state], state, "" if reason in ("None", state) else reason)


def _read_last_word(run: RunRef, job_id: str) -> Queue | None:
    """What the job's script wrote as it ended: still RUNNING or COMPLETING then, but with the reason."""
    try:
        queue = _read_job(job_id, Path(run.folder, LAST_WORD).read_text())
    except OSError:
        return None
    if queue is None:
        return None
    return Queue(job_id, "ended", _CAUSES.get(queue.reason, ""), queue.reason, "has ended")


def _ask_accounting(job_id: str) -> Queue | None:
    listed, _ = call_slurm(
        ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job_id}"]
    )
    words = (listed or "").split()
    return Queue(job_id, PHASES[words[0]], words[0]) if words and words[0] in PHASES else None


def cancel_job(run: RunRef) -> None:
    """scancel of the job that this run submitted, by its number; one that has ended stays as it is.

    Raises:
        RunError: Slurm refuses, or does not answer.
    """
    queue = find_queue(run)
    if queue is None or queue.phase in ("ended", "forgotten"):
        return
    done, fault = call_slurm(["scancel", queue.job_id])
    if done is None and "Invalid job id" not in fault:
        raise RunError(f"run {run.run_id}: {queue} and cannot be cancelled: {fault}")
