"""The command's own words: help, version, unknown verbs, and how errors are told."""

import errno
import importlib
import os
import subprocess
import sys

import pytest
from factories import ROOT, run_python

from flagscale import __version__
from flagscale.cli import VERBS, main, render_help
from flagscale.cli.voice import complain, guard, warn
from flagscale.errors import ConfigError, Fault, LaunchError, UserError


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out == render_help()
    for verb, (_, summary) in VERBS.items():
        assert verb in out
        assert summary in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("word", ["-v", "--version"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"flagscale {__version__}\n"


@pytest.mark.parametrize(("verb", "says"), [("trian", "did you mean `train`?"), ("xyzzy", "see flagscale --help")])
def test_an_unknown_verb_is_a_mistake(verb: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2
    assert capsys.readouterr().err == f"error: there is no verb `{verb}`; {says}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_and_a_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(f"flagscale.cli.{VERBS[verb][0]}").main)
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: flagscale ")


def raising(error: BaseException) -> int:
    def work() -> int:
        raise error

    return guard(work)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("no"), 2, "error: no\n"),
        (LaunchError("died"), 1, "error: died\n"),
        (ConfigError([Fault("a", "is wrong"), Fault("b", "too")]), 2,
         "error: 2 faults in the configuration:\n  a: is wrong\n  b: too\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)  # fmt: skip
def test_errors_that_are_meant_are_messages(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error) == code
    assert capsys.readouterr().err == says


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())
    with pytest.raises(OSError, match="no such"):
        raising(OSError(errno.ENOENT, "no such"))


def test_warnings_and_complaints_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    warn("w")
    complain("c")
    assert capsys.readouterr() == ("", "warning: w\nerror: c\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys\nfrom flagscale.cli.voice import guard\nsys.exit(guard(lambda: print('x' * 10**6) or 0))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_is_a_message() -> None:
    code = "import sys\nfrom flagscale.cli.voice import guard\nsys.exit(guard(lambda: print('x') or 0))"
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(("module", "extra"), [("prometheus_client", "serve"), ("ray.serve", "ray")])
def test_a_package_of_an_optional_part_is_named_with_the_part(
    module: str, extra: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert guard(work) == 2
    told = capsys.readouterr().err
    assert (
        told == f"error: this needs the package {module}, which is not installed: `pip install 'flagscale[{extra}]'`\n"
    )


@pytest.mark.parametrize("module", ["flagscale.nonsense", "pydantic", "prometheus"])
def test_another_missing_module_is_a_defect(module: str) -> None:
    def work() -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    with pytest.raises(ModuleNotFoundError):
        guard(work)


def test_the_module_runs_as_a_program() -> None:
    done = run_python("-c", "import sys; from flagscale.cli import main; sys.exit(main(['nonsense']))")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
