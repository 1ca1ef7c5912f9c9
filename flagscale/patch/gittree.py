"""A fetched tree as a git repository whose first commit is the untouched upstream.

So a vendor works on it as on any clone: `git diff` shows the edits, three-way merges have a base, history can be laid
over it. Author, date and message come from the pin, and the user's git settings are left aside: the same pin gives the
same commit everywhere, so two hosts compare sources by one word.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from flagscale.errors import SourceError
from flagscale.patch.index import without_login

BRANCH = "upstream"
AUTHOR = "upstream"
DATE = "2000-01-01T00:00:00+00:00"
SETTINGS = (
    "core.autocrlf=false",
    "core.fileMode=true",
    "core.hooksPath=/dev/null",
    "gc.auto=0",
    "commit.gpgSign=false",
)
COMMIT_DIGITS = 40
PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE")
BYTE_FOR_BYTE = "* -text -ident !filter !working-tree-encoding\n"
"""Beats every .gitattributes of the tree: what is committed is what was published."""


def find_git() -> str:
    """
    Raises:
        SourceError: git is not installed.
    """
    git = shutil.which("git")
    if git is None:
        raise SourceError("a fetched source is kept as a git tree, and there is no git on the PATH (`apt install git`)")
    return git


def _run(tree: Path, *words: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    for role in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{role}_NAME": AUTHOR, f"GIT_{role}_EMAIL": "", f"GIT_{role}_DATE": DATE}
    settings = [word for setting in SETTINGS for word in ("-c", setting)]
    command = [find_git(), *settings, *words]
    ran = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SourceError(f"git {words[0]} failed in {tree}: {ran.stderr.strip() or ran.stdout.strip()}")
    return ran.stdout.strip()


def archive_commit(repository: str, commit: str, tag: str | None, dst: Path) -> None:
    """Fetch one commit, without its history, and write its files as they are into the tar archive `dst`.

    The fetch has the user's git settings (proxy, credentials, keys) and asks nothing. That the files are the commit's
    is checked by git, which names a commit by the hash of all that is in it.

    repository: an address, or a folder
    commit: all 40 digits; or its beginning, for the commit that `tag` names

    Raises:
        SourceError: the repository cannot be reached, or does not have this commit.
    """
    shown = without_login(repository)
    whole = len(commit) == COMMIT_DIGITS
    if not whole and tag is None:
        raise SourceError(f"the pin gives only the beginning of a commit, {commit}, and no tag to find it by")
    place = str(Path(repository).resolve()) if Path(repository).exists() else repository
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=".build-") as name:
        repo = Path(name)
        _run(repo, "init", "--quiet", "--bare", "--template=")
        (repo / "info").mkdir(exist_ok=True)
        (repo / "info" / "attributes").write_text(f"{BYTE_FOR_BYTE.rstrip()} -export-subst -export-ignore\n")
        words = ["fetch", "--quiet", "--depth=1", "--no-tags", "--", place, commit if whole else f"refs/tags/{tag}"]
        env = {key: value for key, value in os.environ.items() if key not in PLACES} | {"GIT_TERMINAL_PROMPT": "0"}
        ran = subprocess.run([find_git(), *words], cwd=repo, env=env, capture_output=True, text=True, check=False)
        if ran.returncode:
            said = without_login((ran.stderr.strip().splitlines() or ["git said nothing"])[-1])
            raise SourceError(f"{shown}: commit {commit} cannot be had from it: {said}")
        found = _run(repo, "rev-parse", "FETCH_HEAD^{commit}")
        if not found.startswith(commit):
            raise SourceError(f"{shown}: {tag} is commit {found} there, and the pin says {commit}; nothing was changed")
        _run(repo, "archive", "--format=tar", "--prefix=upstream/", f"--output={dst}", found)


def commit_upstream(tree: Path, message: str, ignored: Iterable[str]) -> str:
    """Make `tree` a git repository with one commit of all that is in it, and return the commit.

    ignored: patterns of what is put into the tree beside the source

    Raises:
        SourceError: git is not installed, or refused.
    """
    _run(tree, "init", "--quiet", "--template=", f"--initial-branch={BRANCH}")
    info = tree / ".git" / "info"
    info.mkdir(exist_ok=True)
    (info / "attributes").write_text(BYTE_FOR_BYTE)
    _run(tree, "add", "--all", "--force")
    _run(tree, "commit", "--quiet", "--allow-empty-message", "-m", message)
    _run(tree, "repack", "-a", "-d", "-q")
    (info / "exclude").write_text("".join(f"{pattern}\n" for pattern in ignored))
    return _run(tree, "rev-parse", "HEAD")
