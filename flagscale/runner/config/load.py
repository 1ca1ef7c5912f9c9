"""From a composed tree to a frozen `Config`, or to every fault in it at once.

The steps: bring spellings to one field, find secrets, load the models, read the hostfile, choose the hosts, check
backend arguments against their catalogue, check what must divide what. A step that cannot run because an earlier one
failed is left out; its faults show once the earlier ones are mended. Nothing here looks at this machine but for reading
the files that the configuration names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from flagscale.errors import ConfigError, Fault, find_nearest
from flagscale.runner.config.arguments import GivenArgument
from flagscale.runner.config.compose import Composed
from flagscale.runner.config.experiment import TASK_TYPES, Experiment, TaskType
from flagscale.runner.config.faults import read_faults, unknown_key
from flagscale.runner.config.hostfile import Host, load_hostfile
from flagscale.runner.config.hosts import choose_hosts
from flagscale.runner.config.idle import find_idle
from flagscale.runner.config.secrets import find_secrets, mask_fault, mask_secrets
from flagscale.runner.config.spellings import unify_spellings
from flagscale.runner.config.tasks import Compress, CustomServe, Inference, Rl, ServeModel, Train

ACTIONS = ("run", "dryrun", "test", "stop", "query", "auto_tune")
ROOT_KEYS = ("experiment", "action", *TASK_TYPES, "device_type_specific", "node_specific")
HYDRA_KEYS = ("defaults", "hydra")
"""read and taken out by Hydra: one that is left is misspelt"""

TaskSection: TypeAlias = Train | Inference | tuple[ServeModel, ...] | CustomServe | Compress | Rl
Tree: TypeAlias = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Config:
    """A configuration in which every check has passed.

    hosts: the machines that the job runs on, `slots` being the ranks it starts there
    arguments: backend arguments, one tuple for `train`, one for each model of `serve`
    chip_arguments, host_arguments: arguments laid over them, by chip type and by host (`train`)
    secrets: name of a variable in the job -> name in the launcher's environment
    values: the resolved tree as it may be written down, secrets masked
    """

    experiment: Experiment
    task: TaskSection
    action: str
    cwd: Path
    hosts: tuple[Host, ...]
    arguments: tuple[tuple[GivenArgument, ...], ...]
    values: Mapping[str, Any]
    chip_arguments: Mapping[str, Mapping[str, Any]]
    host_arguments: Mapping[str, Mapping[str, Any]]
    secrets: Mapping[str, str]
    warnings: tuple[Fault, ...] = ()

    @property
    def task_type(self) -> TaskType:
        return self.experiment.task.type


class _Loader:
    """One load: the tree, and the faults found so far."""

    def __init__(self, composed: Composed, cwd: Path) -> None:
        self.composed = composed
        self.cwd = cwd
        self.faults: list[Fault] = []
        self.warnings: list[Fault] = []
        self.is_partial = False
        """whether the task section was loaded without keys that it should not have: sizes may be missing from it"""
        unusable = [*_find_unusable(composed.values, ""), *_find_unusable({"exp_dir": str(cwd)}, "experiment")]
        if unusable:
            raise ConfigError(composed.locate(unusable))
        self.tree, self.written, found = unify_spellings(composed.values)
        self.faults += found

    def load(self) -> Config:
        from flagscale.runner.config.checks import check_task
        from flagscale.runner.config.graph import check_graph

        secrets, hidden, found = find_secrets(self.tree, self.written_environment())
        self.faults += found
        action = self._check_root()
        experiment = self._load_section(Experiment, self.tree.get("experiment"), "experiment")
        task = self._load_task(self._task_type())
        hosts: tuple[Host, ...] = ()
        arguments: tuple[tuple[GivenArgument, ...], ...] = ()
        if experiment is not None:
            hosts = self._load_hosts(experiment)
            self.warnings += find_idle(experiment)
        if task is not None:
            policy = experiment.task.unknown_args if experiment else "error"
            backend = experiment.task.backend if experiment else None
            whole = hosts if not self.is_partial else ()
            checked = check_task(task, self._task_type(), backend, policy, whole, self.composed.references)
            arguments = checked.arguments
            self.faults += checked.faults
            self.warnings += checked.warnings
        if experiment is not None and isinstance(task, tuple):
            self.faults += check_graph(task, experiment.runner, self.cwd, hosts)
        if experiment is not None and experiment.task.entrypoint is None and not isinstance(task, tuple | None):
            text = f"is missing: a task of type {self._task_type()} needs one"
            self.faults.append(Fault("experiment.task.entrypoint", text, expected="a script or a module"))
        chip_arguments = self._read_overlay("device_type_specific", experiment)
        host_arguments = self._read_overlay("node_specific", experiment)
        if self.faults or experiment is None or task is None:
            raise ConfigError([mask_fault(fault, hidden) for fault in self._locate(self.faults)])
        return Config(
            experiment=experiment,
            task=task,
            action=action,
            cwd=self.cwd,
            hosts=hosts,
            arguments=arguments,
            values=mask_secrets(self.composed.values, hidden),
            chip_arguments=chip_arguments,
            host_arguments=host_arguments,
            secrets=secrets,
            warnings=tuple(mask_fault(fault, hidden) for fault in self._locate(self.warnings)),
        )

    def written_environment(self) -> dict[str, str]:
        """Raw values that read the environment, under the paths that the unified tree has."""
        moved = {old: new for new, old in self.written.items()}
        return {_move(path, moved): raw for path, raw in self.composed.environment.items()}

    def _check_root(self) -> str:
        for key in self.tree:
            if key not in ROOT_KEYS and not self._is_referenced(str(key)):
                self.faults.append(unknown_key(str(key), str(key), [*ROOT_KEYS, *HYDRA_KEYS]))
        if "experiment" not in self.tree:
            self.faults.append(Fault("experiment", "is missing", expected="a section"))
        action = self.tree.get("action")
        action = "run" if action is None else action
        if action not in ACTIONS:
            fault = unknown_key("action", str(action), list(ACTIONS), "action")
            self.faults.append(replace(fault, message=f"there is no action `{action}`"))
        return str(action)

    def _task_type(self) -> TaskType:
        experiment = self.tree.get("experiment")
        task = experiment.get("task") if isinstance(experiment, dict) else None
        named = task.get("type") if isinstance(task, dict) else None
        return next((name for name in TASK_TYPES if name == named), "train")

    def _load_task(self, kind: TaskType) -> TaskSection | None:
        if kind not in self.tree:
            found = [name for name in TASK_TYPES if name in self.tree]
            hint = f"; the configuration has `{found[0]}`" if found else ""
            expected = f"a task file: `defaults: [{{{kind}: <file>}}]`"
            self.faults.append(
                Fault(kind, f"experiment.task.type is {kind}, but there is no section `{kind}`{hint}", expected)
            )
            return None
        raw = self.tree[kind]
        match kind:
            case "train":
                return self._load_section(Train, raw, kind)
            case "inference":
                return self._load_section(Inference, raw, kind)
            case "compress":
                return self._load_section(Compress, raw, kind)
            case "rl":
                return self._load_section(Rl, raw, kind)
        if isinstance(raw, dict):
            return self._load_section(CustomServe, raw, kind)
        if not isinstance(raw, list) or not raw:
            self.faults.append(Fault(kind, "holds no model", expected="a list of models, each with a serve_id"))
            return None
        models = [self._load_section(ServeModel, row, f"{kind}.{index}") for index, row in enumerate(raw)]
        return tuple(model for model in models if model is not None)

    def _load_section(self, model: type[Model], raw: Any, path: str) -> Model | None:
        if raw is None:
            raw = {}
        while True:
            try:
                return model.model_validate(raw)
            except ValidationError as error:
                pruned = self._without_references(raw, error, path)
                if pruned is None and model is Train:
                    pruned = self._without_unknown(raw, error)
                    self.faults += read_faults(error, model, path) if pruned is not None else []
                if pruned is None or pruned == raw:
                    self.faults += read_faults(error, model, path)
                    return None
                raw = pruned

    def _without_references(self, raw: Any, error: ValidationError, path: str) -> Any:
        """The section without unknown keys that exist to be interpolated, or None where there is no such key."""
        for row in error.errors(include_url=False, include_context=False):
            location = row["loc"]
            dotted = ".".join([path, *map(str, location)])
            if row["type"] == "extra_forbidden" and self._is_referenced(dotted):
                return _without(raw, location)
        return None

    def _without_unknown(self, raw: Any, error: ValidationError) -> Any:
        """The section without its unknown keys, so that its arguments are checked too; None where more is wrong."""
        rows = error.errors(include_url=False, include_context=False)
        if any(row["type"] != "extra_forbidden" for row in rows):
            return None
        self.is_partial = True
        for row in rows:
            raw = _without(raw, row["loc"])
        return raw

    def _is_referenced(self, path: str) -> bool:
        return any(name == path or name.startswith(path + ".") for name in self.composed.references)

    def _load_hosts(self, experiment: Experiment) -> tuple[Host, ...]:
        listed: tuple[Host, ...] | None = None
        if experiment.runner.hostfile:
            key = "experiment.runner.hostfile"
            listed, found = load_hostfile(self.cwd / experiment.runner.hostfile, key)
            if found:
                self.faults += found
                return ()
        hosts, faults, warnings = choose_hosts(experiment, listed)
        self.faults += faults
        self.warnings += warnings
        names = [host.name for host in listed or ()]
        for key, rows in (("node_specific", experiment.node_specific), ("node_args", experiment.node_args)):
            for name in rows if names else ():
                if name not in names:
                    text, near = "the hostfile names no such host", find_nearest(name, names)
                    self.warnings.append(Fault(f"experiment.{key}.{name}", text, suggestion=near))
        return hosts

    def _read_overlay(self, key: str, experiment: Experiment | None) -> dict[str, dict[str, Any]]:
        from flagscale.runner.config.checks import Checked, check_overlay

        raw = self.tree.get(key)
        rows = {name: values for name, values in raw.items() if values is not None} if isinstance(raw, dict) else {}
        if not isinstance(raw, dict | None) or not all(isinstance(values, dict) for values in rows.values()):
            self.faults.append(Fault(key, "cannot be read", expected="a mapping of names to mappings"))
            return {}
        read = {str(name): {str(k).replace("-", "_"): v for k, v in values.items()} for name, values in rows.items()}
        if experiment is not None and experiment.task.type == "train" and experiment.task.backend in (None, "megatron"):
            checked = Checked()
            check_overlay(checked, key, read, experiment.task.unknown_args, self.composed.references)
            self.faults += checked.faults
            self.warnings += checked.warnings
        return read

    def _locate(self, faults: list[Fault]) -> list[Fault]:
        return self.composed.locate([replace(fault, path=_move(fault.path, self.written)) for fault in faults])


def _move(path: str, moved: Mapping[str, str]) -> str:
    for new, old in moved.items():
        if path == new or path.startswith(new + "."):
            return old + path[len(new) :]
    return path


def _without(node: Any, location: tuple[str | int, ...]) -> Any:
    head, rest = location[0], location[1:]
    if isinstance(node, dict):
        if not rest:
            return {key: value for key, value in node.items() if key != head}
        return {key: _without(value, rest) if key == head else value for key, value in node.items()}
    return [_without(value, rest) if index == head else value for index, value in enumerate(node)]


def _find_unusable(node: Any, path: str) -> Iterator[Fault]:
    """A fault for every value that no command line, file or environment can hold, whatever it is meant for."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            yield from _find_unusable(str(key), here)
            yield from _find_unusable(value, here)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _find_unusable(value, f"{path}.{index}")
    elif isinstance(node, str):
        if "\0" in node:
            yield Fault(path, "holds a NUL, which no command line, file name or environment can hold")
        elif any("\ud800" <= letter <= "\udfff" for letter in node):
            yield Fault(path, "holds bytes that are not UTF-8 text")
    elif isinstance(node, int) and abs(node) >= 2**64:
        yield Fault(path, "is a number too large to be meant", expected="less than 2^64; in quotes, if it is a name")
    elif not isinstance(node, int | float | None):
        yield Fault(path, f"is of the type {type(node).__name__}", expected="text, a number, true or false")


def hidden_values(composed: Composed) -> frozenset[str]:
    """The values of secrets that stand in a composed configuration, whether or not it is sound."""
    loader = _Loader(composed, Path.cwd())
    return find_secrets(loader.tree, loader.written_environment())[1]


def load_config(composed: Composed, cwd: Path) -> Config:
    """The configuration, checked whole.

    cwd: the folder in which the command was typed; `exp_dir` and `hostfile` are relative to it.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    return _Loader(composed, cwd).load()
