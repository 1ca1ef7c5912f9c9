"""Why a run is being ended, as one small file that only the first can write: standard library, part of the archive."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Notice:
    """Why a run is being ended. `label` is the host that says so, empty for a person or a launcher."""

    label: str
    reason: str
    is_forced: bool = False

    @property
    def text(self) -> str:
        return f"ended because of {self.label}: {self.reason}" if self.label else self.reason


def write_notice(path: Path, notice: Notice) -> bool:
    """Returns whether it is the first; a forced one replaces an earlier one that is not, under its reason."""
    earlier = load_notice(path)
    if earlier is not None and (earlier.is_forced or not notice.is_forced):
        return False
    kept = earlier or notice
    row = {"label": kept.label, "reason": kept.reason, "is_forced": notice.is_forced, "time": time.time()}
    try:
        if earlier is None:
            with path.open("x") as file:
                file.write(json.dumps(row))
        else:
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.write_text(json.dumps(row))
            draft.replace(path)
    except OSError:
        return False
    return True


def load_notice(path: Path) -> Notice | None:
    try:
        row = json.loads(path.read_text())
        return Notice(str(row["label"]), str(row["reason"]), bool(row["is_forced"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
