"""`plan_rl`: verl's trainer, given its configuration as Hydra overrides, over a Ray cluster where there are hosts."""

from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.config.tasks import Rl
from flagscale.runner.plan.common import (
    backend_of,
    bin_dirs_of,
    environment_of,
    find_outputs,
    plan_host,
    plan_job,
    plan_ray,
    require_entrypoint,
)
from flagscale.runner.plan.job import JobPlan, ProcessSpec, freeze
from flagscale.runner.plan.site import Site


def plan_rl(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    """The plan of a reinforcement-learning job: the trainer runs on the first host.

    Raises:
        UserError: the task has no entry point.
    """
    outputs = find_outputs(config)
    assert isinstance(config.task, Rl)
    task = config.task
    argv: tuple[str, ...] = ("python", "-m", require_entrypoint(config))
    argv += tuple(
        f"--{name}={value}"
        for name, value in (("config-path", task.config_path), ("config-name", task.config_name))
        if value
    )
    arguments = [*task.overrides.items(), *((f"+{name}", value) for name, value in task.append_kargs.items())]
    rows = []
    for node_rank, host in enumerate(hosts):
        tree = site.find_tree("verl", host.chip)
        env = environment_of(config, host)
        processes = plan_ray(config, site, host, node_rank, env)
        if node_rank == 0:
            processes += (
                ProcessSpec(
                    name="trainer",
                    argv=argv,
                    cwd=site.root,
                    backend=backend_of(config),
                    arguments=tuple((name, freeze(value)) for name, value in arguments),
                    env=env,
                    path_dirs=(*((tree.path,) if tree else ()), site.root),
                    bin_dirs=bin_dirs_of(config, site, host),
                    tree=tree,
                ),
            )
        rows.append(plan_host(config, outputs, host, node_rank, processes))
    return plan_job(config, outputs, tuple(rows))
