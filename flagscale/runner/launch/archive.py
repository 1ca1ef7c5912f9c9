"""The agent as one file that any Python 3.11 runs, wherever this package is not installed.

A zip archive of the files that the agent is made of, under their package names: readable files here, one file to carry
there, and a running job is untouched by a later change of the checkout. Every start compiles its few hundred lines
anew, some 30 ms. The errands of a launcher (`errands.py`) are carried the same way.
"""

import io
import zipfile
from pathlib import Path

AGENT = tuple(f"runner/launch/{name}.py" for name in ("agent", "journal", "peers", "procs"))
KEEPER = tuple(f"runner/launch/{name}.py" for name in ("keeper", "journal", "peers", "ports", "procs"))
ERRANDS = (
    "errors.py",
    "runner/config/hostfile.py",
    "runner/plan/job.py",
    *(f"runner/launch/{name}.py" for name in ("checks", "errands", "ports", "procs")),
)
_ROOT = Path(__file__).resolve().parents[2]
_MAINS = {AGENT: "agent", KEEPER: "keeper"}
_MAIN = "import sys\n\nfrom flagscale.runner.launch.{} import main\n\nsys.exit(main(sys.argv))\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def build_archive(files: tuple[str, ...] = AGENT) -> bytes:
    """Equal sources give equal bytes. `files` are paths below the package, whose own imports they must hold."""
    members = {"__main__.py": _MAIN.format(_MAINS[files])} if files in _MAINS else {}
    for file in files:
        folder = Path("flagscale", file).parent
        members |= {str(parent / "__init__.py"): "" for parent in (folder, *folder.parents) if parent.name}
    members |= {f"flagscale/{file}": (_ROOT / file).read_text() for file in files}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
