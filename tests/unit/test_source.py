"""Fetching a pinned source: from folders and indexes, checked, atomic, and honest about what lies there."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.cli import source as verb
from flagscale.errors import SourceError, UserError
from flagscale.patch.extension import Extension, build_extension, find_compiler, take_prebuilt
from flagscale.patch.index import DEFAULT_INDEX, parse_links, parse_pip_config, without_login
from flagscale.patch.pins import Pin, find_pin, load_pin, load_pins
from flagscale.patch.source import MANIFEST, fetch_source, source_status

ROOT = Path(__file__).resolve().parents[2]
FILES = {"toy/__init__.py": b"", "toy/core.py": b"ANSWER = 42\n", "docs/readme.txt": b"not on the path\n"}


def make_archive(path: Path, files: dict[str, bytes] = FILES) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"toy-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def make_pin(archive: Path, **changes: object) -> Pin:
    content = archive.read_bytes()
    fields = {
        "name": "Toy",
        "backend": "toy",
        "repository": "https://example.org/toy",
        "tag": "v1.0",
        "project": "toy",
        "version": "1.0",
        "archive": archive.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "unpack": ("toy",),
    }
    return Pin(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives that is all that pip knows."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    make_archive(folder / "toy-1.0.tar.gz")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_fetch_brings_the_named_folders_and_a_second_one_is_free(shelf: Path, tmp_path: Path) -> None:
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "third_party" / "Toy" / "src"
    steps: list[tuple[str, int, int]] = []
    assert source_status(pin, dest).state == "absent"
    assert fetch_source(pin, dest, lambda *step: steps.append(step)) == dest
    assert sorted(path.name for path in dest.iterdir()) == [MANIFEST, ".git", "toy"]
    assert sorted(path.name for path in (dest / "toy").iterdir()) == ["__init__.py", "core.py"]
    assert {name for name, _done, _total in steps} == {"download", "unpack", "commit", "build"}
    assert all(done <= total for _name, done, total in steps)
    (shelf / "toy-1.0.tar.gz").unlink()
    steps.clear()
    fetch_source(pin, dest, lambda *step: steps.append(step))
    assert not steps
    assert source_status(pin, dest).state == "ready"


def test_the_archive_is_kept_so_that_a_lost_tree_needs_no_network(shelf: Path, tmp_path: Path) -> None:
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "Toy" / "src"
    fetch_source(pin, dest)
    (shelf / "toy-1.0.tar.gz").unlink()
    dest.rename(tmp_path / "lost")
    fetch_source(pin, dest)
    assert source_status(pin, dest).state == "ready"


def test_every_kind_of_drift_is_named_and_kept_until_told_otherwise(shelf: Path, tmp_path: Path) -> None:
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "Toy" / "src"
    fetch_source(pin, dest)
    (dest / "toy" / "core.py").write_text("ANSWER = 43\n")
    (dest / "toy" / "__init__.py").unlink()
    (dest / "toy" / "new.py").touch()
    (dest / "toy" / "__pycache__").mkdir()
    (dest / "toy" / "__pycache__" / "core.cpython-311.pyc").touch()
    status = source_status(pin, dest)
    assert status.state == "drifted"
    assert status.changed == ("toy/__init__.py (missing)", "toy/core.py (edited)", "toy/new.py (added)")
    with pytest.raises(SourceError, match=r"core\.py \(edited\)(.|\n)*--replace"):
        fetch_source(pin, dest)
    assert (dest / "toy" / "core.py").read_text() == "ANSWER = 43\n"
    fetch_source(pin, dest, replace=True)
    assert source_status(pin, dest).state == "ready"


def test_a_tree_that_somebody_else_put_there_is_not_ours_to_replace(shelf: Path, tmp_path: Path) -> None:
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "Toy" / "src"
    (dest / "toy").mkdir(parents=True)
    assert source_status(pin, dest).state == "drifted"
    with pytest.raises(SourceError, match="not fetched by this toolkit"):
        fetch_source(pin, dest)


def test_a_new_pin_replaces_an_untouched_tree(shelf: Path, tmp_path: Path) -> None:
    dest = tmp_path / "Toy" / "src"
    fetch_source(make_pin(shelf / "toy-1.0.tar.gz"), dest)
    make_archive(shelf / "toy-1.0.tar.gz", FILES | {"toy/core.py": b"ANSWER = 44\n"})
    newer = make_pin(shelf / "toy-1.0.tar.gz", tag="v1.1")
    status = source_status(newer, dest)
    assert (status.state, status.other_pin, status.changed) == ("drifted", True, ())
    fetch_source(newer, dest)
    assert (dest / "toy" / "core.py").read_bytes() == b"ANSWER = 44\n"


def test_an_archive_of_another_hash_is_refused_and_leaves_nothing(shelf: Path, tmp_path: Path) -> None:
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz", sha256="0" * 64), tmp_path / "Toy" / "src"
    with pytest.raises(SourceError, match=f"not the pinned one: its SHA-256 is [0-9a-f]+ .* expected {'0' * 64}"):
        fetch_source(pin, dest)
    assert [path.name for path in dest.parent.iterdir()] == [".fetch.lock"]


@pytest.mark.parametrize("name", ["../../evil.py", "toy/../../../evil.py"])
def test_an_archive_cannot_write_outside_its_folder(shelf: Path, tmp_path: Path, name: str) -> None:
    make_archive(shelf / "toy-1.0.tar.gz", {name: b"evil"})
    with pytest.raises(SourceError, match=r"toy-1\.0\.tar\.gz (holds none|cannot be unpacked)"):
        fetch_source(make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "deep" / "er" / "Toy" / "src")
    assert not list(tmp_path.rglob("evil.py"))


CUT_OFF = """
import json, os, sys
from pathlib import Path
from flagscale.patch.pins import Pin
from flagscale.patch.source import fetch_source

