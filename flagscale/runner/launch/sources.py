"""The backend trees of a plan: whether they bear the patches that their chips need, and what is written down of them.

What a tree must bear follows from the patch sets of the launcher's installation (`patches.py`) and is handed along to
where the tree lies: a host that is asked over SSH has this file and what it imports, the standard library else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flagscale.errors import PatchError, UserError
from flagscale.patch.state import load_record, read_state
from flagscale.runner.plan.job import BackendTree, HostPlan, JobPlan


def list_trees(plan: JobPlan) -> tuple[BackendTree, ...]:
    """Every tree that a process of the plan imports, once."""
    trees = (process.tree for host in plan.hosts for process in host.processes if process.tree)
    return tuple(dict.fromkeys(trees))


def _find_fault(tree: BackendTree, expected: str) -> str | None:
    path = Path(tree.path)
    mend = f"`flagscale install --backend {tree.backend} --device {tree.chip}`"
    try:
        record = load_record(path)
    except PatchError as error:
        return f"{error}; make it anew with {mend.removesuffix('`')} --replace`"
    if record is None:
        what = "is not patched for it" if path.is_dir() else "is missing"
        return f"runs on {tree.chip}, and {path} {what}: {mend}"
    if record.patches != expected:
        return f"runs on {tree.chip}, and {path} has other patches than hardware/{tree.chip} says: {mend}"
    return None


def _find_faults(host: HostPlan, expected: Mapping[str, str]) -> Iterator[str]:
    """What the user's own `before_start` may bring is no fault."""
    for process in host.processes:
        tree = process.tree
        if tree is None or tree.path not in expected or (host.before_start and not Path(tree.path).is_dir()):
            continue
        if fault := _find_fault(tree, expected[tree.path]):
            yield f"{process.name} on {host.host.name}: {fault}"


def check_trees(plan: JobPlan, expected: Mapping[str, str]) -> None:
    """
    expected: as `patches.expect_patches` gives it

    Raises:
        UserError: a tree is missing or bears other patches than its chip needs; with the command that mends it.
    """
    faults = [fault for host in plan.hosts for fault in _find_faults(host, expected)]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))


# --- what a run remembers --------------------------------------------------------------------------------------------

SHOWN_DIGITS = 12
SHOWN_EDITS = 5

TreeState = dict[str, Any]
"""path, backend, chip, and the fields of `PatchState`: kind, series, digest, changed"""


def query_trees(plan: JobPlan) -> list[TreeState]:
    """What the plan's trees are on this machine, each with its patch state; a tree that cannot be read is `unknown`."""
    return [asdict(tree) | _query_tree(Path(tree.path)) for tree in list_trees(plan)]


def _query_tree(path: Path) -> TreeState:
    try:
        state = asdict(read_state(path))
    except (PatchError, OSError) as error:
        state = {"kind": "unknown", "series": (), "digest": "", "changed": (str(error),)}
    return state | {name: list(state[name]) for name in ("series", "changed")}


def describe_tree(state: TreeState) -> str:
    """`patched by Generic_CPU/Megatron-LM (f00ba4)`, `upstream's files, changed: a.py (edited)`, `not there`."""
    words = {"absent": "not there", "unknown": "of unknown origin"}
    text = words.get(state["kind"], "upstream's files")
    if state["series"]:
        text = f"patched by {', '.join(state['series'])} ({state['digest'][:SHOWN_DIGITS]})"
    edits = state["changed"]
    if not edits:
        return text
    more = f" and {len(edits) - SHOWN_EDITS} more" if len(edits) > SHOWN_EDITS else ""
    return f"{text}, changed: {', '.join(edits[:SHOWN_EDITS])}{more}"


def compare_trees(then: list[TreeState], now: list[TreeState]) -> tuple[str, ...]:
    """What is not as it was: a line for each tree, empty where all are."""
    before, after = ({row["path"]: row for row in rows} for rows in (then, now))
    differing = [
        path
        for path in {**before, **after}
        if not (path in before and path in after) or _identity(before[path]) != _identity(after[path])
    ]
    return tuple(
        f"{path}: was {describe_tree(before[path]) if path in before else 'not used'}, "
        f"is {describe_tree(after[path]) if path in after else 'not used'}"
        for path in differing
    )


def _identity(state: TreeState) -> tuple[Any, ...]:
    return state["kind"], tuple(state["series"]), state["digest"], tuple(state["changed"])
