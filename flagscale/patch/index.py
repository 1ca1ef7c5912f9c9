"""One file from the package index that pip is set up with.

`pip download` is no way to get a source archive: it runs the archive's build backend to learn the metadata, and so
needs the build's own dependencies. Here pip is only asked for its settings, and the index is read as the simple
repository API describes (https://packaging.python.org/specifications/simple-repository-api/). What that cannot do
(credentials from a keyring, a proxy that wants a login) pip itself does as the second way.
"""

import ast
import html
import http.client
import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import SourceError

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT_S = 60
CHUNK_BYTES = 1 << 16
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"

Progress = Callable[[str, int, int], None]
"""Called with (step, done, total), counted in bytes for a download, in files and modules for the rest."""


def ignore_progress(step: str, done: int, total: int) -> None:
    """The progress callback of who does not want to know."""


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """What pip would use: its index pages in order, folders or pages of links, certificates and proxy."""

    indexes: tuple[str, ...] = (DEFAULT_INDEX,)
    find_links: tuple[str, ...] = ()
    cert: str | None = None
    proxy: str | None = None


def parse_pip_config(listing: str) -> IndexSettings:
    """Read the output of `pip config list`; a variable beats the section `download`, which beats `global`."""
    found: dict[str, dict[str, str]] = {}
    for line in listing.splitlines():
        key, equals, value = line.partition("=")
        section, dot, name = key.strip().rpartition(".")
        if equals and dot:
            found.setdefault(name, {})[section] = str(ast.literal_eval(value)) if value[:1] in "'\"" else value

    def words(name: str) -> list[str]:
        by_section = found.get(name, {})
        for section in (":env:", "download", "global"):
            if section in by_section:
                return by_section[section].split()
        return []

    main = [] if words("no-index")[:1] in (["1"], ["true"], ["yes"], ["on"]) else words("index-url") or [DEFAULT_INDEX]
    return IndexSettings(
        indexes=tuple(main + (words("extra-index-url") if main else [])),
        find_links=tuple(words("find-links")),
        cert=" ".join(words("cert")) or None,
        proxy=" ".join(words("proxy")) or None,
    )


def load_index_settings() -> IndexSettings:
    """Ask pip for its settings; without pip in this interpreter, those of a pip that was never set up."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    return parse_pip_config(asked.stdout) if asked.returncode == 0 else IndexSettings()


def _named(address: str) -> tuple[str, str]:
    bare = urllib.parse.urldefrag(address).url
    return urllib.parse.unquote(bare.rpartition("/")[2]), bare


def parse_links(body: str, base: str) -> list[tuple[str, str]]:
    """(file name, address) of every file on an index page, in JSON or in HTML; addresses are relative to `base`."""
    if body.lstrip()[:1] == "{":
        return [(row["filename"], urllib.parse.urljoin(base, row["url"])) for row in json.loads(body)["files"]]
    hrefs = re.findall(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)["']""", body, flags=re.IGNORECASE)
    return [_named(urllib.parse.urljoin(base, html.unescape(href))) for href in hrefs]


def without_login(address: str) -> str:
    """The address as it may be shown: `https://user:secret@host/…` without what stands before the `@`."""
    return re.sub(r"(?<=://)[^/@]*@", "", address)


def _open(address: str, settings: IndexSettings) -> http.client.HTTPResponse:
    import ssl

    context = ssl.create_default_context(cafile=settings.cert) if settings.cert else ssl.create_default_context()
    openers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if settings.proxy:
        openers.append(urllib.request.ProxyHandler({"http": settings.proxy, "https": settings.proxy}))
    request = urllib.request.Request(address, headers={"Accept": ACCEPT, "User-Agent": "flagscale"})
    response: http.client.HTTPResponse = urllib.request.build_opener(*openers).open(request, timeout=TIMEOUT_S)
    return response


def _as_address(place: str) -> str:
    return place if "://" in place else Path(place).expanduser().resolve().as_uri()


def _links_of(place: str, project: str | None, settings: IndexSettings) -> list[tuple[str, str]]:
    """What a page lists: the page of `project` on an index, else the folder or the page of links itself."""
    address = _as_address(place)
    if project:
        address = f"{address.rstrip('/')}/{re.sub(r'[-_.]+', '-', project).lower()}/"
    if address.startswith("file://"):
        folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(address).path))
        if folder.is_dir() and not (folder / "index.html").is_file():
            return [(path.name, path.as_uri()) for path in sorted(folder.iterdir())]
        address = (folder / "index.html").as_uri() if folder.is_dir() else address
    with _open(address, settings) as page:
        return parse_links(page.read().decode("utf-8", "replace"), page.geturl())


def _save(address: str, dst: Path, settings: IndexSettings, progress: Progress) -> None:
    with _open(address, settings) as response, dst.open("wb") as out:
        total, done = int(response.headers.get("Content-Length") or 0), 0
        while chunk := response.read(CHUNK_BYTES):
            out.write(chunk)
            done += len(chunk)
            progress("download", done, total)


def _pip_download(project: str, version: str, archive: str, dst: Path) -> str | None:
    """Let pip fetch the archive, dependencies of its build and all; None, or what pip said last."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=dst.parent) as folder:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", project]
        words += ["--ignore-requires-python", "--dest", folder, f"{project}=={version}"]
        ran = subprocess.run(words, capture_output=True, text=True, check=False)
        got = Path(folder) / archive
        if got.is_file():
            got.replace(dst)
            return None
        return (ran.stderr.strip().splitlines() or [f"pip brought no {archive}"])[-1]


def list_archives(project: str, settings: IndexSettings) -> dict[str, str]:
    """File name -> address of all that pip's configured indexes have of `project`.

    Raises:
        SourceError: no place answers.
    """
    places = [(place, None) for place in settings.find_links] + [(place, project) for place in settings.indexes]
    found: dict[str, str] = {}
    answers: list[str] = []
    for place, name in places:
        try:
            found = dict(_links_of(place, name, settings)) | found
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            answers.append(f"{without_login(place)}: {without_login(str(error))}")
    if len(answers) == len(places):
        raise SourceError(f"cannot list the releases of {project}:\n  " + "\n  ".join(answers))
    return found


def download(
    project: str,
    version: str,
    archive: str,
    dst: Path,
    progress: Progress = ignore_progress,
    settings: IndexSettings | None = None,
) -> None:
    """Bring the file `archive` of `project` from pip's configured indexes to the path `dst`.

    Raises:
        SourceError: no place has it; the message names every place that was asked and what it answered.
    """
    settings = settings or load_index_settings()
    places = [(place, None) for place in settings.find_links] + [(place, project) for place in settings.indexes]
    answers: list[str] = []
    for place, name in places:
        try:
            address = dict(_links_of(place, name, settings)).get(archive)
            if address:
                _save(address, dst, settings, progress)
                return
            answers.append(f"{without_login(place)}: does not list it")
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            answers.append(f"{without_login(place)}: {without_login(str(error))}")
    refusal = _pip_download(project, version, archive, dst)
    if refusal is None:
        return
    tried = "\n  ".join([*answers, f"pip: {without_login(refusal)}"])
    raise SourceError(
        f"cannot fetch {archive}:\n  {tried}\nWithout a network, put that file into {dst.parent} and run this again."
    )
