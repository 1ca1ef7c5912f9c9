"""`flagscale list`: the runs of this user on this machine, newest first."""

import argparse
import json

SUMMARY = "list the runs of this user, newest first"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="flagscale list", description=SUMMARY)
    parser.add_argument("--json", action="store_true", help="a JSON array of what `flagscale status --json` prints")
    parser.add_argument("-n", "--num-runs", type=int, default=20, metavar="N", help="how many; 0 for all (default: 20)")
    parser.add_argument("--alive", action="store_true", help="only those that have not ended")
    args = parser.parse_args(argv)

    from rich.table import Table

    from flagscale.cli.status import format_iteration, format_time, format_took, print_table
    from flagscale.runner.monitor.runs import list_runs
    from flagscale.runner.monitor.state import encode_state, query_run

    runs = list_runs()
    if args.num_runs > 0 and not args.alive:
        runs = runs[: args.num_runs]
    states = [query_run(run) for run in runs]
    if args.alive:
        states = [state for state in states if not state.has_ended or state.num_leftovers]
    if args.json:
        print(json.dumps([encode_state(state) for state in states], indent=1))
        return 0
    if not states:
        print("no run is alive" if args.alive else "no runs yet; start one with `flagscale train tiny`")
        return 0
    table = Table("run", "state", "task", "name", "started", "took", "progress", "folder", box=None, pad_edge=False)
    for state in states:
        run = state.run
        times = (format_time(state.started), format_took(state))
        table.add_row(
            run.run_id, state.state, run.task, run.exp_name, *times, format_iteration(state), str(run.exp_dir)
        )
    print_table(table)
    return 0
