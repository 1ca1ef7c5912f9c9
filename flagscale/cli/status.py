"""`flagscale status`: how a run is doing, asked once, for people or as JSON."""

import argparse
import json
import sys
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from flagscale.runner.launch.folder import RunRef
    from flagscale.runner.monitor.state import RankState, RunState

SUMMARY = "say how a run is doing, host by host and rank by rank"
NUM_RANKS_SHOWN = 32


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="flagscale status", description=SUMMARY)
    parser.add_argument(
        "run", nargs="?", help="run id or its beginning, or an experiment folder (default: the newest run)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--ranks", action="store_true", help=f"list every rank, also where there are over {NUM_RANKS_SHOWN}"
    )
    args = parser.parse_args(argv)

    from flagscale.runner.monitor.runs import load_run
    from flagscale.runner.monitor.state import encode_state, query_run

    state = query_run(load_run(args.run))
    if args.json:
        print(json.dumps(encode_state(state), indent=1))
        return 0
    print_state(state, args.ranks)
    return 0


def format_time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds is not None else "-"


def format_took(state: "RunState") -> str:
    import time

    from flagscale.runner.monitor.progress import format_duration

    if state.started is None:
        return "-"
    end = state.ended or (state.started if state.has_ended else time.time())
    return format_duration(max(0.0, end - state.started)) if end != state.started else "-"


def format_iteration(state: "RunState") -> str:
    from flagscale.runner.monitor.progress import format_progress

    return format_progress([state.progress], None, is_live=not state.has_ended) if state.progress else "-"


def print_state(state: "RunState", all_ranks: bool) -> None:
    run = state.run
    rows = {
        "run": run.run_id,
        "state": state.state + (f", exit code {state.exit_code}" if state.exit_code is not None else ""),
        "why": state.reason,
        "stacks": state.stacks and state.stacks.removeprefix("Python stacks "),
        "started": f"{format_time(state.started)}, took {format_took(state)}" if state.started else None,
        "progress": format_iteration(state) if state.progress else None,
        "task": f"{run.task} ({run.exp_name})" if run.exp_name else run.task,
        "folder": str(run.exp_dir),
        "output": ", ".join(name_output(run, label) for label in run.labels[:4]),
    }
    for name, text in rows.items():
        if text:
            print(f"{name:<9} {text}")
    print_table(host_table(state))
    if not state.ranks:
        return
    counts = Counter(rank.state for rank in state.ranks)
    print(f"ranks     {', '.join(f'{count} {name}' for name, count in counts.items())}")
    shown = list(state.ranks) if all_ranks or len(state.ranks) <= NUM_RANKS_SHOWN else find_notable(state.ranks)
    if shown:
        print_table(rank_table(shown))


def name_output(run: "RunRef", label: str) -> str:
    remote = run.find_remote(label)
    away = "" if remote is None or remote.is_shared else f"{remote.name}:"
    return f"{away}{run.output_path(label)}"


def find_notable(ranks: "tuple[RankState, ...]") -> "list[RankState]":
    """Where there are many ranks: those that are not as most are."""
    usual = Counter(rank.state for rank in ranks).most_common(1)[0][0]
    return [rank for rank in ranks if rank.state != usual or rank.is_first_failure][:NUM_RANKS_SHOWN]


def host_table(state: "RunState") -> "Table":
    from rich.table import Table

    names = ("host", "state", "agent", "guard", "heartbeat", "exit code", "left over")
    machine = ("machine",) * (state.run.launcher != "direct")  # where a scheduler chose it, the label does not tell
    table = Table(*names, *machine, box=None, pad_edge=False)
    for host in state.hosts:
        beat = f"{host.heartbeat_age_s:.0f} s ago" if host.heartbeat_age_s is not None else "-"
        cells = (host.label, host.state, host.agent_pid, host.guard_pid, beat, host.exit_code, host.num_leftovers)
        more = (host.hostname,) * len(machine)
        table.add_row(*("-" if cell is None else str(cell) for cell in (*cells, *more)))
    return table


def rank_table(ranks: "list[RankState]") -> "Table":
    from rich.table import Table

    table = Table("rank", "host", "pid", "state", "exit code", "signal", "", box=None, pad_edge=False)
    for rank in ranks:
        cells = (rank.rank, rank.host, rank.pid, rank.state, rank.exit_code, rank.signal)
        table.add_row(*("-" if cell is None else str(cell) for cell in cells), "failed first" * rank.is_first_failure)
    return table


def print_table(table: "Table") -> None:
    """To a terminal in its width; elsewhere wide enough that nothing is cut."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(table)
