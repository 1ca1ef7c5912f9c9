"""The checks of a task section that look at more than one field: arguments against catalogues, sizes against slots."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flagscale.errors import Fault, find_nearest
from flagscale.runner.config.arguments import GivenArgument, check_arguments, flatten_sections, read_switch
from flagscale.runner.config.catalogue import load_catalogue
from flagscale.runner.config.experiment import DEFAULT_BACKENDS, TaskType
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.parallel import World, check_parallelism
from flagscale.runner.config.tasks import Inference, Rl, ServeModel, Train
from flagscale.runner.config.vocabulary import translate_engine_args

BACKENDS: dict[TaskType, tuple[str, ...]] = {
    "train": ("megatron", "robotics", "pi0"),
    "inference": ("vllm",),
    "serve": ("vllm", "sglang", "llama_cpp", "native"),
    "compress": ("llmcompressor",),
    "rl": ("verl",),
}
LLM_ONLY_ARGUMENTS = frozenset({"disable_log_stats", "hf_token", "task"})
"""keyword arguments of `vllm.LLM` that `vllm serve` has no option for"""

_OVERRIDE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")

OVERLAY_KEYS = frozenset({"build_dir"})
"""keys of a root overlay that the launcher reads and the backend does not"""

Policy = Literal["error", "warn", "pass"]


@dataclass
class Checked:
    """What checking a task section gave."""

    arguments: tuple[tuple[GivenArgument, ...], ...] = ()
    faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)

    def check(self, given: tuple[GivenArgument, ...], backend: str, policy: Policy, references: frozenset[str]) -> None:
        faults, warnings = check_arguments(given, load_catalogue(backend), policy, references)
        self.faults += faults
        self.warnings += warnings


def check_task(
    task: object,
    kind: TaskType,
    backend: str | None,
    policy: Policy,
    hosts: tuple[Host, ...],
    references: frozenset[str],
) -> Checked:
    """Arguments of a task section, flat, and every fault that takes more than one field to see."""
    checked = Checked()
    backend = backend or DEFAULT_BACKENDS[kind]
    if kind in ("train", "inference", "rl") and backend not in BACKENDS[kind]:
        near = find_nearest(backend, BACKENDS[kind])
        expected = None if near else " or ".join(BACKENDS[kind])
        checked.faults.append(Fault("experiment.task.backend", f"{kind} has no backend `{backend}`", expected, near))
        return checked
    if isinstance(task, Train):
        _check_train(checked, task, backend, policy, hosts, references)
    elif isinstance(task, Inference):
        _check_inference(checked, task, policy, references)
    elif isinstance(task, tuple):
        _check_serve(checked, task, policy, references)
    elif isinstance(task, Rl):
        checked.faults += _check_override_keys(task.overrides, "rl")
        checked.faults += _check_override_keys(task.append_kargs, "rl.append_kargs")
    return checked


def _check_override_keys(node: Any, path: str) -> Iterator[Fault]:
    """Keys that Hydra's override grammar cannot spell: it has no quotes for them."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not _OVERRIDE_KEY.fullmatch(str(key)):
                text = f"the key `{key}` cannot stand in an override"
                yield Fault(f"{path}.{key}", text, expected="letters, digits, _ and -, a letter or _ first")
            yield from _check_override_keys(value, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _check_override_keys(value, f"{path}.{index}")


def _check_train(
    checked: Checked,
    task: Train,
    backend: str,
    policy: Policy,
    hosts: tuple[Host, ...],
    references: frozenset[str],
) -> None:
    catalogue = load_catalogue("megatron") if backend == "megatron" else None
    sections: dict[str, Mapping[str, Any]] = {"system": task.system, "model": task.model, "data": task.data}
    given, faults = flatten_sections(sections, "train", catalogue)
    checked.arguments = (given,)
    checked.faults += faults
    if catalogue is None:
        return
    checked.check(given, "megatron", policy, references)
    if hosts:
        world = World(sum(host.slots for host in hosts), len(hosts))
        checked.faults += check_parallelism(given, world)


def check_overlay(
    checked: Checked, key: str, rows: Mapping[str, Mapping[str, Any]], policy: Policy, references: frozenset[str]
) -> None:
    """Arguments that a root section lays over Megatron's for one host or one kind of chip."""
    for name, values in rows.items():
        given = tuple(
            GivenArgument(argument, read_switch(value), f"{key}.{name}.{argument}")
            for argument, value in values.items()
            if argument not in OVERLAY_KEYS
        )
        checked.check(given, "megatron", policy, references)


def _check_inference(checked: Checked, task: Inference, policy: Policy, references: frozenset[str]) -> None:
    if (task.llm is None) == (task.engine is None):
        found = "both stand here" if task.llm is not None else "neither stands here"
        checked.faults.append(Fault("inference", f"{found}", expected="either `llm` or `engine`"))
    if task.llm:
        given = tuple(
            GivenArgument(name, value, f"inference.llm.{key}")
            for key, value in task.llm.items()
            if (name := str(key).replace("-", "_")) not in LLM_ONLY_ARGUMENTS
        )
        checked.check(given, "vllm", policy, references)


def _check_serve(checked: Checked, models: tuple[ServeModel, ...], policy: Policy, references: frozenset[str]) -> None:
    rows = []
    names = [model.serve_id for model in models]
    for index, model in enumerate(models):
        path = f"serve.{index}"
        if names.count(model.serve_id) > 1 and names.index(model.serve_id) != index:
            checked.faults.append(Fault(f"{path}.serve_id", f"`{model.serve_id}` is the name of another model too"))
        given: tuple[GivenArgument, ...] = ()
        if model.engine is not None:
            given = translate_engine_args(model.engine, model.engine_args, model.engine_args_specific, path)
            checked.check(given, model.engine, policy, references)
            checked.faults += _check_model_path(model, given, path)
        rows.append(given)
    checked.arguments = tuple(rows)


def _check_model_path(model: ServeModel, given: tuple[GivenArgument, ...], path: str) -> list[Fault]:
    wanted = "model_path" if model.engine == "sglang" else "model"
    if any(argument.name == wanted for argument in given):
        return []
    return [Fault(f"{path}.engine_args.model", "is missing", expected="a folder or a name of a model")]
