"""The planner of each task type, imported when it is asked for."""

from collections.abc import Callable
from importlib import import_module

from flagscale.runner.config.experiment import TaskType
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.plan.job import JobPlan
from flagscale.runner.plan.site import Site

Planner = Callable[[Config, tuple[Host, ...], Site], JobPlan]

PLANNERS: dict[TaskType, tuple[str, str]] = {
    "train": ("flagscale.runner.plan.train", "plan_train"),
    "inference": ("flagscale.runner.plan.inference", "plan_inference"),
    "serve": ("flagscale.runner.plan.serve", "plan_serve"),
    "compress": ("flagscale.runner.plan.inference", "plan_compress"),
    "rl": ("flagscale.runner.plan.rl", "plan_rl"),
}


def plan_config(config: Config, site: Site) -> JobPlan:
    """The plan of whatever task a configuration holds, on the hosts that it chose."""
    module, name = PLANNERS[config.task_type]
    planner: Planner = getattr(import_module(module), name)
    return planner(config, config.hosts, site)
