"""`flagscale dryrun`: everything that would run, and nothing run."""

import argparse
import json

from flagscale.cli.jobs import compose, plan


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flagscale dryrun", description="Show the environment, command line and script of every host."
    )
    parser.add_argument("config", help="a folder of examples/, or the path of an experiment YAML")
    parser.add_argument("overrides", nargs="*", help="`key=value`, `+new=value`, `~gone`")
    parser.add_argument("--task", default="train", help="which YAML of the example (default: train)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(argv)
    job = plan(compose(args.config, args.task, args.overrides))
    from flagscale.runner.launch.dry import describe_plan, render_dry_run

    if args.json:
        print(json.dumps(describe_plan(job.plan), indent=2, ensure_ascii=False))
    else:
        print(render_dry_run(job.plan), end="")
    return 0
