"""The `flagscale` command: one module a verb, imported when it is called.

This file is all that `flagscale --help` needs, so it imports nothing but `sys`.
"""

import sys

VERBS = {
    "train": ("run", "train a model of examples/, or of a YAML of your own"),
    "serve": ("serve", "put a model up as a service that answers OpenAI's API, and look after it"),
    "run": ("run", "run the job of a configuration, whatever its task"),
    "dryrun": ("dryrun", "show what a configuration would run on each host, and run nothing"),
    "check": ("check", "ask all hosts of a job whether it can run there, and start nothing"),
    "explain": ("explain", "say which file or override set a value"),
    "stop": ("stop", "stop a run and wait until nothing of it is left"),
    "status": ("status", "say how a run is doing, rank by rank"),
    "logs": ("logs", "print or follow what a run prints"),
    "list": ("list_runs", "list the runs of this user"),
    "rerun": ("rerun", "start the job of an earlier run again"),
    "source": ("source", "fetch a backend's pinned source, or say what state it is in"),
    "install": ("install", "get a backend for a chip: fetch, patch, install or put on the path of jobs"),
    "patch": ("patch", "apply a vendor's patches to a backend, make them, and say what is applied"),
    "devices": ("devices", "say what accelerators this machine has, and how that was found out"),
    "doctor": ("doctor", "say what this machine has, what is missing, and how to get it"),
    "completion": ("completion", "print the shell code that completes this command"),
}


def render_help() -> str:
    width = max(map(len, VERBS)) + 2
    rows = "\n".join(f"  {verb:<{width}}{summary}" for verb, (_, summary) in VERBS.items())
    return f"""usage: flagscale <verb> [arguments]

Train, fine-tune, serve and reinforce large models on any chips, from two YAML files.

verbs:
{rows}

  flagscale <verb> --help     what a verb takes
  flagscale --version         the version of this toolkit

first steps:
  flagscale doctor            is this machine ready?
  flagscale train tiny        train a small model on this machine
  flagscale status            how is the newest run doing?
"""


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 the work failed, 2 what was typed cannot be right."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(render_help(), end="")
        return 0
    if words[0] in ("-v", "--version"):
        from flagscale import __version__

        print(f"flagscale {__version__}")
        return 0
    from flagscale.cli.voice import guard

    return guard(lambda: _call(words[0], words[1:]))


def _call(verb: str, argv: list[str]) -> int:
    from importlib import import_module

    from flagscale.errors import UserError, find_nearest

    if verb not in VERBS:
        near = find_nearest(verb, VERBS)
        raise UserError(
            f"there is no verb `{verb}`" + (f"; did you mean `{near}`?" if near else "; see flagscale --help")
        )
    code: int = import_module(f"flagscale.cli.{VERBS[verb][0]}").main(argv)
    return code
