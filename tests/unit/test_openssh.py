"""What `ssh` says, in our words; and the connection itself, against a program that stands in for `ssh`."""

import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from flagscale.runner.launch import openssh
from flagscale.runner.launch.connection import LinkError, open_connection
from flagscale.runner.launch.folder import Remote
from flagscale.runner.launch.openssh import OpenSSH, explain, list_options

REMOTE = Remote("host_0_a", "a", "u", 2200, "/usr/bin/python3", client="openssh")

SAID = {
    "ssh: connect to host a port 22: Connection refused": "cannot be reached: Connection refused (u@a)",
    "ssh: connect to host a port 22: Connection timed out": "cannot be reached: no answer within 10 s (u@a)",
    "Connection timed out during banner exchange": "cannot be reached: no answer within 10 s (u@a)",
    "ssh: Could not resolve hostname a: Name or service not known": "cannot be reached: the name `a` is not known",
    "u@a: Permission denied (publickey).": "lets u in by none of this user's keys (u@a)",
    "No ED25519 host key is known for a and you have requested strict checking.\nHost key verification failed.": (
        "its host key is unknown (No ED25519 host key is known for a and"
    ),
    "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.": "its host key has changed",
    "": "cannot be reached: `ssh` said nothing",
}


@pytest.mark.parametrize("said", SAID)
def test_what_ssh_says_is_told_in_our_words(said: str) -> None:
    assert explain(said, REMOTE, 10.0).startswith(SAID[said])


def test_options_ask_nothing_and_check_keys() -> None:
    words = list_options(REMOTE, Path("/s"), False, 10.0)
    assert words[-4:] == ["-l", "u", "-p", "2200"]
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=10"} <= set(words)
    plain = list_options(Remote("l", "a", None, None, "p"), Path("/s"), True, 0.2)
    assert "StrictHostKeyChecking=accept-new" in plain
    assert "ConnectTimeout=1" in plain
    assert not {"-l", "-p"} & set(plain)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """`ssh` in the PATH: a master runs its last word, a command of the connection is given to a shell, as sshd does."""
    program = folder / "ssh"
    program.write_text(f"#!/bin/bash\n{code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_words_and_input_arrive_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, 'exec sh -c "${@: -1}"')
    link = open_connection(REMOTE, False, 10.0)
    assert isinstance(link, OpenSSH)
    words = ["printf", "%s|", "a 'b'", '"$HOME"', "`x`", "\\", "new\nline"]
    assert link.run(words, b"", 10) == (0, b"a 'b'|\"$HOME\"|`x`|\\|new\nline|", b"")
    assert link.run(["cat"], b"\0\xff" * 100000, 10) == (0, b"\0\xff" * 100000, b"")
    assert link.run(["sh", "-c", "echo no >&2; exit 7"], b"", 10) == (7, b"", b"no\n")
    with pytest.raises(LinkError, match=r"was reached, and then: no answer within 0\.5 s"):
        link.run(["sleep", "600"], b"", 0.5)
    with pytest.raises(LinkError, match="was reached, and then: it broke"):
        link.run(["sh", "-c", "echo it broke >&2; exit 255"], b"", 10)
    dialog = link.start(["sh", "-c", 'while read -r line; do echo "<$line>"; done'])
    assert [dialog.ask(text, 10) for text in (b"a\n", b"'b' $c\n")] == [b"<a>", b"<'b' $c>"]
    dialog.close()
    dialog = link.start(["sh", "-c", "echo it broke >&2; exit 255"])
    with pytest.raises(LinkError, match="was reached, and then: it broke"):
        dialog.ask(b"x\n", 10)
    dialog.close()
    folder, master = link.folder, link.master
    link.close()
    assert not folder.exists()
    assert master.returncode == 0


def test_a_host_that_does_not_answer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    monkeypatch.setattr(openssh.tempfile, "mkdtemp", lambda **_: made.mkdir() or str(made))
    stand_in(tmp_path, monkeypatch, "exec sleep 600")
    with pytest.raises(LinkError, match=r"no answer within 0\.5 s"):
        OpenSSH(REMOTE, timeout_s=0.5)
    assert not made.exists()
    stand_in(tmp_path, monkeypatch, "echo 'u@a: Permission denied (publickey).' >&2; exit 255")
    with pytest.raises(LinkError, match="lets u in by none"):
        OpenSSH(REMOTE)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(LinkError, match="there is no `ssh`"):
        OpenSSH(REMOTE)


def test_real_ssh_takes_the_options() -> None:
    words = ["ssh", "-G", *list_options(REMOTE, Path("/s"), False, 10.0), "-o", "ControlMaster=yes", "a"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, shlex.join(words) + done.stderr
    assert "batchmode yes" in done.stdout
    assert "controlpath /s" in done.stdout
