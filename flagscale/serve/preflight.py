"""What is wrong with a service before anything of it is started: model, engine, port, key, chips, all at once.

Only this machine is looked at; hosts that are reached over SSH are asked by the launcher when a replica starts there.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from flagscale.chips import find_chip
from flagscale.errors import UserError
from flagscale.runner.launch.checks import find_program
from flagscale.runner.launch.ports import find_port_owner, is_port_free
from flagscale.runner.plan.job import HostPlan, ProcessSpec
from flagscale.runner.plan.service import ModelPlan, ServicePlan
from flagscale.serve.recipes import describe_missing
from flagscale.serve.terms import make_settings

MODULES = {"sglang": "sglang", "native": "transformers"}
GET = {
    "vllm": "install it (`pip install vllm`, best in an environment of its own) and name its folder by "
    "`--bin-dir <environment>/bin`; or serve with `--engine native`, which comes with this toolkit",
    "sglang": "install it (`pip install sglang`, best in an environment of its own) and name its folder by "
    "`--bin-dir <environment>/bin`; or serve with `--engine native`, which comes with this toolkit",
    "llama_cpp": "build llama.cpp (`cmake -B build && cmake --build build --target llama-server`) and name its folder "
    "by `--bin-dir <llama.cpp>/build/bin`",
    "native": "`pip install 'flagscale[serve,engine]'`, and torch",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+", re.ASCII)
ASK_LIMIT_S = 60.0


def check_service(service: ServicePlan, environ: Mapping[str, str]) -> None:
    """
    Raises:
        UserError: everything that is wrong.
    """
    _raise([*_find_address_faults(service, environ), *_find_all_model_faults(service)])


def check_models(service: ServicePlan) -> None:
    """As `check_service`, of one whose address is its own already."""
    _raise(list(_find_all_model_faults(service)))


def _raise(faults: list[str]) -> None:
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))


def _find_all_model_faults(service: ServicePlan) -> Iterator[str]:
    for model in service.models:
        for host in model.seats[0].job.hosts:
            if host.host.is_local and model.seats[0].job.docker is None:
                yield from _find_host_faults(model, host)
        yield from _find_chip_faults(model)


def _find_address_faults(service: ServicePlan, environ: Mapping[str, str]) -> Iterator[str]:
    if service.api_key_env and not environ.get(service.api_key_env):
        yield f"${service.api_key_env} is not set; it is to hold the key that callers of the service show"
    else:
        try:
            make_settings(service, environ)
        except UserError as error:
            yield f"{error}" + "; name the key's variable by `--api-key-env NAME`" * (
                "needs at least one key" in str(error)
            )
    if not is_port_free(service.port):
        owner = find_port_owner(service.port)
        yield f"port {service.port} is taken" + (f" by {owner}" if owner else "") + "; choose another by `--port`"


def _find_host_faults(model: ModelPlan, host: HostPlan) -> Iterator[str]:
    """What the user's own `before_start` may bring is no fault."""
    before = host.before_start or ""
    for process in host.processes:
        if process.backend and not before and (fault := _find_engine_fault(process)):
            yield f"{model.name}: {fault}; {GET[model.engine]}"
        if process.backend:
            yield from (f"{model.name}: {fault}" for fault in _find_model_fault(process, before))


def _find_engine_fault(process: ProcessSpec) -> str | None:
    program = find_program(process, os.environ)
    if program is None:
        return f"{process.backend} is not here: no program `{process.argv[0]}` on the PATH"
    module = MODULES.get(process.backend)
    if module is None:
        return None
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        done = subprocess.run([program, "-c", code], capture_output=True, timeout=ASK_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} cannot be asked for the module `{module}`: {error}"
    return f"{process.backend} is not here: {program} has no module `{module}`" if done.returncode else None


def model_of(process: ProcessSpec) -> str:
    """The model that an engine is told to load."""
    arguments = dict(process.arguments)
    return str(
        process.argv[2] if process.backend == "vllm" else arguments.get("model_path", arguments.get("model", ""))
    )


def _find_model_fault(process: ProcessSpec, before: str) -> Iterator[str]:
    name = model_of(process)
    path = Path(process.cwd, name).expanduser()
    if "://" in name or (path.name and re.search(rf"(?<![\w.-]){re.escape(path.name)}(?![\w.-])", before)):
        return
    if path.is_file() and (process.backend == "llama_cpp" or path.suffix == ".gguf"):
        return
    if path.is_dir():
        if process.backend == "llama_cpp":
            yield f"the folder {path} holds no *.gguf file, which llama.cpp needs"
        elif not any((path / item).is_file() for item in ("config.json", "params.json")):
            yield f"the folder {path} holds no config.json; expected a model in the format of transformers"
        return
    if process.backend in ("vllm", "sglang") and not name.startswith((".", "/", "~")) and _HUB_NAME.fullmatch(name):
        return  # a name of the hub, which the engine looks up
    yield describe_missing(path)


def _find_chip_faults(model: ModelPlan) -> Iterator[str]:
    """Whether this machine has the chips of the replicas that it may have to hold at once."""
    needed: set[int] = set()
    chip_name: str | None = None
    for seat in model.seats[: model.scaling.highest]:
        for host in seat.job.hosts:
            if host.host.is_local:
                chip_name = host.host.chip
                needed |= {
                    int(thing.rpartition("/")[2]) for thing in seat.takes[1:] if thing.startswith(host.host.name)
                }
    if not needed:
        return
    from flagscale.chips.probe import probe_host

    found = probe_host()
    present = {device.index for device in found.devices}
    wanted = find_chip(chip_name or "gpu")
    chips = f"{len(needed)} chip{'s' * (len(needed) > 1)}"
    many = model.scaling.highest > 1
    what = f"{model.name}: {model.scaling.highest} replicas need {chips}" if many else f"{model.name} needs {chips}"
    if not present:
        yield (
            f"{what}, and this machine has none; to serve on its CPU add `++experiment.runner.device_type=cpu`, "
            "or name the hosts that have some by `++experiment.runner.hostfile=PATH`"
        )
    elif wanted is not None and found.chip is not wanted:
        yield f"{what} of {wanted.name}, but this machine has {found.chip.name}; name that by `runner.device_type`"
    elif missing := needed - present:
        yield f"{what}, but this machine has {len(present)} ({found.chip.name}); missing: {sorted(missing)}"
