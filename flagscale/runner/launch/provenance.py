"""What a run was made from: the commit of the checkout, and the versions on the machine that launched it."""

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

GIT_LIMIT_S = 2.0
VERSIONS_OF = ("flagscale", "torch", "megatron-core", "vllm", "sglang", "ray", "hydra-core", "numpy")


def _run_git(cwd: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args],
            cwd=cwd,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=GIT_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def query_git(cwd: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a checkout, or where git takes too long."""
    commit = _run_git(cwd, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _run_git(cwd, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "is_dirty": None if changes is None else bool(changes)}


def query_environment() -> dict[str, Any]:
    """What else a later reader needs to know of the machine and the software."""
    import importlib.metadata
    import platform

    versions: dict[str, str] = {}
    for name in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "hostname": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "num_cpus": os.cpu_count(),
        "versions": versions,
    }
