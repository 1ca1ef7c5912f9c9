"""The agent as one file that any Python 3.11 runs, wherever this package is not installed.

A zip archive of the files that the agent is made of, under their package names: readable files here, one file to carry
there, and a running job is untouched by a later change of the checkout. Each stands there as bytecode too, which the
same Python reads and any other passes over: compiling would be half of what a start costs. The errands of a launcher
(`errands.py`) are carried the same way.
"""

import functools
import importlib.util
import io
import marshal
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path

AGENT = tuple(
    f"runner/launch/{name}.py"
    for name in ("agent", "journal", "network", "notice", "peers", "place", "procs", "stacks", "watch", "wire")
)
KEEPER = tuple(f"runner/launch/{name}.py" for name in ("keeper", "journal", "network", "place", "ports", "procs"))
_OF_LAUNCH = ("capacity", "checks", "errands", "files", "ports", "sources")
ERRANDS = (
    *AGENT,
    "errors.py",
    *(f"chips/{name}.py" for name in ("__init__", "ids", "parsers", "probe", "records")),
    *(f"patch/{name}.py" for name in ("state", "tree", "upstream")),
    "runner/config/hostfile.py",
    "runner/plan/job.py",
    *(f"runner/launch/{name}.py" for name in _OF_LAUNCH),
)
SURVEY = (
    *ERRANDS,
    "runner/launch/survey.py",
)
"""what `flagscale check` sends along"""
LIGHT = ("runner/launch/light.py", "dataclasses.py")
"""what is carried in place of a module of the standard library, and as which"""
RAY_ERRANDS = (*ERRANDS, *(f"runner/launch/{name}.py" for name in ("ray_errands", "ray_place")))
_ROOT = Path(__file__).resolve().parents[2]
_MAINS = {AGENT: "agent", KEEPER: "keeper"}
_MAIN = """\
import gc, sys

gc.disable()
from flagscale.runner.launch.{} import main

gc.enable()
sys.exit(main(sys.argv))
"""
_UNCHECKED = 0b01
_EPOCH = (1980, 1, 1, 0, 0, 0)


@functools.cache
def build_archive(files: tuple[str, ...] = AGENT) -> bytes:
    """Equal sources give equal bytes. `files` are paths below the package, whose own imports they must hold."""
    members: dict[str, bytes] = {"__main__.py": _MAIN.format(_MAINS[files]).encode()} if files in _MAINS else {}
    for file in files:
        folder = Path("flagscale", file).parent
        members |= {str(parent / "__init__.py"): b"" for parent in (folder, *folder.parents) if parent.name}
    for file in files:
        members |= _carry(_ROOT / file, f"flagscale/{file}")
    if files != RAY_ERRANDS:  # Ray needs the whole of it
        members |= _carry(_ROOT / LIGHT[0], LIGHT[1])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _carry(path: Path, name: str) -> dict[str, bytes]:
    return {name: path.read_bytes(), f"{name}c": _compile(path)}


def _compile(path: Path) -> bytes:
    """What Python itself keeps of a module, as a file that is valid whatever the times of files (PEP 552)."""
    loader = SourceFileLoader(path.stem, str(path))
    header = importlib.util.MAGIC_NUMBER + _UNCHECKED.to_bytes(4, "little") + bytes(8)
    return header + marshal.dumps(loader.get_code(path.stem))
