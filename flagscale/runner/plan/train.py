"""`plan_train`: a torchrun on every host, with the backend's arguments behind the entry point."""

import posixpath
from collections.abc import Mapping
from typing import Any

from flagscale.chips import find_chip
from flagscale.runner.config.arguments import read_switch
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.plan.common import (
    Outputs,
    address_of,
    backend_of,
    bin_dirs_of,
    environment_of,
    find_outputs,
    master_endpoint,
    master_of,
    plan_host,
    plan_job,
    require_entrypoint,
    resolve_path,
)
from flagscale.runner.plan.job import AtLaunch, JobPlan, ProcessSpec, Word, freeze
from flagscale.runner.plan.site import Site

PASSED_TO_TORCHRUN = (
    "rdzv_conf",
    "standalone",
    "max_restarts",
    "monitor_interval",
    "start_method",
    "event_log_handler",
    "role",
    "module",
    "no_python",
    "run_path",
    "local_ranks_filter",
    "local_addr",
    "logs_specs",
    "numa_binding",
    "signals_to_handle",
)
MADE_FOLDERS = ("save", "tensorboard_dir", "wandb_save_dir")
LOCALHOST = "localhost"
OWN_ENTRYPOINTS = ("flagscale/train/train_gpt.py",)
"""entry points that tell when a rank is past its start"""


def plan_train(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    """The plan of a training job on these hosts, whose `slots` are the ranks to start.

    Raises:
        UserError: the task has no entry point.
    """
    outputs = find_outputs(config)
    folders = _training_folders(config, outputs)
    first_rank, rows = 0, []
    for node_rank, host in enumerate(hosts):
        if config.experiment.runner.type == "cloud":
            node_rank = config.experiment.runner.node_rank or 0
            first_rank = node_rank * host.slots
        process = _plan_torchrun(config, site, outputs, folders, host, len(hosts), node_rank, first_rank)
        made = tuple(folders[name] for name in MADE_FOLDERS if "://" not in folders.get(name, "://"))
        rows.append(plan_host(config, outputs, host, node_rank, (process,), make_dirs=made))
        if not config.experiment.runner.per_node_task:
            first_rank += host.slots
    return plan_job(config, outputs, tuple(rows), checkpoint_dir=folders.get("save"), load_dir=folders.get("load"))


def _training_folders(config: Config, outputs: Outputs) -> dict[str, str]:
    """Megatron's folders: what the user gave, relative like `exp_dir`, else the contract's places below that."""
    if backend_of(config) != "megatron":
        return {}
    given = {argument.name: argument.value for argument in config.arguments[0]}
    return {
        name: resolve_path(config, str(given.get(name) or posixpath.join(outputs.exp_dir, folder)))
        for name, folder in (
            ("save", "checkpoints"),
            ("load", "checkpoints"),
            ("tensorboard_dir", "tensorboard"),
            ("wandb_save_dir", "wandb"),
        )
    }


def _plan_torchrun(
    config: Config,
    site: Site,
    outputs: Outputs,
    folders: Mapping[str, str],
    host: Host,
    num_hosts: int,
    node_rank: int,
    first_rank: int,
) -> ProcessSpec:
    overlay = {
        **config.chip_arguments.get(host.chip or "", {}),
        **config.host_arguments.get(host.name, {}),
    }
    root = str(overlay.pop("build_dir", None) or site.root)
    backend = backend_of(config)
    entrypoint = require_entrypoint(config)
    options = _torchrun_options(config, outputs, host, num_hosts, node_rank)
    tree = site.find_tree(backend, host.chip)
    return ProcessSpec(
        name="torchrun",
        argv=(config.experiment.runner.backend, *options, entrypoint),
        cwd=root,
        backend=backend,
        arguments=_arguments(config, folders, host, overlay),
        entrypoint=None if config.experiment.runner.module else entrypoint,
        num_ranks=host.slots,
        first_rank=first_rank,
        announces=posixpath.normpath(entrypoint).endswith(OWN_ENTRYPOINTS),
        env=environment_of(config, host),
        path_dirs=(*((tree.path,) if tree else ()), root),
        bin_dirs=bin_dirs_of(config, site, host),
        tree=tree,
    )


def _torchrun_options(config: Config, outputs: Outputs, host: Host, num_hosts: int, node_rank: int) -> tuple[Word, ...]:
    runner = config.experiment.runner
    label = f"host_{node_rank}_{host.name}"
    if runner.type == "cloud":
        num_hosts = int(str(runner.nnodes).split(":", 1)[0])
    if runner.per_node_task:
        num_hosts, node_rank = 1, 0
    words: list[Word] = []
    for name in PASSED_TO_TORCHRUN:
        value = getattr(runner, name)
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    alone = num_hosts == 1
    if alone and runner.local_addr is None:
        words += ["--local-addr", LOCALHOST]  # else ranks look for each other by the host's own name, if it has one
    # c10d numbers hosts by their names, so ranks would not be where the hostfile puts them; static does as it is told,
    # but a restart of the ranks on one host does not reach the others
    backend = runner.rdzv_backend or ("c10d" if alone or runner.max_restarts else "static")
    endpoint: Word = runner.rdzv_endpoint or _meeting_point(config, alone, backend)
    words += ["--rdzv-id", str(runner.rdzv_id) if runner.rdzv_id is not None else AtLaunch("run_id")]
    words += ["--nnodes", str(num_hosts), "--node-rank", str(node_rank)]
    words += ["--nproc-per-node", str(host.slots)]
    words += ["--rdzv-backend", backend, "--rdzv-endpoint", endpoint]
    words += ["--log-dir", AtLaunch("run_id", f"{posixpath.join(outputs.details_dir, label)}/")]
    words += ["--redirects", str(runner.redirects), "--tee", str(runner.tee)]
    return tuple(words)


def _meeting_point(config: Config, alone: bool, backend: str) -> Word:
    """With `per_node_task` each host takes a port that is free there: that of another may be taken."""
    runner = config.experiment.runner
    if runner.per_node_task and backend == "c10d" and not runner.master_port:
        return address_of(LOCALHOST, 0)
    return master_endpoint(config, runner.master_addr or LOCALHOST if alone else master_of(config))


def _arguments(
    config: Config, folders: Mapping[str, str], host: Host, overlay: Mapping[str, Any]
) -> tuple[tuple[str, Any], ...]:
    """User over output folders over what the chip needs; then what is laid over for this host alone."""
    chip = find_chip(host.chip) if host.chip else None
    merged: dict[str, Any] = dict(chip.backend_args.get(backend_of(config), {})) if chip else {}
    merged |= folders
    for argument in config.arguments[0]:
        if argument.value is not None and argument.name not in folders:
            merged[argument.name] = argument.value
    merged |= {name: read_switch(value) for name, value in overlay.items()}
    return tuple((name, freeze(value)) for name, value in merged.items() if value is not None)
