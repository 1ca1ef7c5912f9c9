"""The agent as one file that any Python 3.11 runs, wherever this package is not installed.

A zip archive of the three files that the agent is made of, under their package names: readable files here, one file
to carry there, and a running job is untouched by a later change of the checkout. Every start compiles its few hundred
lines anew, some 30 ms.
"""

import io
import zipfile
from pathlib import Path

MODULES = ("agent", "journal", "procs")
PACKAGE = ("flagscale", "runner", "launch")
_MAIN = "import sys\n\nfrom flagscale.runner.launch.agent import main\n\nsys.exit(main(sys.argv))\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def build_archive() -> bytes:
    """Equal sources give equal bytes."""
    members = {"__main__.py": _MAIN}
    for depth in range(1, len(PACKAGE) + 1):
        members["/".join((*PACKAGE[:depth], "__init__.py"))] = ""
    for module in MODULES:
        members["/".join((*PACKAGE, f"{module}.py"))] = (Path(__file__).parent / f"{module}.py").read_text()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
