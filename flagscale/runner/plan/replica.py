"""One replica of a model as a job of its own: the same plan as any other, in a folder of its own."""

from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from flagscale.runner.config.load import Config
from flagscale.runner.config.tasks import ServeModel
from flagscale.runner.plan.common import Outputs, environment_of, plan_host, plan_job, plan_ray, ray_address
from flagscale.runner.plan.engines import KEY_VARIABLES, Arguments, Environment, plan_engine
from flagscale.runner.plan.job import AtLaunch, JobPlan, ProcessSpec, Word
from flagscale.runner.plan.placement import Place, chip_of
from flagscale.runner.plan.service import ENGINE_KEY, REPLICA_TASK
from flagscale.runner.plan.site import Site

Crowd = dict[str, int]
"""host -> how many replicas compute there, of those that a service begins with"""


@dataclass(frozen=True, slots=True)
class Special:
    """What one replica has that others of its model have not: words, variables under the user's own, a log folder.

    kv_host, kv_port: as `Seat`'s
    """

    words: tuple[Word, ...] = ()
    env: Environment = ()
    log_dir: str = ""
    kv_host: str = ""
    kv_port: int = 0


ORDINARY = Special()


def plan_replica(
    config: Config,
    site: Site,
    model: ServeModel,
    arguments: Arguments,
    place: Place,
    exp_dir: str,
    crowd: Crowd,
    special: Special = ORDINARY,
) -> JobPlan:
    """The job of one replica, its outputs below `exp_dir`."""
    assert model.engine is not None
    outputs = Outputs(exp_dir, special.log_dir or f"{exp_dir}/serve_logs")
    hosts = tuple(share.host for share in place)
    rows = []
    for node_rank, share in enumerate(place):
        given = dict(_environment_of(config, model, place, node_rank, crowd))
        env: Environment = tuple((dict(special.env) | given).items())
        processes: tuple[ProcessSpec, ...] = ()
        if model.engine == "vllm" and len(place) > 1:
            env = (*env, ("RAY_ADDRESS", ray_address(config, hosts)))
            processes = plan_ray(config, site, share.host, node_rank, env, hosts)
        if node_rank == 0 or model.engine == "sglang":
            engine = plan_engine(config, site, model, arguments, place, node_rank, env)
            processes += (replace(engine, argv=(*engine.argv, *special.words)),)
        rows.append(plan_host(config, outputs, share.host, node_rank, processes))
    job = plan_job(config, outputs, tuple(rows))
    secrets = dict(config.secrets)
    if model.engine != "sglang" or not all(host.is_local for host in hosts):
        secrets[KEY_VARIABLES[model.engine]] = ENGINE_KEY
    return replace(
        job,
        task=REPLICA_TASK,
        backend=model.engine,
        exp_name=PurePosixPath(exp_dir).name,
        master_addr=hosts[0].name,
        master_port=None,
        secrets=tuple(sorted(secrets.items())),
        foreground=False,
    )


def _environment_of(config: Config, model: ServeModel, place: Place, node_rank: int, crowd: Crowd) -> Environment:
    """A host's environment; over it the chips of this replica, and on a CPU its part of the threads."""
    share, experiment = place[node_rank], config.experiment
    given: dict[str, Any] = dict(environment_of(config, share.host))
    chip = chip_of(share.host, model.engine)
    if share.device_ids:
        given |= chip.visible_env(share.device_ids)
    said = {**experiment.envs, **experiment.node_specific.get(share.host.name, {})}
    if chip.device == "cpu" and "OMP_NUM_THREADS" not in said:
        asked = model.resources.num_cpus
        if asked is None and not share.host.is_local:
            asked = share.host.slots // crowd.get(share.host.name, 1)
        given["OMP_NUM_THREADS"] = AtLaunch("num_threads") if asked is None else str(max(1, int(asked)))
        if model.engine == "vllm":  # else it binds its threads to all cores, whoever else computes on them
            given.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return tuple(given.items())
