"""`flagscale stop`: end a run, and wait until nothing of it is left."""

import argparse
import sys

SUMMARY = "end a run and wait until nothing of it is left"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="flagscale stop", description=SUMMARY)
    parser.add_argument(
        "run", nargs="?", help="run id or its beginning, or an experiment folder (default: the newest run)"
    )
    parser.add_argument("--force", action="store_true", help="kill at once, without time to save")
    args = parser.parse_args(argv)

    from flagscale.runner.monitor.runs import load_run
    from flagscale.runner.monitor.stop import stop_run

    run = load_run(args.run)
    if run.task == "serve":
        from flagscale.cli.serve import stop as stop_service

        return stop_service([str(run.exp_dir), *(["--force"] if args.force else [])])
    print(f"stopping {run.run_id} ({run.exp_dir})", file=sys.stderr, flush=True)
    stopped = stop_run(run, args.force)
    state = stopped.state.state
    if stopped.was_alive:
        print(f"{run.run_id}: {state}")
    elif stopped.num_leftovers:
        print(f"{run.run_id}: {state} before; ended {stopped.num_leftovers} processes that it had left behind")
    else:
        print(f"{run.run_id}: {state} before; nothing to stop")
    return 0
