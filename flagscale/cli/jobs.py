"""From a configuration to an action: what `run.py` and the verbs of the command share."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale import env
from flagscale.cli.voice import warn
from flagscale.errors import UserError, find_nearest

if TYPE_CHECKING:
    from flagscale.runner.config.compose import Composed
    from flagscale.runner.config.load import Config
    from flagscale.runner.plan.job import JobPlan
    from flagscale.runner.plan.site import Site


def this_site() -> "Site":
    """This installation: its root, its interpreter, its fetched sources and the trees for chips beside them.

    verl is used from its source where that was fetched, else it is expected to be installed.
    """
    from flagscale.runner.plan.site import FOLDERS, Site

    folders = {
        backend: folder
        for backend, folder in FOLDERS.items()
        if backend == "megatron" or env.source_dir(folder).is_dir()
    }
    sources = {backend: str(env.source_dir(folder)) for backend, folder in folders.items()}
    trees = {
        backend: {chip: str(env.source_dir(folder, chip)) for chip in list_patched_chips(folder)}
        for backend, folder in folders.items()
    }
    return Site(str(env.root_dir()), str(Path(sys.executable).parent), sources, trees)


def list_patched_chips(folder: str) -> tuple[str, ...]:
    """The chips that a backend is patched for: all of them where there is a set for every chip."""
    from flagscale.chips import CHIPS

    found = {path.parent.parent.name for path in (env.root_dir() / "hardware").glob(f"*/{folder}/series.yaml")}
    return tuple(chip.name for chip in CHIPS if chip.name in found or "Common" in found)


class NoExampleError(UserError):
    """A name that is neither an example nor a YAML."""


def find_config(name: str, task: str) -> Path:
    """A YAML by its path, or `examples/<name>/conf/<task>.yaml`.

    Raises:
        NoExampleError: there is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    examples = env.root_dir() / "examples"
    example = examples / name / "conf" / f"{task}.yaml"
    if example.is_file():
        return example
    models = sorted(folder.name for folder in examples.glob("*") if (folder / "conf" / f"{task}.yaml").is_file())
    near = find_nearest(name, models)
    hint = f"did you mean `{near}`?" if near else f"there are: {', '.join(models)}; or give the path of a YAML"
    raise NoExampleError(f"there is no example `{name}` with a {task}.yaml; {hint}")


def load(composed: "Composed") -> "Config":
    """The checked configuration; what is only worth a warning is said on stderr."""
    from flagscale.runner.config.load import load_config

    config = load_config(composed, Path.cwd())
    for fault in config.warnings:
        warn(str(fault))
    return config


def compose(config: str, task: str, overrides: Sequence[str]) -> "Composed":
    from flagscale.runner.config.compose import compose_config, split_config_path

    config_dir, config_name = split_config_path(find_config(config, task))
    return compose_config(config_dir, config_name, overrides)


@dataclass(frozen=True)
class Job:
    """A checked configuration and the plan made of it."""

    config: "Config"
    plan: "JobPlan"


def plan(composed: "Composed") -> Job:
    from flagscale.runner.plan.registry import plan_config

    config = load(composed)
    return Job(config, plan_config(config, this_site()))


def act(
    composed: "Composed",
    action: str | None = None,
    command: Sequence[str] = (),
    record: Callable[[], None] | None = None,
) -> int:
    """Do what the configuration's `action` says, or `action` in its place; returns the exit code.

    record: called once a job was handed over
    """
    job = plan(composed)
    match action or job.config.action:
        case "dryrun":
            from flagscale.runner.launch.dry import render_dry_run

            print(render_dry_run(job.plan), end="")
            return 0
        case "run" | "test" if job.plan.service is not None:
            from flagscale.cli.service import start_service

            is_test = (action or job.config.action) == "test"
            foreground = job.plan.foreground
            return start_service(
                job.plan, job.config.values, command, foreground=foreground, is_test=is_test, record=record
            )
        case "run":
            return start(job.plan, job.config.values, command, foreground=job.plan.foreground, record=record)
        case "test":
            return start(job.plan, job.config.values, command, foreground=True, record=record)
        case "stop":
            from flagscale.cli.stop import main as stop

            return stop([job.plan.exp_dir])
        case "query" if job.plan.service is not None:
            from flagscale.cli.serve import show_status

            return show_status([job.plan.exp_dir])
        case "query":
            from flagscale.cli.status import main as status

            return status([job.plan.exp_dir])
    raise UserError(f"action: this release has no tuner, so `{action or job.config.action}` cannot be done")


def start(
    job: "JobPlan",
    values: Mapping[str, Any],
    command: Sequence[str],
    *,
    foreground: bool,
    record: Callable[[], None] | None = None,
) -> int:
    """Start a job here, wait until it is up, and stay with it to its end where `foreground` says so."""
    import gc

    from flagscale.runner.launch.ending import catch_interrupts
    from flagscale.runner.launch.launcher import submit_job
    from flagscale.runner.launch.startup import wait_until_up
    from flagscale.runner.monitor.follow import wait_job

    gc.enable()
    run = submit_job(job, config=dict(values), command=list(command), env=dict(os.environ))
    with catch_interrupts(run, stops_job=foreground):
        if record is not None:
            record()
        wait_until_up(run, job, foreground)
    return wait_job(run) if foreground else 0
