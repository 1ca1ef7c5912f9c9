"""`flagscale train` and `flagscale run`: start the job of a configuration."""

import argparse
import sys

from flagscale.cli.jobs import act, compose


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flagscale train",
        description="Start the job of a configuration and return once all its ranks are up.",
        epilog="flagscale train tiny train.system.tensor_model_parallel_size=1",
    )
    parser.add_argument("model", help="a folder of examples/, or the path of an experiment YAML")
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="yaml|override",
        help="an experiment YAML in place of the model's own; `key=value` overrides",
    )
    parser.add_argument("--task", default="train", help="which YAML of the example: train, serve, .. (default: train)")
    parser.add_argument("--foreground", action="store_true", help="stay attached and return the job's exit code")
    args = parser.parse_intermixed_args(argv)
    config, overrides = args.model, list(args.rest)
    if overrides and "=" not in overrides[0] and not overrides[0].startswith("~"):
        config = overrides.pop(0)
    composed = compose(config, args.task, overrides)
    is_named = any(word.partition("=")[0] == "action" for word in overrides)
    action = "test" if args.foreground else None if is_named else "run"
    return act(composed, action, ["flagscale", *sys.argv[1:]])
