"""The planner of each task type."""

from collections.abc import Callable

from flagscale.runner.config.experiment import TaskType
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.plan.inference import plan_compress, plan_inference
from flagscale.runner.plan.job import JobPlan
from flagscale.runner.plan.rl import plan_rl
from flagscale.runner.plan.serve import plan_serve
from flagscale.runner.plan.site import Site
from flagscale.runner.plan.train import plan_train

PLANNERS: dict[TaskType, Callable[[Config, tuple[Host, ...], Site], JobPlan]] = {
    "train": plan_train,
    "inference": plan_inference,
    "serve": plan_serve,
    "compress": plan_compress,
    "rl": plan_rl,
}


def plan_config(config: Config, site: Site) -> JobPlan:
    """The plan of whatever task a configuration holds, on the hosts that it chose."""
    return PLANNERS[config.task_type](config, config.hosts, site)
