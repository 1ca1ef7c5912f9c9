"""Completion, asked by real shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flagscale.cli import VERBS
from flagscale.cli.completion import find_words, main


@pytest.mark.parametrize(
    ("typed", "some"),
    [
        ([""], set(VERBS)),
        (["train", ""], {"tiny", "qwen3", "aquila"}),
        (["explain", "ti"], {"tiny"}),
        (["source", ""], {"fetch", "status"}),
        (["completion", ""], {"bash", "zsh"}),
    ],
)
def test_what_may_stand_here(typed: list[str], some: set[str]) -> None:
    assert some <= set(find_words(typed))


def test_run_ids_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "20260101T000000-abcd.json").write_text("{}")
    assert find_words(["stop", ""]) == ["20260101T000000-abcd"]


def test_after_the_first_argument_nothing_is_guessed() -> None:
    assert find_words(["train", "tiny", ""]) == []
    assert find_words(["doctor", ""]) == []


def test_bash_completes_a_verb_and_an_example(tmp_path: Path) -> None:
    command = tmp_path / "flagscale"
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom flagscale.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    script = """
eval "$(flagscale completion bash)"
COMP_WORDS=(flagscale sta); COMP_CWORD=1; _flagscale; echo "${COMPREPLY[*]}"
COMP_WORDS=(flagscale train qwen3); COMP_CWORD=2; _flagscale; echo "${COMPREPLY[*]}"
"""
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environ, check=True, capture_output=True, text=True)
    assert done.stdout == "status\nqwen3\n"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_reads_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zsh"]) == 0
    (tmp_path / "code").write_text(capsys.readouterr().out)
    subprocess.run(["zsh", "-n", str(tmp_path / "code")], check=True)


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fish"])
    assert stopped.value.code == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err