def progress(step, done, total):
    if step == sys.argv[1]:
        os._exit(9)

pin = Pin(**{**json.loads(sys.argv[2]), "unpack": ("toy",), "extensions": ()})
fetch_source(pin, Path(sys.argv[3]), progress)
"""


def fetch_elsewhere(pin: Pin, dest: Path, until: str) -> "subprocess.Popen[bytes]":
    fields = {name: getattr(pin, name) for name in pin.__slots__}  # type: ignore[attr-defined]
    words = [sys.executable, "-c", CUT_OFF, until, json.dumps(fields), str(dest)]
    return subprocess.Popen(words, cwd=ROOT)


@pytest.mark.parametrize("step", ["download", "unpack", "commit", "build"])
def test_a_fetch_that_is_cut_off_leaves_nothing_that_counts(shelf: Path, tmp_path: Path, step: str) -> None:
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "Toy" / "src"
    assert fetch_elsewhere(pin, dest, step).wait() == 9
    assert source_status(pin, dest).state == "absent"
    fetch_source(pin, dest)
    assert source_status(pin, dest).state == "ready"
    assert sorted(path.name for path in dest.parent.iterdir()) == [".fetch.lock", "src", "toy-1.0.tar.gz"]


def test_two_fetches_at_once_both_end_well(shelf: Path, tmp_path: Path) -> None:
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "Toy" / "src"
    both = [fetch_elsewhere(pin, dest, "never") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert source_status(pin, dest).state == "ready"


class _Index(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An index over HTTP: (its address, the folder it serves)."""
    folder = tmp_path / "index"
    (folder / "simple" / "toy").mkdir(parents=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Index(*args, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/simple", folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["html", "json"])
def test_the_index_that_pip_is_set_up_with_is_asked(
    shelf: Path, index: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    address, folder = index
    pin = make_pin(shelf / "toy-1.0.tar.gz")
    (shelf / "toy-1.0.tar.gz").rename(folder / "toy-1.0.tar.gz")
    row = {"filename": "toy-1.0.tar.gz", "url": "../../toy-1.0.tar.gz", "hashes": {}}
    page = json.dumps({"files": [row]}) if kind == "json" else '<a href="../../toy-1.0.tar.gz#sha256=0">toy</a>'
    (folder / "simple" / "toy" / "index.html").write_text(page)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    fetch_source(pin, tmp_path / "Toy" / "src")
    assert source_status(pin, tmp_path / "Toy" / "src").state == "ready"


def test_where_nobody_has_it_every_place_is_named_without_its_login(
    shelf: Path, index: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = make_pin(shelf / "toy-1.0.tar.gz")
    (shelf / "toy-1.0.tar.gz").unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", index[0].replace("//", "//me:secret@").replace("/simple", "/nowhere"))
    with pytest.raises(SourceError) as caught:
        fetch_source(pin, tmp_path / "Toy" / "src")
    message = str(caught.value)
    assert f"{shelf}: does not list it" in message
    assert "127.0.0.1" in message
    assert "secret" not in message
    assert f"put that file into {tmp_path / 'Toy'}" in message


def test_pip_settings_are_read_in_pip_order() -> None:
    listing = "\n".join(
        [
            "global.index-url='https://global/simple'",
            "download.index-url='https://download/simple'",
            ":env:.extra-index-url='https://a/simple https://b/simple'",
            r"global.find-links='/one\n/two'",
            "global.cert='/ca.pem'",
            "install.proxy='http://not-ours'",
        ]
    )
    settings = parse_pip_config(listing)
    assert settings.indexes == ("https://download/simple", "https://a/simple", "https://b/simple")
    assert (settings.find_links, settings.cert, settings.proxy) == (("/one", "/two"), "/ca.pem", None)
    assert parse_pip_config("").indexes == (DEFAULT_INDEX,)
    assert parse_pip_config(":env:.no-index='1'\n:env:.extra-index-url='https://a'").indexes == ()


def test_links_are_found_in_any_dress() -> None:
    page = (
        "<A class=x HREF='a%2Bb-1.tar.gz#sha256=1'>x</A><a data-y=1 href=\"https://f/c.whl?x=1&amp;y=2\">y</a><a>z</a>"
    )
    assert parse_links(page, "https://i/toy/") == [
        ("a+b-1.tar.gz", "https://i/toy/a%2Bb-1.tar.gz"),
        ("c.whl?x=1&y=2", "https://f/c.whl?x=1&y=2"),
    ]


@given(st.from_regex(r"[a-z0-9:]{1,20}", fullmatch=True), st.from_regex(r"[a-z.]{1,9}", fullmatch=True))
def test_a_shown_address_never_bears_a_login(login: str, host: str) -> None:
    assert (
        without_login(f"see https://{login}@{host}/x and https://{host}/y@z")
        == f"see https://{host}/x and https://{host}/y@z"
    )


SOURCE = textwrap.dedent(
    """
    #include <pybind11/pybind11.h>
    PYBIND11_MODULE(fast, m) { m.def("twice", [](int x) { return 2 * x; }); }
    """
)
FAST = Extension("toy.fast", ("toy/fast.cpp",))


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_a_module_is_built_where_it_is_missing_and_only_there(shelf: Path, tmp_path: Path) -> None:
    make_archive(shelf / "toy-1.0.tar.gz", FILES | {"toy/fast.cpp": SOURCE.encode()})
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz", extensions=(FAST,)), tmp_path / "Toy" / "src"
    fetch_source(pin, dest)
    twice = [sys.executable, "-c", "import toy.fast; print(toy.fast.twice(21))"]
    ran = subprocess.run(twice, env={"PYTHONPATH": str(dest)}, capture_output=True, text=True, check=True)
    assert ran.stdout == "42\n"
    assert source_status(pin, dest).state == "ready"
    (dest / FAST.built_path).write_bytes(b"not this")
    assert source_status(pin, dest).changed == (f"{FAST.built_path} (not built)",)
    steps: list[str] = []
    fetch_source(pin, dest, lambda step, *_counts: steps.append(step))
    assert set(steps) == {"build"}
    assert source_status(pin, dest).state == "ready"


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_what_the_compiler_says_is_told(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "fast.cpp").write_text("int main( {")
    with pytest.raises(SourceError, match=r"could not build toy\.fast: .*fast\.cpp.*error"):
        build_extension(FAST, tmp_path, "toy")
    assert not list((tmp_path / "toy").glob("*.so"))


def test_without_a_compiler_the_message_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SourceError, match=r"toy\.fast has to be built.*apt install g\+\+"):
        build_extension(FAST, tmp_path, "toy")


def test_a_prebuilt_module_is_taken_only_if_its_sources_are_ours(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "fast.cpp").write_text(SOURCE)
    wheel, built = tmp_path / "toy.whl", tmp_path / "built.so"
    for source, module, message in (
        ("other", FAST.built_path, "made from another"),
        (SOURCE, "toy/fast.wrong.so", "has no toy/fast"),
        (SOURCE, FAST.built_path, None),
    ):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("toy/fast.cpp", source)
            archive.writestr(module, b"machine code")
        if message:
            with pytest.raises(SourceError, match=message):
                take_prebuilt(FAST, tmp_path, built, wheel)
        else:
            take_prebuilt(FAST, tmp_path, built, wheel)
    assert built.read_bytes() == b"machine code"


THIRD_PARTY = ROOT / "third_party"


def test_every_backend_has_a_pin_that_is_complete() -> None:
    pins = load_pins(THIRD_PARTY)
    assert {pin.backend for pin in pins.values()} == {"megatron", "vllm", "sglang", "llama_cpp", "verl"}
    for folder, pin in pins.items():
        assert pin.name == folder
        assert (len(pin.sha256), pin.size_bytes > 1000, pin.disk_bytes > pin.size_bytes) == (64, True, True)
        assert pin.version in pin.archive
        assert pin.repository.startswith("https://")
    assert len({pin.digest for pin in pins.values()}) == len(pins)
    megatron = pins["Megatron-LM"]
    assert [extension.module for extension in megatron.extensions] == ["megatron.core.datasets.helpers_cpp"]


def test_a_pin_s_digest_is_of_what_a_fetch_leaves(shelf: Path) -> None:
    pin = make_pin(shelf / "toy-1.0.tar.gz")
    assert pin.digest == make_pin(shelf / "toy-1.0.tar.gz", repository="elsewhere", disk_bytes=9).digest
    assert pin.digest != make_pin(shelf / "toy-1.0.tar.gz", unpack=()).digest


@pytest.mark.parametrize("text", ["", "name: x", "[1, 2]", "name: x\nbogus: y\nunpack: [a]", "a: b: c"])
def test_a_pin_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "pin.yaml").write_text(text)
    with pytest.raises(SourceError, match=r"pin\.yaml: not a pin"):
        load_pin(tmp_path / "pin.yaml")
    with pytest.raises(SourceError, match="no such pin"):
        load_pin(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["megatron", "Megatron-LM", "MEGATRON-lm", "megatron-core"])
def test_a_pin_is_found_by_the_backend_s_names(name: str) -> None:
    assert find_pin(name, THIRD_PARTY).name == "Megatron-LM"


def test_a_mistyped_backend_gets_its_nearest_name() -> None:
    with pytest.raises(UserError, match=r"megatrom: no backend .*did you mean `megatron`"):
        find_pin("megatrom", THIRD_PARTY)


def test_the_verb_tells_the_state_in_words_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLAGSCALE_SOURCE_DIR", str(tmp_path))
    assert verb.main(["status", "megatron"]) == 1
    assert "absent" in capsys.readouterr().out
    assert verb.main(["status", "megatron", "--json"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert (row["state"], row["path"]) == ("absent", str(tmp_path / "Megatron-LM" / "src"))


def test_the_verb_fetches_with_plain_progress(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pin = make_pin(shelf / "toy-1.0.tar.gz")
    dest = tmp_path / "Toy" / "src"
    assert verb.fetch(pin, dest, (), replace=False) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"Toy: ready in {dest} (")
    assert "MiB to download" in said.err
    assert "download: " in said.err


# the git tree


def git(tree: Path, *words: str) -> str:
    env = {"PATH": os.environ["PATH"], "HOME": str(tree)}
    return subprocess.run(["git", *words], cwd=tree, env=env, capture_output=True, text=True, check=True).stdout


def test_the_source_is_a_git_tree_of_one_commit_that_is_the_same_everywhere(shelf: Path, tmp_path: Path) -> None:
    odd = {"toy/crlf.txt": b"a\r\nb\n", "toy/.gitattributes": b"* text=auto eol=crlf\n", "toy/.gitignore": b"*.log\n"}
    make_archive(shelf / "toy-1.0.tar.gz", FILES | odd | {"toy/kept.log": b"\xff\x00"})
    pin, commits = make_pin(shelf / "toy-1.0.tar.gz"), set()
    for place in ("here", "there"):
        dest = tmp_path / place / "Toy" / "src"
        fetch_source(pin, dest)
        assert source_status(pin, dest).commit == git(dest, "rev-parse", "HEAD").strip()
        assert git(dest, "status", "--porcelain") == ""
        assert git(dest, "rev-list", "--count", "HEAD") == "1\n"
        assert sorted(git(dest, "ls-files").split()) == sorted(
            f"toy/{name}" for name in ("__init__.py", "core.py", "crlf.txt", ".gitattributes", ".gitignore", "kept.log")
        )
        assert subprocess.check_output(["git", "cat-file", "blob", "HEAD:toy/crlf.txt"], cwd=dest) == b"a\r\nb\n"
        commits.add(source_status(pin, dest).commit)
    assert len(commits) == 1


def test_the_user_s_git_settings_are_left_aside(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fetch_commit(shelf, tmp_path / "plain")
    config = tmp_path / "gitconfig"
    config.write_text("[commit]\ngpgSign = true\n[core]\nautocrlf = true\n[init]\ndefaultBranch = other\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "no-such"))
    monkeypatch.setenv("GIT_AUTHOR_DATE", "2031-01-01T00:00:00")
    assert fetch_commit(shelf, tmp_path / "set") == plain


def fetch_commit(shelf: Path, folder: Path) -> str:
    pin = make_pin(shelf / "toy-1.0.tar.gz")
    fetch_source(pin, folder / "src")
    return source_status(pin, folder / "src").commit


def test_without_git_nothing_is_downloaded(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="no git on the PATH"):
        fetch_source(make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "Toy" / "src")
    assert not (tmp_path / "Toy").exists()


# what of an archive becomes the tree


def fetch_names(pin: Pin, dest: Path) -> list[str]:
    fetch_source(pin, dest)
    files = (path.relative_to(dest) for path in dest.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.parts[0] not in (".git", MANIFEST))


def test_a_folder_deep_in_the_archive_becomes_the_tree_without_another_git_s_files(shelf: Path, tmp_path: Path) -> None:
    inner = {f"vendor/engine/{name}": b"" for name in ("a.c", "src/b.c", ".git", "src/.git/config")}
    make_archive(shelf / "toy-1.0.tar.gz", FILES | inner)
    pin = make_pin(shelf / "toy-1.0.tar.gz", top="vendor/engine", unpack=())
    assert fetch_names(pin, tmp_path / "Toy" / "src") == ["a.c", "src/b.c"]


def make_wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


def test_a_wheel_gives_its_python_and_none_of_its_machine_code(shelf: Path, tmp_path: Path) -> None:
    make_wheel(shelf / "toy-1.0-py3-none-any.whl", FILES | {"toy/fast.so": b"", "toy-1.0.dist-info/RECORD": b""})
    pin = make_pin(shelf / "toy-1.0-py3-none-any.whl")
    assert fetch_names(pin, tmp_path / "Toy" / "src") == ["toy/__init__.py", "toy/core.py"]


@pytest.mark.parametrize("name", ["toy/../../evil.py", "toy/../../../evil.py"])
def test_a_wheel_cannot_write_outside_its_folder(shelf: Path, tmp_path: Path, name: str) -> None:
    make_wheel(shelf / "toy-1.0-py3-none-any.whl", {name: b"evil"})
    with pytest.raises(SourceError, match="cannot be unpacked"):
        fetch_source(make_pin(shelf / "toy-1.0-py3-none-any.whl"), tmp_path / "deep" / "er" / "Toy" / "src")
    assert not list(tmp_path.rglob("evil.py"))


def test_an_archive_that_is_none_is_told(shelf: Path, tmp_path: Path) -> None:
    for name in ("toy-1.0.tar.gz", "toy-1.0-py3-none-any.whl"):
        (shelf / name).write_bytes(b"neither")
        with pytest.raises(SourceError, match=f"{name} cannot be unpacked"):
            fetch_source(make_pin(shelf / name), tmp_path / name / "src")


def test_links_of_an_archive_are_kept(shelf: Path, tmp_path: Path) -> None:
    with tarfile.open(shelf / "toy-1.0.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("toy-1.0/toy/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "core.py"
        tar.addfile(link)
    pin, dest = make_pin(shelf / "toy-1.0.tar.gz"), tmp_path / "Toy" / "src"
    fetch_source(pin, dest)
    assert (dest / "toy" / "link.py").readlink() == Path("core.py")
    assert source_status(pin, dest).state == "ready"
    (dest / "toy" / "link.py").unlink()
    (dest / "toy" / "link.py").symlink_to("other.py")
    assert source_status(pin, dest).changed == ("toy/link.py (edited)",)
