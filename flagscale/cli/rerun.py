"""`flagscale rerun`: the job of an earlier run again, exactly as it was planned, under a new run id."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagscale.errors import UserError

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
    parser.add_argument(
        "--allow-changed", action="store_true", help="run although a backend's patches or files are not as they were"
    )
    args = parser.parse_args(argv)

    from flagscale.runner.launch.folder import load_job, load_plan
    from flagscale.runner.launch.launcher import start_job
    from flagscale.runner.launch.provenance import query_git
    from flagscale.runner.launch.sources import compare_trees, query_trees
    from flagscale.runner.monitor.follow import wait_job
    from flagscale.runner.monitor.runs import load_run

    old = load_run(args.run)
    job = load_job(old.exp_dir, old.run_id)
    plan = load_plan(old.exp_dir, old.run_id)
    check_trees_unchanged(compare_trees(job.get("trees", []), query_trees(plan)), args.allow_changed)
    note = describe_git_change(job.get("git"), query_git(Path.cwd()))
    if note:
        print(f"note: {note}", file=sys.stderr)
    print(f"starting the job of {old.run_id} again", file=sys.stderr)
    foreground = args.foreground or plan.foreground
    command = ["flagscale", "rerun", old.run_id]
    run = start_job(plan, config=job["config"], command=command, env=dict(os.environ), foreground=foreground)
    return wait_job(run) if foreground else 0


def check_trees_unchanged(changes: Sequence[str], allowed: bool) -> None:
    """Say how the backends' sources differ from those that the run was started with.

    Raises:
        UserError: they do, and that was not allowed.
    """
    if not changes:
        return
    told = "\n".join(f"  {change}" for change in changes)
    if not allowed:
        raise UserError(
            f"the job would run on other sources than it did:\n{told}\n"
            "put them back (`flagscale patch status` says how they differ), or run it so with --allow-changed"
        )
    print(f"note: other sources than the run had:\n{told}", file=sys.stderr)


def describe_git_change(then: dict[str, Any] | None, now: dict[str, Any] | None) -> str | None:
    """How the checkout differs from the one that the run was started in; None where it does not, or nobody can tell."""
    if not then or not now:
        return None
    if then["commit"] != now["commit"]:
        return f"the run was started at commit {then['commit'][:12]}, this checkout is at {now['commit'][:12]}"
    if then.get("is_dirty") or now.get("is_dirty"):
        return f"this checkout has changes beyond commit {now['commit'][:12]}; the code may differ from the run's"
    return None
