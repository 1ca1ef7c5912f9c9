"""Finding runs by what people remember of them, and the list of all."""

import json
from pathlib import Path

from flagscale.errors import RunError, UnknownRunError, find_nearest
from flagscale.runner.launch.folder import RunRef, find_current, index_dir, is_run_id, load_ref
from flagscale.runner.plan.service import REPLICA_TASK


def _order(path: Path) -> tuple[str, int]:
    """By the second in the run id, then by when it was written: the digits behind the second are drawn."""
    try:
        written = path.stat().st_mtime_ns
    except OSError:
        written = 0
    return path.stem.partition("-")[0], written


def _list_pointers() -> dict[str, Path]:
    """Run id -> experiment folder, newest first."""
    found: dict[str, Path] = {}
    for path in sorted(index_dir().glob("*.json"), key=_order, reverse=True):
        try:
            found[path.stem] = Path(json.loads(path.read_text())["exp_dir"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # an entry that cannot be read costs only that entry
    return found


def list_runs() -> list[RunRef]:
    """Every run of the list whose folder is still there, newest first; a service's replicas are parts of its run."""
    runs: list[RunRef] = []
    for run_id, exp_dir in _list_pointers().items():
        try:
            runs.append(load_ref(exp_dir, run_id))
        except RunError:
            continue  # the user deleted the experiment folder
    return [run for run in runs if run.task != REPLICA_TASK]


def load_run(ref: str | Path | None = None) -> RunRef:
    """The run that `ref` means: a run id, an experiment folder (its newest run), a run's own folder, or the beginning
    of one run id; None means the newest run.

    Raises:
        UnknownRunError: there is none, or several begin so.
    """
    if ref is None:
        return _load_newest()
    pointers = _list_pointers()
    text = str(ref)
    if text in pointers:
        return load_ref(pointers[text], text)
    if Path(text).is_dir():
        return _load_from_folder(Path(text).resolve())
    matches = [run_id for run_id in pointers if text and run_id.startswith(text)]
    if len(matches) == 1:
        return load_ref(pointers[matches[0]], matches[0])
    if matches:
        some = ", ".join(matches[:5]) + (", …" if len(matches) > 5 else "")
        raise UnknownRunError(f"{len(matches)} runs begin with `{text}`: {some}; give more of the id")
    near = find_nearest(text, pointers)
    hint = f"; did you mean `{near}`?" if near else "; `flagscale list` shows all"
    raise UnknownRunError(f"no run `{text}`: expected a run id, the beginning of one, or an experiment folder{hint}")


def _load_newest() -> RunRef:
    runs = list_runs()
    if not runs:
        raise UnknownRunError(f"no run is listed in {index_dir()}; start one with `flagscale train <model>`")
    return runs[0]


def _load_from_folder(folder: Path) -> RunRef:
    if (folder / "job.json").is_file() and is_run_id(folder.name):
        return load_ref(folder.parent.parent, folder.name)
    run = find_current(folder)
    if run is None:
        raise UnknownRunError(
            f"no run in {folder}; expected an experiment folder (which holds `runs/`) or a run's folder"
        )
    return run
