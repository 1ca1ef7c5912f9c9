"""`flagscale rerun`: the job of an earlier run again, exactly as it was planned, under a new run id."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

SUMMARY = "start the job of an earlier run again"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flagscale rerun",
        description="Start the plan of an earlier run again, in the same experiment folder: a training resumes from "
        "its last checkpoint. The configuration files are not read again.",
    )
    parser.add_argument(
        "run", nargs="?", help="run id or its beginning, or an experiment folder (default: the newest run)"
    )
    parser.add_argument("--foreground", action="store_true", help="stay attached and return the job's exit code")
    args = parser.parse_args(argv)

    from flagscale.runner.launch.folder import load_job, load_plan
    from flagscale.runner.launch.launcher import start_job
    from flagscale.runner.launch.provenance import query_git
    from flagscale.runner.monitor.follow import wait_job
    from flagscale.runner.monitor.runs import load_run

    old = load_run(args.run)
    job = load_job(old.exp_dir, old.run_id)
    plan = load_plan(old.exp_dir, old.run_id)
    note = describe_git_change(job.get("git"), query_git(Path.cwd()))
    if note:
        print(f"note: {note}", file=sys.stderr)
    print(f"starting the job of {old.run_id} again", file=sys.stderr)
    foreground = args.foreground or plan.foreground
    command = ["flagscale", "rerun", old.run_id]
    run = start_job(plan, config=job["config"], command=command, env=dict(os.environ), foreground=foreground)
    return wait_job(run) if foreground else 0


def describe_git_change(then: dict[str, Any] | None, now: dict[str, Any] | None) -> str | None:
    """How the checkout differs from the one that the run was started in; None where it does not, or nobody can tell."""
    if not then or not now:
        return None
    if then["commit"] != now["commit"]:
        return f"the run was started at commit {then['commit'][:12]}, this checkout is at {now['commit'][:12]}"
    if then.get("is_dirty") or now.get("is_dirty"):
        return f"this checkout has changes beyond commit {now['commit'][:12]}; the code may differ from the run's"
    return None
