"""`flagscale serve`: put a model up as a service; `status`, `logs`, `stop`, `update`, `doctor` of one that is up."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import UserError

if TYPE_CHECKING:
    from flagscale.runner.config.compose import Composed

SUMMARY = "put a model up as a service that answers OpenAI's API, and look after it"
SERVICE_HELP = "run id or its beginning, or an experiment folder (default: the newest service)"
ENGINES = ("native", "vllm", "sglang", "llama_cpp")


def main(argv: list[str]) -> int:
    actions: dict[str, Callable[[list[str]], int]] = {
        "status": show_status,
        "logs": show_logs,
        "stop": stop,
        "update": update,
        "doctor": examine,
    }
    if argv and argv[0] in actions:
        return actions[argv[0]](argv[1:])
    return start(argv)


def _parser(action: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"flagscale serve {action}".rstrip(), description=text)
    if action:
        parser.add_argument("service", nargs="?", help=SERVICE_HELP)
    return parser


def _add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", metavar="PATH", help="the model to load: a folder, or a name of a hub")
    parser.add_argument("--engine", choices=ENGINES, help="what runs the model")
    parser.add_argument("--engine-args", metavar="JSON", help="arguments of the engine, as one JSON object")
    parser.add_argument("--replicas", type=int, metavar="N", help="how many replicas there are from the start")
    parser.add_argument("--bin-dir", metavar="DIR", help="folder of the engine's `vllm`, `python` or `llama-server`")


def start(argv: list[str]) -> int:
    from flagscale.cli.jobs import act

    parser = _parser("", "Put a model up and return once it has answered a request.")
    parser.epilog = "also: flagscale serve status|logs|stop|update|doctor --help"
    parser.add_argument("model", help="a folder of examples/, the path of an experiment YAML, or a folder with a model")
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="yaml|override",
        help="an experiment YAML in place of the model's own; `key=value` overrides",
    )
    _add_changes(parser)
    parser.add_argument("--port", type=int, help="where the service answers (default: 8000)")
    parser.add_argument("--host", help="the address that it listens on (default: 127.0.0.1)")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key that callers must show"
    )
    parser.add_argument("--foreground", action="store_true", help="stay attached; Ctrl-C ends the service")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and run nothing")
    args = parser.parse_intermixed_args(argv)
    composed = lay_over(_compose(args.model, args.rest, args.engine, args.model_path), args)
    action = "dryrun" if args.dry_run else "run"
    return act(composed, action, ["flagscale", *sys.argv[1:]])


def _compose(model: str, rest: list[str], engine: str | None, model_path: str | None) -> "Composed":
    """The configuration that was named, or one made for a folder with a model in it."""
    from flagscale.cli.jobs import NoExampleError, compose
    from flagscale.serve.recipes import HUB_ENGINES, compose_model, find_path_fault, is_model

    overrides = list(rest)
    if overrides and "=" not in overrides[0] and not overrides[0].startswith("~"):
        return compose(overrides.pop(0), "serve", overrides)
    try:
        return compose(model, "serve", overrides)
    except NoExampleError as error:
        if is_model(model_path or model, engine):
            return compose_model(model, engine, Path.cwd(), overrides)
        if fault := find_path_fault(model):
            raise UserError(fault) from None
        if is_model(model, HUB_ENGINES[0]):
            raise UserError(f"{error}; for the model {model} of a hub, name an engine: --engine vllm|sglang") from None
        raise


def lay_over(composed: "Composed", args: argparse.Namespace) -> "Composed":
    """The configuration with what the options say."""
    from copy import deepcopy

    from flagscale.serve.recipes import locate_model

    values: dict[str, Any] = deepcopy(composed.values)
    models = values.get("serve")
    experiment = values.get("experiment")
    if not isinstance(models, list) or not isinstance(experiment, dict):
        return composed
    runner = experiment.setdefault("runner", {})
    told = dict(runner.get("cli_args") or {})
    if args.model_path:
        told["model_path"] = locate_model(args.model_path)
    if getattr(args, "port", None) is not None:
        told["port"] = args.port
    if args.engine_args:
        told["engine_args"] = args.engine_args
    if told:
        runner["cli_args"] = told
    deploy = dict(experiment.pop("deploy", None) or {}) | dict(runner.get("deploy") or {})
    deploy |= {name: value for name in ("host", "api_key_env") if (value := getattr(args, name, None))}
    runner["deploy"] = deploy
    if args.bin_dir:
        runner["bin_dir"] = str(_bin_dir(args.bin_dir))
    if getattr(args, "foreground", False):
        runner["foreground"] = True
    for model in models:
        if isinstance(model, dict):
            model |= {"engine": args.engine} if args.engine else {}
            if args.replicas is not None:
                model["resources"] = {**(model.get("resources") or {}), "num_replicas": args.replicas}
    return replace(composed, values=values)


def _bin_dir(text: str) -> Path:
    """A folder of programs; of an interpreter or of an environment the folder that holds its programs."""
    path = Path(text).expanduser().absolute()
    if path.is_file():
        return path.parent
    return path / "bin" if (path / "bin").is_dir() else path


def show_status(argv: list[str]) -> int:
    parser = _parser("status", "Say how a service is, replica by replica.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args(argv)
    from flagscale.cli.service import find_service
    from flagscale.cli.service_views import print_status

    return print_status(find_service(args.service), args.json)


def show_logs(argv: list[str]) -> int:
    parser = _parser("logs", "Print what the controller and the replicas wrote.")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the service ends")
    parser.add_argument("-n", "--lines", type=int, metavar="N", help="only the last N lines of each that are there")
    parser.add_argument("--replica", metavar="NAME", help="only this replica (`tiny-0`); `controller`: only that")
    args = parser.parse_args(argv)
    from flagscale.cli.service import find_service
    from flagscale.cli.service_views import print_service_logs

    return print_service_logs(find_service(args.service), args.replica, args.lines, args.follow)


def stop(argv: list[str]) -> int:
    parser = _parser("stop", "End a service: requests in flight are finished first.")
    parser.add_argument("--force", action="store_true", help="kill at once, without waiting for requests")
    args = parser.parse_args(argv)
    from flagscale.cli.service import find_service
    from flagscale.serve.stopping import stop_service

    run = find_service(args.service)
    print(f"stopping {run.run_id} ({run.exp_dir})", file=sys.stderr, flush=True)
    was_alive = stop_service(run.exp_dir, args.force)
    print(f"{run.run_id}: stopped" if was_alive else f"{run.run_id}: had ended before; nothing to stop")
    return 0


def update(argv: list[str]) -> int:
    parser = _parser("update", "Put another version in place of a service's replicas, without losing a request.")
    parser.add_argument("overrides", nargs="*", metavar="yaml", help="an experiment YAML in place of the service's own")
    _add_changes(parser)
    args = parser.parse_intermixed_args(argv)
    from flagscale.cli.service import find_service
    from flagscale.cli.service_update import update_service

    run = find_service(args.service)
    return update_service(run, args.overrides, lambda composed: lay_over(composed, args))


def examine(argv: list[str]) -> int:
    parser = _parser("doctor", "Say what is wrong with a service, by the causes that are known.")
    args = parser.parse_args(argv)
    from flagscale.cli.service import find_service
    from flagscale.serve.diagnosis import diagnose

    findings = diagnose(find_service(args.service))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok   ' if finding.is_ok else 'FAULT'} {finding.name:<{width}}  {finding.text}")
        if finding.remedy:
            print(f"      {'':<{width}}  {finding.remedy}")
    return 0 if all(finding.is_ok for finding in findings) else 1
