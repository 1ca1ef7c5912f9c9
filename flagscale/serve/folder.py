"""The files of a service below its experiment folder, and what stands in them.

    <exp_dir>/serve/control.json       where its controller answers, with which token, and the key of its engines; 0600
    <exp_dir>/serve/state.json         the service as it is meant to be, and how many replicas of each model
    <exp_dir>/serve/<serve_id>-<n>/    the folder of the replica in seat n: runs/, serve_logs/

The runs in these folders are the truth about what lives: the state says only what should.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagscale.errors import RunError
from flagscale.runner.launch.folder import RunRef, find_current
from flagscale.runner.launch.record import load_records

STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Control:
    """How to speak to a controller, and the key that its engines ask for."""

    port: int
    token: str
    engine_key: str
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What a controller that starts anew goes on from.

    service: as `encode_service`; config: what it was planned from; wanted: replicas by model; was_ready: whether all
    of it has ever been
    """

    run_id: str
    version: int
    service: Mapping[str, Any]
    config: Mapping[str, Any]
    wanted: Mapping[str, int]
    was_ready: bool = False


def service_folder(exp_dir: Path) -> Path:
    return exp_dir / "serve"


def _write_private(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all, and for nobody else's eyes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            json.dump(values, file, indent=1)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(path.read_text())
        return values if isinstance(values, dict) else None
    return None


def save_control(exp_dir: Path, control: Control) -> None:
    _write_private(service_folder(exp_dir) / "control.json", asdict(control))


def find_control(exp_dir: Path) -> Control | None:
    """What the last controller wrote; whether it lives is for the caller to find out."""
    values = _read(service_folder(exp_dir) / "control.json")
    with contextlib.suppress(TypeError):
        return Control(**values) if values else None
    return None


def save_state(exp_dir: Path, state: ServiceState) -> None:
    _write_private(service_folder(exp_dir) / "state.json", {"format": STATE_VERSION, **asdict(state)})


def find_state(exp_dir: Path) -> ServiceState | None:
    values = _read(service_folder(exp_dir) / "state.json")
    if values is None or values.pop("format", None) != STATE_VERSION:
        return None
    with contextlib.suppress(TypeError, KeyError):
        return ServiceState(**values)
    return None


def list_replica_runs(exp_dir: Path) -> list[RunRef]:
    """The newest run in each replica's folder, whatever became of it."""
    folders = sorted(path.parent.parent for path in service_folder(exp_dir).glob("*/runs/current"))
    return [run for folder in folders if (run := find_current(folder))]


def is_run_alive(run: RunRef) -> bool:
    """Whether an agent of the run is known to work; a folder that is damaged has none."""
    try:
        return any(record.is_alive for record in load_records(run))
    except RunError:
        return False
