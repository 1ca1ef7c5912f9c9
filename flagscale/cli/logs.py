"""`flagscale logs`: what a run printed, or goes on printing."""

import argparse
import sys

SUMMARY = "print or follow what a run prints"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="flagscale logs", description=SUMMARY)
    parser.add_argument(
        "run", nargs="?", help="run id or its beginning, or an experiment folder (default: the newest run)"
    )
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the run ends, and show what a person wants to see"
    )
    parser.add_argument("--all", action="store_true", help="with -f: every line as it was written")
    parser.add_argument("-n", "--lines", type=int, metavar="N", help="only the last N lines of what is there")
    parser.add_argument("--host", metavar="NAME", help="only this host of several, by its name in the hostfile")
    parser.add_argument("--rank", type=int, help="only this rank, from torchrun's own files")
    args = parser.parse_args(argv)
    if args.lines is not None and args.lines < 0:
        parser.error(f"--lines {args.lines}: expected 0 or more")
    if args.host is not None and args.rank is not None:
        parser.error("--host and --rank: expected one of them, a rank is on one host")

    from flagscale.runner.monitor.follow import watch_job
    from flagscale.runner.monitor.logs import print_logs
    from flagscale.runner.monitor.runs import load_run

    def write(text: str) -> None:
        sys.stdout.write(text)
        if args.follow:
            sys.stdout.flush()

    run = load_run(args.run)
    if args.follow and args.rank is None and not args.all:
        watch_job(run, args.lines, args.host)
    else:
        print_logs(run, write, host=args.host, rank=args.rank, num_lines=args.lines, follow=args.follow)
    return 0
