"""`python tools/testhosts up N | exec [--on hK] CMD .. | status | cut hK | join hK | kill hK | start hK | down`."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from testhosts.hosts import DEFAULT_PRIVATE, STATE_DIR, HostSet
from testhosts.machine import HostsError

VERBS_OF_A_HOST = {
    "cut": "pull a host's cable",
    "join": "put a host's cable back",
    "kill": "end all processes of a host at once",
    "start": "boot a host that was killed",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="testhosts", description="Make hosts with an sshd each on this one machine.")
    parser.add_argument("--name", default="default", help="of the set; several may be up side by side")
    parser.add_argument("--state-dir", type=Path, default=STATE_DIR, help=f"default {STATE_DIR}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    up = verbs.add_parser("up", help="make N hosts, h1 to hN")
    up.add_argument("num_hosts", type=int, metavar="N")
    up.add_argument("--no-shared-fs", action="store_true", help="each host has a /tmp of its own, empty at the start")
    up.add_argument("--private", type=Path, action="append", default=[], metavar="DIR", help="this folder, not /tmp")
    execute = verbs.add_parser("exec", help="run a command where launchers run, or on a host")
    execute.add_argument("--on", metavar="hK")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    verbs.add_parser("status", help="say how the hosts are").add_argument("--json", action="store_true")
    for verb, summary in VERBS_OF_A_HOST.items():
        verbs.add_parser(verb, help=summary).add_argument("host", metavar="hK")
    verbs.add_parser("down", help="take all of it down; nothing to do is no failure")
    return parser


def show_status(hosts: HostSet, as_json: bool) -> None:
    rows = hosts.status()
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        state = ("up" if row.is_up else "dead") + ("" if row.is_linked else ", cut")
        print(f"{row.name:<5} {row.address:<13} {state:<10} {row.num_processes} processes")


def act(args: argparse.Namespace) -> None:
    hosts = HostSet(args.name, args.state_dir)
    match args.verb:
        case "up":
            private = tuple(args.private) or (DEFAULT_PRIVATE if args.no_shared_fs else ())
            layout = hosts.up(args.num_hosts, private)
            print(f"{layout.hosts[0].name} to {layout.hosts[-1].name} are up on 10.77.{layout.network}.0/24")
        case "exec":
            words = args.command[1:] if args.command[:1] == ["--"] else args.command
            if not words:
                raise HostsError("exec: there is no command")
            command = hosts.command(words, args.on)
            sys.stdout.flush()
            os.execv(command[0], command)
        case "status":
            show_status(hosts, args.json)
        case "down":
            print("taken down" if hosts.down() else "there was nothing to take down")
        case verb:
            getattr(hosts, verb)(args.host)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one message for what cannot be done; that of the command for `exec`."""
    args = make_parser().parse_args(argv)
    try:
        act(args)
    except HostsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
