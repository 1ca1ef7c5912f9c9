"""Secrets: values that reach a job's processes and stand nowhere else.

`experiment.secrets` names environment variables. A secret's value comes from the launcher's environment, either under
its own name or by `${oc.env:NAME}` under another name in `experiment.envs`. Anywhere else it would end on a command
line, in a script or in a dump, so there it is a fault.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from flagscale.errors import Fault

MASK = "***"
SHORTEST_SEARCHED = 6
"""a shorter secret is only looked for as a whole value: as a part of one it would be found everywhere"""

_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)\s*(?:,\s*(?:null|''|\"\")\s*)?\}")
_READ = re.compile(r"oc\.env\s*:\s*([A-Za-z_]\w*)")
_ENVIRONMENT_MAPS = (
    ("experiment", "envs"),
    ("experiment", "node_specific", "*"),
    ("experiment", "device_type_specific", "*"),
)

EXPECTED = "secrets only under `experiment.envs`"


def find_secrets(
    values: Mapping[str, Any], environment: Mapping[str, str]
) -> tuple[dict[str, str], frozenset[str], list[Fault]]:
    """Which variables of the job are secret.

    values: the resolved tree; environment: dotted path -> raw text, for values that read `${oc.env:..}`
    Returns (name in the job -> name in the launcher's environment, the secret values seen, faults).
    """
    names = _listed(values)
    if not names:
        return {}, frozenset(), []
    sources = {name: name for name in names}
    hidden: set[str] = set()
    faults: list[Fault] = []
    entries = {path: (name, value) for path, name, value in _environment_entries(values)}
    # one that is null stands no longer among the values, and is a secret of that source all the same
    left_out = {path: (path.rpartition(".")[2], None) for path in environment if _is_environment(path)}
    for path, (name, value) in (left_out | entries).items():
        raw = environment.get(path, "")
        whole = _FROM_ENVIRONMENT.fullmatch(raw)
        if whole and (name in names or whole[1] in names):
            if sources.get(name, name) not in (name, whole[1]):
                faults.append(Fault(path, f"reads ${whole[1]}, but elsewhere `{name}` is read from ${sources[name]}"))
            sources[name] = whole[1]
        elif name in names or set(_READ.findall(raw)) & names:
            faults.append(Fault(path, "holds a secret in the open", expected=f"`${{oc.env:{name}}}` and nothing else"))
        else:
            continue
        hidden |= _texts(value)
    leaves = list(_leaves(values, ""))
    read_at = {path for path, raw in environment.items() if set(_READ.findall(raw)) & names}
    for path, value in leaves:
        if path in read_at:
            hidden |= _texts(value)
    faults += [
        Fault(path, "holds the value of a secret, which would stand on a command line or in a file", expected=EXPECTED)
        for path, value in leaves
        if not _is_environment(path) and is_secret(value, hidden)
    ]
    return sources, frozenset(hidden), faults


def _listed(values: Mapping[str, Any]) -> set[str]:
    """The names under `experiment.secrets`, also of a list that is malformed: hiding too much does no harm."""
    experiment = values.get("experiment")
    listed = experiment.get("secrets") if isinstance(experiment, Mapping) else None
    rows = listed if isinstance(listed, list) else [listed]
    return {name for name in rows if isinstance(name, str)}


def _texts(value: Any) -> set[str]:
    return {str(leaf) for _, leaf in _leaves(value, "") if leaf not in (None, "")}


def is_secret(value: Any, hidden: Iterable[str]) -> bool:
    if value is None or isinstance(value, bool):
        return False
    text = str(value)
    return any(text == secret or (len(secret) >= SHORTEST_SEARCHED and secret in text) for secret in hidden)


def mask_secrets(node: Any, hidden: frozenset[str]) -> Any:
    """The same tree with `***` for every value that holds a secret."""
    if isinstance(node, Mapping):
        return {key: mask_secrets(value, hidden) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [mask_secrets(value, hidden) for value in node]
    return MASK if is_secret(node, hidden) else node


def mask_text(text: str, hidden: Iterable[str]) -> str:
    """The text with `***` in place of every secret in it, the longest first."""
    for secret in sorted(hidden, key=lambda secret: (-len(secret), secret)):
        text = text.replace(secret, MASK)
    return text


def mask_fault(fault: Fault, hidden: Iterable[str]) -> Fault:
    def masked(text: str | None) -> str | None:
        return mask_text(text, hidden) if text else text

    return replace(
        fault,
        message=mask_text(fault.message, hidden),
        expected=masked(fault.expected),
        suggestion=masked(fault.suggestion),
        where=masked(fault.where),
    )


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
