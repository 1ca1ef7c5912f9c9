"""The launcher that only prints: the same plan, the same scripts, and nothing touched.

Equal input gives equal bytes. What only a launch can know stands as its name.
"""

import shlex
from typing import Any

from flagscale.runner.launch.slurm_script import render_sbatch
from flagscale.runner.plan.graph import describe_graph
from flagscale.runner.plan.job import DRAWN, AtLaunch, HostPlan, JobPlan, ProcessSpec, encode_plan
from flagscale.runner.plan.service import decode_service, list_first_jobs
from flagscale.runner.render.argv import bind_word, render_argv
from flagscale.runner.render.script import render_script


def describe_plan(plan: JobPlan) -> dict[str, Any]:
    """The plan as JSON values, with each process's environment, argv and script as they would be."""
    hosts = [
        {
            "host": host.host.name,
            "node_rank": host.node_rank,
            "interface_vars": list(host.interface_vars),
            "processes": [_describe_process(plan, host, process) for process in host.processes],
            "files": [{"path": path, "content": content} for path, content in host.files],
        }
        for host in plan.hosts
    ]
    described = {"plan": encode_plan(plan), "hosts": hosts}
    if plan.service is not None:
        described["replicas"] = [describe_plan(job) for job in list_first_jobs(decode_service(plan.service))]
    return described


def _describe_process(plan: JobPlan, host: HostPlan, process: ProcessSpec) -> dict[str, Any]:
    return {
        "name": process.name,
        "environment": {name: bind_word(value, None) for name, value in process.env},
        "secrets": [name for name, _ in plan.secrets],
        "argv": list(render_argv(process)),
        "script": render_script(plan, host, process),
    }


def render_dry_run(plan: JobPlan) -> str:
    """What would run, for people: one block a host."""
    ranks = f", {plan.num_ranks} ranks" if plan.num_ranks else ""
    head = f"# {plan.exp_name or plan.task}: {plan.task} with {plan.backend} on {len(plan.hosts)} host(s){ranks}"
    lines = [head.replace("\n", " "), f"# outputs: {plan.exp_dir}".replace("\n", " ")]
    if plan.launcher == "slurm":
        lines += [
            "",
            "# ==== what Slurm is given: sbatch",
            render_sbatch(plan, str(AtLaunch("run_id")), "python").rstrip(),
        ]
    for host in plan.hosts:
        for process in host.processes:
            lines += ["", f"# ==== {host.label}: {process.name}", "# environment"]
            lines += [f"{name}={shlex.quote(bind_word(value, None))}" for name, value in process.env]
            lines += [f"{name}=<secret: {_source_of(source)}>" for name, source in plan.secrets]
            lines += [f"{name}=<the interface that leads to {host.peer}>" for name in host.interface_vars]
            lines += [
                "# argv",
                shlex.join(render_argv(process)),
                "# script",
                render_script(plan, host, process).rstrip("\n"),
            ]
        for path, content in host.files:
            lines += [f"# file {path}", content.rstrip("\n")]
    if plan.service is not None:
        service = decode_service(plan.service)
        if service.graph is not None:
            lines += ["", "# ==== the graph of models, in Ray Serve", *describe_graph(service.graph)]
        for job in list_first_jobs(service):
            lines += ["", f"# ======== replica {job.exp_name}", render_dry_run(job).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _source_of(secret: str) -> str:
    return secret if secret == DRAWN else f"taken from ${secret} at launch"
