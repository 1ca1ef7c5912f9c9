"""Secrets: values that reach a job's processes and stand nowhere else.

`experiment.secrets` names environment variables. A secret's value comes from the launcher's environment, either under
its own name or by `${oc.env:NAME}` under another name in `experiment.envs`. Anywhere else it would end on a command
line, in a script or in a dump, so there it is a fault.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flagscale.errors import Fault

MASK = "***"
SHORTEST_SEARCHED = 6
"""a shorter secret is only looked for as a whole value: as a part of one it would be found everywhere"""

_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)\s*(?:,.*)?\}")
_ENVIRONMENT_MAPS = (
    ("experiment", "envs"),
    ("experiment", "node_specific", "*"),
    ("experiment", "device_type_specific", "*"),
)


def find_secrets(
    values: Mapping[str, Any], environment: Mapping[str, str]
) -> tuple[dict[str, str], frozenset[str], list[Fault]]:
    """Which variables of the job are secret.

    values: the resolved tree; environment: dotted path -> raw text, for values that read `${oc.env:..}`
    Returns (name in the job -> name in the launcher's environment, the secret values seen, faults).
    """
    experiment = values.get("experiment")
    listed = experiment.get("secrets") if isinstance(experiment, Mapping) else None
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if not names:
        return {}, frozenset(), []
    sources = {name: name for name in names}
    hidden: set[str] = set()
    faults: list[Fault] = []
    for path, name, value in _environment_entries(values):
        raw = environment.get(path, "")
        whole = _FROM_ENVIRONMENT.fullmatch(raw)
        read = set(re.findall(r"oc\.env\s*:\s*([A-Za-z_]\w*)", raw))
        if whole and (name in names or whole[1] in names):
            sources[name] = whole[1]
            hidden.add(str(value))
        elif name in names or read & set(names):
            faults.append(Fault(path, "holds a secret in the open", expected=f"`${{oc.env:{name}}}` and nothing else"))
            hidden.add(str(value))
    for path, raw in environment.items():
        if set(re.findall(r"oc\.env\s*:\s*([A-Za-z_]\w*)", raw)) & set(names):
            hidden.add(str(_select(values, path)))
    hidden.discard("")
    faults += [
        Fault(path, "holds the value of a secret, which would stand on a command line or in a file", expected=EXPECTED)
        for path, value in _leaves(values, "")
        if not _is_environment(path) and is_secret(value, hidden)
    ]
    return sources, frozenset(hidden), faults


EXPECTED = "secrets only under `experiment.envs`"


def is_secret(value: Any, hidden: frozenset[str] | set[str]) -> bool:
    text = str(value)
    return text in hidden or any(len(secret) >= SHORTEST_SEARCHED and secret in text for secret in hidden)


def mask_secrets(node: Any, hidden: frozenset[str]) -> Any:
    """The same tree with `***` for every value that holds a secret."""
    if isinstance(node, Mapping):
        return {key: mask_secrets(value, hidden) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [mask_secrets(value, hidden) for value in node]
    return MASK if isinstance(node, str) and is_secret(node, hidden) else node


def _environment_entries(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for keys in _ENVIRONMENT_MAPS:
        yield from _entries(values, keys, "")


def _entries(node: Any, keys: tuple[str, ...], path: str) -> Iterator[tuple[str, str, Any]]:
    if not isinstance(node, Mapping):
        return
    if not keys:
        yield from ((f"{path}.{name}", str(name), value) for name, value in node.items())
        return
    for key in [keys[0]] if keys[0] != "*" else list(node):
        if key in node:
            yield from _entries(node[key], keys[1:], f"{path}.{key}" if path else str(key))


def _is_environment(path: str) -> bool:
    return path.startswith(("experiment.envs.", "experiment.node_specific.", "experiment.device_type_specific."))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, node


def _select(node: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, list):
            node = node[int(key)]
    return node
