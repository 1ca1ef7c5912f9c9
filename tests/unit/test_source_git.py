"""A source from a repository of git: the pinned commit, its bytes, and nothing else."""

import subprocess
from pathlib import Path

import pytest

from flagscale.cli import source as verb
from flagscale.errors import SourceError
from flagscale.patch.pins import Pin
from flagscale.patch.source import fetch_source, source_status

FILES = {"toy/__init__.py": b"", "toy/core.py": b"ANSWER = 42\n", "docs/readme.txt": b"not on the path\n"}


def make_pin(commit: str | None, tag: str | None = "v1.0", repository: str = "", top: str = "") -> Pin:
    return Pin("Toy", "toy", repository, tag, "toy", "1.0", "toy-1.0.tar.gz", "", 0, 0, top, ("toy",), commit)


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A bare repository; its tag v1.0 is the pinned commit, and its branch goes on."""
    work = tmp_path / "work"
    work.mkdir()
    for name, content in {**FILES, ".gitattributes": b"* text eol=crlf export-subst\n*.txt export-ignore\n"}.items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(content)
    (work / "toy" / "version.py").write_bytes(b"'$Format:%H$'\r\nx = 1\n")
    git(work, "init", "--quiet")
    (work / ".git" / "info" / "attributes").write_text("* -text\n")
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "-m", "first")
    git(work, "tag", "v1.0")
    (work / "toy" / "core.py").write_bytes(b"ANSWER = 43\n")
    git(work, "commit", "--quiet", "-am", "second")
    git(tmp_path, "clone", "--quiet", "--bare", str(work), "toy.git")
    return tmp_path / "toy.git"


def test_a_pinned_commit_comes_from_git_byte_for_byte(upstream: Path, tmp_path: Path) -> None:
    commit = git(upstream, "rev-parse", "v1.0").strip()
    sources = []
    for number, wanted in enumerate((commit, commit[:9])):
        pin = make_pin(commit=wanted, top="toy-1.0/elsewhere")
        dest = fetch_source(pin, tmp_path / str(number) / "src", repository=str(upstream))
        assert (dest / "toy" / "core.py").read_bytes() == FILES["toy/core.py"]
        assert (dest / "toy" / "version.py").read_bytes() == b"'$Format:%H$'\r\nx = 1\n"
        assert not (dest / "docs").exists()
        assert source_status(pin, dest).state == "ready"
        assert sorted(path.name for path in dest.parent.iterdir()) == [".fetch.lock", "src"]
        sources.append(source_status(pin, dest).commit)
    assert len(set(sources)) == 1


@pytest.mark.parametrize(
    ("commit", "tag", "message"),
    [
        ("0" * 40, "v1.0", "commit 0000000000000000000000000000000000000000 cannot be had from it"),
        ("0" * 9, "v1.0", "v1.0 is commit [0-9a-f]{40} there, and the pin says 000000000"),
        ("0" * 9, "v2.0", "couldn't find remote ref refs/tags/v2.0"),
        ("0" * 9, None, "only the beginning of a commit"),
        (None, "v1.0", "does not say which commit 1.0 is"),
    ],
)
def test_another_commit_than_the_pinned_one_is_refused(
    upstream: Path, tmp_path: Path, commit: str | None, tag: str | None, message: str
) -> None:
    pin = make_pin(commit=commit, tag=tag)
    with pytest.raises(SourceError, match=message):
        fetch_source(pin, tmp_path / "new" / "src", repository=str(upstream))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".fetch.lock"]


def test_a_repository_that_is_not_there_is_told_without_its_password(tmp_path: Path) -> None:
    pin = make_pin(commit="1" * 40)
    with pytest.raises(SourceError, match=r"http://127\.0\.0\.1:1/toy: commit 1+ cannot be had") as caught:
        fetch_source(pin, tmp_path / "new" / "src", repository="http://me:secret@127.0.0.1:1/toy")
    assert "secret" not in str(caught.value)


def test_the_verb_takes_the_repository_of_the_pin_or_another(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = git(upstream, "rev-parse", "v1.0").strip()
    pin = make_pin(commit=commit, repository=str(tmp_path / "nowhere.git"))
    monkeypatch.setattr("flagscale.patch.pins.find_pin", lambda *_: pin)
    monkeypatch.setattr("flagscale.cli.source.find_chips", lambda *_: ())
    monkeypatch.setenv("FLAGSCALE_SOURCE_DIR", str(tmp_path / "fetched"))
    with pytest.raises(SourceError, match=r"nowhere\.git"):
        verb.main(["fetch", "toy", "--from-git"])
    assert verb.main(["fetch", "toy", "--from-git", str(upstream)]) == 0
    assert f"commit {commit} of {upstream}" in capsys.readouterr().err
