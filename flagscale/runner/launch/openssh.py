"""One connection to one host by the machine's own `ssh`: with all of the user's configuration, jump hosts and agents.

The first `ssh` is the master of a shared connection (ControlMaster); every command is another, small one that goes
through it. The master runs `cat` on the host and ends with its own input, so it cannot outlive us, whatever becomes of
us. The trade-off against Paramiko: what went wrong is read from what `ssh` says, and a command costs a process here.
"""

import contextlib
import os
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from flagscale.runner.launch.connection import (
    CLOSE_S,
    Dialog,
    LinkError,
    PipeDialog,
    describe_break,
    describe_changed_key,
    describe_refusal,
    describe_timeout,
    describe_unknown_key,
    describe_unknown_name,
    describe_unreachable,
)
from flagscale.runner.launch.folder import Remote

KEEPALIVE_S = 15
FAILED = 255
"""the exit code of `ssh` itself; no errand of ours has it"""


def list_options(remote: Remote, socket: Path, accept_new: bool, timeout_s: float) -> list[str]:
    """Over what the user's configuration says: no questions, and keys are checked."""
    settings = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "accept-new" if accept_new else "yes",
        "ConnectTimeout": str(max(1, round(timeout_s))),
        "ServerAliveInterval": str(KEEPALIVE_S),
        "ControlPath": str(socket),
        "ControlPersist": "no",
        "ForkAfterAuthentication": "no",
        "RequestTTY": "no",
        "LogLevel": "ERROR",
    }
    words = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    words += ["-l", remote.user] if remote.user else []
    return words + (["-p", str(remote.port)] if remote.port else [])


def explain(said: str, remote: Remote, timeout_s: float) -> str:
    """The same words for the same fault as Paramiko's connection has."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "`ssh` said nothing"
    if "IDENTIFICATION HAS CHANGED" in said:
        return describe_changed_key(remote, "as `ssh` found it")
    if "host key is known for" in said or "Host key verification failed" in said:
        return describe_unknown_key(remote, next((line for line in lines if "is known for" in line), last))
    if "Permission denied" in said:
        return describe_refusal(remote, remote.user or "this user", str(remote))
    if "timed out" in said:
        return describe_timeout(timeout_s, str(remote))
    if "Could not resolve hostname" in said:
        return describe_unknown_name(remote.name)
    return describe_unreachable(last.removeprefix("ssh: ").rpartition(": ")[2], str(remote))


class OpenSSH:
    """An open connection; it owns the master's process and the folder of its socket.

    Raises:
        LinkError: from here and from `run`.
    """

    def __init__(self, remote: Remote, accept_new: bool = False, timeout_s: float = 10.0) -> None:
        program = shutil.which("ssh")
        if program is None:
            raise LinkError(
                "cannot be reached: there is no `ssh` on this machine's PATH (`experiment.runner.ssh_client`)"
            )
        self.remote = remote
        self.folder = Path(tempfile.mkdtemp(prefix="flagscale-ssh-"))
        options = list_options(remote, self.folder / "s", accept_new, timeout_s)
        self.words = [program, *options, "-o", "ControlMaster=no", remote.name]
        self.env = {**os.environ, "LC_ALL": "C", "SSH_ASKPASS_REQUIRE": "never"}
        self.errors = (self.folder / "errors").open("wb+")
        self.master = subprocess.Popen(
            [program, *options, "-o", "ControlMaster=yes", remote.name, "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=self.env,
            start_new_session=True,  # no terminal that a jump host could ask, and no Ctrl-C
        )
        if not self._is_open(time.monotonic() + timeout_s):
            self.master.kill()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace")
            self.close()
            raise LinkError(explain(said or "timed out", remote, timeout_s))

    def _is_open(self, deadline: float) -> bool:
        """Whether what is written comes back: then somebody is there, and let us in."""
        assert self.master.stdin is not None
        assert self.master.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.master.stdin.write(b"\n")
            self.master.stdin.flush()
            poll = select.poll()
            poll.register(self.master.stdout, select.POLLIN)
            ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            return bool(ready) and bool(os.read(self.master.stdout.fileno(), 1))
        return False

    def start(self, words: list[str]) -> Dialog:
        return PipeDialog([*self.words, shlex.join(words)], str(self.remote), self.env, FAILED)

    def run(self, words: list[str], text: bytes, limit_s: float) -> tuple[int, bytes, bytes]:
        """Exit code, output and errors of a command; `text` is its input. Its words arrive as they are."""
        command = [*self.words, shlex.join(words)]
        try:
            done = subprocess.run(
                command, input=text, capture_output=True, timeout=limit_s, env=self.env, start_new_session=True
            )
        except subprocess.TimeoutExpired:
            raise LinkError(describe_break(f"no answer within {limit_s:g} s", str(self.remote))) from None
        except OSError as error:
            raise LinkError(describe_break(error.strerror or str(error), str(self.remote))) from None
        if done.returncode == FAILED:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise LinkError(describe_break(said[-1] if said else "broke off", str(self.remote)))
        return done.returncode, done.stdout, done.stderr

    def close(self) -> None:
        for stream in (self.master.stdin, self.master.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self.master.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.master.kill()
            self.master.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
