"""`flagscale check`: what would go wrong on which host, before anything is started."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from flagscale.cli.jobs import compose, plan

if TYPE_CHECKING:
    from rich.text import Text

    from flagscale.runner.launch.preflight import Finding

WIDE = 200
"""columns where the output is no terminal"""


def exit_code_of(findings: "Sequence[Finding]") -> int:
    """0: nothing is wrong; 2: only what was written is; 1: something of a host."""
    kinds = {finding.kind for finding in findings}
    return 1 if "launch" in kinds else 2 if "user" in kinds else 0


def print_table(findings: "Sequence[Finding]") -> None:
    """A row a host and a column a check, and below what is wrong."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flagscale.runner.launch.preflight import CHECKS

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("host", *CHECKS):
        table.add_column(title, overflow="fold")
    told = [finding for finding in findings if finding.kind != "ok"]
    cells = {(finding.host, finding.check): _render_cell(finding) for finding in sorted(findings, key=_gravity)}
    for host in dict.fromkeys(finding.host for finding in findings):
        table.add_row(Text(host, style="bold"), *(cells.get((host, check), Text()) for check in CHECKS))
    console.print(table)
    for finding in told:
        console.print(Text(f"{finding.host}: {'note: ' if finding.kind == 'note' else ''}{finding.text}"))


def _gravity(finding: "Finding") -> int:
    return ("ok", "note", "user", "launch").index(finding.kind)


def _render_cell(finding: "Finding") -> "Text":
    from rich.text import Text

    words = {"ok": (finding.text, ""), "note": ("note", "yellow")}
    text, style = words.get(finding.kind, ("fault", "red"))
    return Text(text, style=style)


def main(argv: list[str]) -> int:
    from flagscale.runner.config.experiment import TASK_TYPES
    from flagscale.runner.launch.preflight import survey_hosts

    parser = argparse.ArgumentParser(
        prog="flagscale check",
        description="Ask all hosts of a job whether it can run there, and start nothing. "
        "The exit code is 0 if it can, 2 if the configuration must be changed, 1 if a host must.",
        epilog="flagscale check train tiny experiment.runner.hostfile=hostfile",
    )
    parser.add_argument(
        "model", help="a folder of examples/, or the path of an experiment YAML; a task may stand before"
    )
    parser.add_argument("rest", nargs="*", metavar="yaml|override", help="as of `flagscale run`")
    parser.add_argument("--task", choices=TASK_TYPES, help="which YAML of the example (default: train)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(argv)
    words, task = [args.model, *args.rest], args.task or "train"
    if words[0] in ("run", *TASK_TYPES) and len(words) > 1 and _is_name(words[1]):
        task = words.pop(0).replace("run", task)
    config = words.pop(0)
    if words and _is_name(words[0]):
        config = words.pop(0)
    findings = survey_hosts(plan(compose(config, task, words)).plan, os.environ)
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2, ensure_ascii=False))
    else:
        print_table(findings)
    return exit_code_of(findings)


def _is_name(word: str) -> bool:
    """A model or a file, and no override."""
    return "=" not in word and not word.startswith("~")
