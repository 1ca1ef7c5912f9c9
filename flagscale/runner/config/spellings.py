"""One idea, one field: the places where FlagScale's contract spells the same thing in several ways.

    experiment.deploy                                   -> experiment.runner.deploy
    experiment.{,envs.}nodes_envs, ..node_specific      -> experiment.node_specific
    experiment.{,envs.}device_type_specific             -> experiment.device_type_specific

Values of environment variables become strings here, as a shell would see them: YAML reads `1` and `true` as numbers and
booleans.
"""

from typing import Any

from flagscale.errors import Fault

Tree = dict[str, Any]

ENVIRONMENT_MAPS = {
    "nodes_envs": "node_specific",
    "node_specific": "node_specific",
    "device_type_specific": "device_type_specific",
}


def unify_spellings(values: Tree) -> tuple[Tree, dict[str, str], list[Fault]]:
    """The tree with one spelling of each idea.

    Returns the new tree, a map from a new dotted path to the path that the user wrote, and faults where two spellings
    of one idea stand side by side and differ. Input that is not shaped like a configuration passes unchanged.
    """
    experiment = values.get("experiment")
    if not isinstance(experiment, dict):
        return values, {}, []
    experiment = dict(experiment)
    written: dict[str, str] = {}
    faults: list[Fault] = []
    _move_deploy(experiment, written, faults)
    _move_environment(experiment, written, faults)
    return {**values, "experiment": experiment}, written, faults


def _move_deploy(experiment: Tree, written: dict[str, str], faults: list[Fault]) -> None:
    if "deploy" not in experiment:
        return
    deploy, runner = experiment.pop("deploy"), experiment.get("runner")
    if deploy is None or not isinstance(runner, dict | None):
        return
    runner = dict(runner or {})
    if runner.get("deploy") not in (None, deploy):
        faults.append(Fault("experiment.deploy", "differs from experiment.runner.deploy, which means the same"))
    runner["deploy"] = deploy
    experiment["runner"] = runner
    written["experiment.runner.deploy"] = "experiment.deploy"


def _move_environment(experiment: Tree, written: dict[str, str], faults: list[Fault]) -> None:
    envs = experiment.get("envs")
    holders = [("experiment", experiment)]
    if isinstance(envs, dict):
        experiment["envs"] = envs = dict(envs)
        holders.append(("experiment.envs", envs))
    found: dict[str, tuple[str, Any]] = {}
    for prefix, holder in holders:
        for old, new in ENVIRONMENT_MAPS.items():
            if old not in holder:
                continue
            path, value = f"{prefix}.{old}", holder.pop(old)
            if value is None:
                continue
            if new in found and found[new][1] != value:
                faults.append(Fault(path, f"differs from {found[new][0]}, which means the same"))
            found[new] = (path, value)
    for new, (path, value) in found.items():
        written[f"experiment.{new}"] = path
        experiment[new] = {name: _strings(envs) for name, envs in value.items()} if isinstance(value, dict) else value
    if isinstance(envs, dict):
        experiment["envs"] = _strings(envs)


def _strings(envs: Any) -> Any:
    """Environment values as strings; null leaves a variable out, what is nested is left for the model to refuse."""
    if envs is None:
        return {}
    if not isinstance(envs, dict):
        return envs
    return {
        str(name): value if isinstance(value, dict | list) else str(value)
        for name, value in envs.items()
        if value is not None
    }
